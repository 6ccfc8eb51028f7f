// A prompt becomes 77 ids: CLIP's byte-pair encoding, the same ids as Python's (lesson 30).

const SPACE = '\\t-\\r\\x1c-\\x20\\x85\\p{Z}';           // what Python takes for white space

// ---------------------------------------------------------------- cleaning

// "&eacute;" -> "é", as the browser itself reads it
export function unescapeHtml(text) {
  if (!text.includes('&')) return text;
  const page = `<!doctype html><textarea>${text.replaceAll('<', '&lt;')}</textarea>`;
  return new DOMParser().parseFromString(page, 'text/html').querySelector('textarea').textContent;
}

// What ftfy.fix_text does in Python, except for text that was read in a wrong encoding: see `looksGarbled`
const windows = '€\x81‚ƒ„…†‡ˆ‰Š‹Œ\x8dŽ\x8f\x90‘’“”•–—˜™š›œ\x9džŸ';      // Windows' letters for the bytes 128 to 159
const fixes = [
  [/[\x80-\x9f]/g, c => windows[c.charCodeAt(0) - 128]],    // controls that were meant as letters
  [/[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06]/g, splitLigature],
  [/[\u3000\uff01-\uffef]/g, c => c.normalize('NFKC')],                           // wide letters
  [/[\u201c-\u201f]/g, '"'], [/[\u02bc\u2018-\u201b]/g, "'"],                     // curly quotes
  [/\r\n?|[\u2028\u2029\x85]/g, '\n'],
  [/\p{Surrogate}/gu, '\ufffd'],
  [/\x1b\[[\d;]*[a-zA-Z]/g, ''],                                                  // colours of a terminal
  [/[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, ''],          // controls
];

function splitLigature(c) {
  if (c == '\ufb05') return '\u017ft';                                            // long s and t
  return c == '\u0149' ? '\u02bcn' : c.normalize('NFKD').replace(/([Zz])\u030c/, m => m.normalize('NFC'));
}

function fixText(text, unescape) {
  while (true) {
    const before = text;
    if (!text.includes('<')) text = unescape(text);
    for (const [what, by] of fixes) text = text.replace(what, by);
    text = text.normalize('NFC');
    if (text == before) return text;
  }
}

// One line, lower case, as CLIP was trained
export function cleanText(text, unescape = unescapeHtml) {
  text = unescape(unescape(text.split(/(?<=\n)/).map(line => fixText(line, unescape)).join('')));
  return text.replace(new RegExp(`[${SPACE}]+`, 'gu'), ' ').trim().toLowerCase();
}

// "cafÃ©": bytes of UTF-8 that somebody took for letters. Python's ftfy mends it, this page only says so.
const bytePairs = /[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}/;
const twice = new RegExp(`(${bytePairs.source}){2}`);                    // where words look like that too: «СССР»
const others = { 'windows-1250': bytePairs, 'windows-1254': bytePairs, 'iso-8859-2': bytePairs, macintosh: bytePairs,
                 'windows-1251': twice, 'windows-1253': twice };

export function looksGarbled(text) {
  for (const [what, by] of fixes.slice(-2)) text = text.replace(what, by);        // what nobody sees
  const high = Uint8Array.from({ length: 128 }, (_, i) => 128 + i);
  const found = (letters, what) => what.test(Array.from(text, c => {
    const k = letters.indexOf(c);
    return String.fromCharCode(k < 0 ? Math.min(c.charCodeAt(0), 256) : 128 + k);
  }).join(''));
  const latin = windows + String.fromCharCode(...high.subarray(32));
  const letters = name => new TextDecoder(name).decode(high);
  return found(latin, bytePairs) || Object.entries(others).some(([name, what]) => found(letters(name), what));
}

// ---------------------------------------------------------------- words and their parts

// Runs of letters, single digits, runs of signs, contractions: CLIP's regular expression
export function splitWords(text) {
  return text.match(new RegExp(`'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^${SPACE}\\p{L}\\p{N}]+`, 'gu')) ?? [];
}

// GPT-2's alphabet: each of 256 bytes as a letter that can be seen
function byteLetters() {
  const seen = b => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  const bytes = Array.from({ length: 256 }, (_, b) => b);
  const hidden = bytes.filter(b => !seen(b));
  return bytes.map(b => String.fromCharCode(seen(b) ? b : 256 + hidden.indexOf(b)));
}

export class Tokenizer {
  // `merges` is the text of merges.txt; `said` the `tokenizer` of settings.json, in which `runs` says how many
  // embeddings in a row are zero, then how many are not, and so on
  constructor(merges, said) {
    this.said = said;
    this.letters = byteLetters();
    const pairs = merges.split('\n').slice(1).filter(line => line.trim());
    this.ranks = new Map(pairs.map((pair, i) => [pair, i]));
    // CLIP counts the letters that can be seen first, then the same at a word's end, then what each merge made
    const letters = [...this.letters].sort((a, b) => a.charCodeAt(0) - b.charCodeAt(0));
    this.names = [...letters, ...letters.map(c => c + '</w>'), ...pairs.map(pair => pair.replace(' ', ''))];
    this.ids = new Map(this.names.map((name, id) => [name, id]));
    const special = Object.keys(said.special).sort((a, b) => b.length - a.length);
    this.zeros = (said.runs ?? '').split(' ').flatMap((n, i) => Array(Number(n)).fill(i % 2 == 0));
    this.special = new RegExp(`(${special.map(s => s.replace(/[^\w<> ]/g, '\\$&')).join('|')})`);
  }

  // Merge neighbours, the pair that was learned first goes first, until no pair is known
  bpe(word) {
    let parts = Array.from(new TextEncoder().encode(word), b => this.letters[b]);
    parts[parts.length - 1] += '</w>';
    while (true) {
      const rank = i => this.ranks.get(parts[i] + ' ' + parts[i + 1]) ?? Infinity;
      const best = parts.reduce((low, _, i) => rank(i) < rank(low) ? i : low, 0);
      if (rank(best) == Infinity) return parts.map(p => this.ids.get(p));
      parts = joined(parts, parts[best], parts[best + 1]);
    }
  }

  // All ids of a text, start and end included, as many as there are
  encode(text, unescape) {
    const inside = cleanText(text, unescape).split(this.special).flatMap(part =>
      this.said.special[part] ?? splitWords(part.normalize('NFC')).flatMap(w => this.bpe(w)));
    return [this.said.start, ...inside, this.said.end];
  }

  // -> 77 ids, and a sentence about what did not fit
  padded(text, unescape) {
    const all = this.encode(text, unescape), n = this.said.length;
    const ids = all.length > n ? [...all.slice(0, n - 1), this.said.end] : all;
    const full = [...ids, ...Array(n - ids.length).fill(this.said.pad)];
    return { ids: full, note: all.length > n ? this.cut(all) : '' };
  }

  // The first words that the text encoder will not see; one that fits by half is among them
  cut(ids) {
    const n = this.said.length, ends = this.ends(ids.slice(0, -1));
    const start = Math.max(1, ...ends.filter(e => e < n));
    const stop = ends.filter(e => e > start).slice(0, 10).pop() ?? ids.length - 1;
    const shown = ids.slice(start, stop).slice(0, 30);
    const more = ids.length - 1 - start - shown.length;
    return `expected at most ${n} tokens, got ${ids.length}: the text encoder will not see ` +
      `“${this.decode(shown)}”${more ? ` and ${more} more tokens` : ''}. Shorten the prompt. ` +
      'A token is a word or a piece of one; the start and the end count too.';
  }

  // Words of which a piece has no trained embedding, each once, as far as the text encoder reads
  unseen(ids) {
    const read = ids.slice(0, -1).slice(0, this.said.length - 1), ends = this.ends(read);
    const words = ends.slice(1).map((end, i) => read.slice(ends[i], end));       // the first is the start token's
    return [...new Set(words.filter(w => w.some(id => this.zeros[id])).map(w => this.decode(w)))];
  }

  name(id) { return this.names[id] ?? Object.keys(this.said.special).find(k => this.said.special[k][0] == id) + '</w>'; }

  // For each word the place behind its last id
  ends(ids) { return ids.flatMap((id, i) => this.name(id).endsWith('</w>') ? [i + 1] : []); }

  decode(ids) {
    const letters = ids.map(id => this.name(id)).join('').replaceAll('</w>', ' ');
    const bytes = Uint8Array.from(letters, c => c == ' ' ? 32 : this.letters.indexOf(c));
    return new TextDecoder().decode(bytes).trim();
  }
}

// Each such pair of neighbours made one
function joined(parts, a, b) {
  const out = [];
  for (let i = 0; i < parts.length; i++) {
    const both = parts[i] == a && parts[i + 1] == b;
    out.push(both ? a + b : parts[i]);
    if (both) i++;
  }
  return out;
}

// ---------------------------------------------------------------- weights

const MARK = /\\[()]|\(|:\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)|\)/g;

// Is "(inside:number)" a weight? A ratio like (2:3) is none, nor is (:2)
const weighs = (inside, number) => number && inside.trim()
  && !(/^\s*[0-9]+(\.[0-9]+)?\s*$/.test(inside) && !number.includes('.'));

function checkWeight(written, number) {
  if (number >= 0 && number <= 5) return Number(number);
  throw new Error(`expected a weight from 0 to 5, got ${number} in “${written}”. 1 is no change, 1.3 is usual. ` +
    'Brackets that are text are written \\( and \\).');
}

// "a (red:1.3) fox" -> { text: "a red fox", marks: [[2, 5, 1.3]] }, as AUTOMATIC1111 writes weights
export function readWeights(prompt) {
  const open = [], marks = [], out = new Set();
  for (const m of prompt.matchAll(MARK)) {
    if (m[0] == '(') open.push(m.index);
    else if (m[0][0] == '\\') out.add(m.index);
    else if (open.length) {
      const start = open.pop(), end = m.index + m[0].length;
      if (!weighs(prompt.slice(start + 1, m.index), m[1])) continue;
      marks.push([start, m.index, checkWeight(prompt.slice(start, end).slice(-50), m[1])]);
      for (let i = m.index; i < end; i++) out.add(i);
      out.add(start);
    }
  }
  const kept = end => [...Array(end).keys()].filter(i => !out.has(i));      // places that stay, before `end`
  return { text: kept(prompt.length).map(i => prompt[i]).join(''),
           marks: marks.map(([start, end, weight]) => [kept(start).length, kept(end).length, weight]) };
}

// How many of `ids` are `text`, their beginning; a text that stops inside a word counts it up or not
function tokensBefore(tokenizer, ids, text, up, unescape) {
  const part = tokenizer.encode(text, unescape).slice(0, -1), ends = tokenizer.ends(ids);
  const differs = part.findIndex((id, i) => id != ids[i]), same = differs < 0 ? part.length : differs;
  if (same == part.length) return same;
  return up ? ends.find(e => e > same) ?? ids.length : Math.max(1, ...ends.filter(e => e <= same));
}

function neverSeen(words) {
  const more = words.length > 10 ? ` and ${words.length - 10} more words` : '';
  const shown = words.slice(0, 10).map(w => `“${w}”`).join(', ');
  return words.length ? `this checkpoint has never seen ${shown}${more}; it draws anyway.` : '';
}

// What a prompt says: { ids, weights, notes }, 77 of either, and sentences about what is not as it was typed
export function readPrompt(tokenizer, prompt, unescape = unescapeHtml) {
  const { text, marks } = readWeights(prompt);
  const { ids, note } = tokenizer.padded(text, unescape);
  const all = tokenizer.encode(text, unescape), weights = ids.map(() => 1);
  for (const [start, end, weight] of marks.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2])) {
    const from = tokensBefore(tokenizer, all, text.slice(0, start), false, unescape);
    const to = tokensBefore(tokenizer, all, text.slice(0, end), true, unescape);
    for (let i = from; i < Math.min(to, ids.length); i++) weights[i] *= weight;
  }
  weights.fill(1, Math.min(all.length, ids.length) - 1);
  const garbled = looksGarbled(text) ? 'This text looks as if it was read in a wrong encoding. Python would mend it; ' +
    'this page takes it as it stands. Type it anew if it is not what you meant.' : '';
  return { ids, weights, notes: [note, neverSeen(tokenizer.unseen(all)), garbled].filter(Boolean) };
}
