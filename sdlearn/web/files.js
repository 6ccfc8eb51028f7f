// The files beside this page, or a sentence that says what came instead.

const anew = 'Write the page anew.';

// What a server without the file may send in its place starts with "<!doctype html>"
const begins = bytes => {
  const text = new TextDecoder('latin1').decode(bytes.slice(0, 24)).replace(/[^ -~]+/g, ' ').trim();
  return text ? `“${text}”` : bytes.length ? 'other bytes' : 'nothing';
};

// `first`: the bytes that such a file starts with
export async function bytesOf(name, first) {
  let answer, bytes;
  try {
    answer = await fetch(new URL(name, import.meta.url));
    bytes = new Uint8Array(await answer.arrayBuffer());
  } catch {
    throw new Error(`expected the file ${name} beside this page, got no answer or half of one. Is the network there? ` +
                    'Then load this page again.');
  }
  if (!answer.ok)
    throw new Error(`expected the file ${name} beside this page, got “${answer.status} ${answer.statusText}”. ${anew}`);
  if (first.some((b, i) => bytes[i] != b))
    throw new Error(`expected the file ${name} as write_page writes it, got one that starts with ${begins(bytes)}. ${anew}`);
  return bytes;
}

const letters = text => [...new TextEncoder().encode(text)];

export async function textOf(name, first) { return new TextDecoder().decode(await bytesOf(name, letters(first))); }

export async function settingsOf(name) {
  const text = await textOf(name, '{');
  let said;
  try { said = JSON.parse(text); }
  catch (error) { throw new Error(`expected the file ${name} to be JSON, got “${error.message}”. ${anew}`); }
  const lost = ['prompt', 'seed', 'plan', 'networks', 'tokenizer'].filter(key => !(key in said));
  if (lost.length) throw new Error(`expected the file ${name} as write_page writes it, got one without ${lost.join(', ')}. ${anew}`);
  return said;
}
