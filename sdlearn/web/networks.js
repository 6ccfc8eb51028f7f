// The networks, as ONNX Runtime Web runs them: arrays of numbers in, an array of numbers out.
import * as ort from './ort.js';

// One thread and plain WebAssembly: what every browser has, and the same numbers everywhere
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: new URL('./ort.wasm', import.meta.url).href };

// Improving a network before it runs takes a second, and saves a few hundredths of one at each picture
const how = { executionProviders: ['wasm'], graphOptimizationLevel: 'disabled' };

// A file, or a sentence that says which one is missing
export async function bytesOf(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok)
    throw new Error(`expected the file ${name} beside this page, got “${answer.status} ${answer.statusText}”. ` +
                    'Write the page anew.');
  return new Uint8Array(await answer.arrayBuffer());
}

async function started(name, tell) {
  const bytes = await bytesOf(name);
  tell(name);
  try { return await ort.InferenceSession.create(bytes, how); }
  catch (error) {
    throw new Error('expected a browser that runs WebAssembly with SIMD, and the files ort.js and ort.wasm beside this ' +
                    `page; ONNX Runtime says: ${error.message}`);
  }
}

// -> { words, noise, sketch, pixels }, what `draw` asks; each waits for its own file alone
export async function loadNetworks(plan, tell = () => {}) {
  const names = [...new Set(['text_encoder', 'unet', plan.sketch, 'decoder'])];
  const nets = Object.fromEntries(names.map(name => [name, started(`${name}.onnx`, tell)]));
  for (const net of Object.values(nets)) net.catch(() => {});      // whoever waits for it hears of it
  const floats = (x, ...shape) => new ort.Tensor('float32', x, shape);
  const whole = ids => new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const ask = async (name, feeds) => Object.values(await (await nets[name]).run(feeds))[0].data;
  const latents = x => floats(x, 1, ...plan.shape);
  return {
    words: ids => ask('text_encoder', { ids: whole(ids) }),
    noise: (x, t, words) => ask('unet', { x_in: latents(x), t: floats([t], 1),
                                          text_embeddings: floats(words, 1, plan.length, words.length / plan.length) }),
    sketch: x => ask(plan.sketch, { latents: latents(x) }),
    pixels: x => ask('decoder', { latents: latents(x) }),
  };
}
