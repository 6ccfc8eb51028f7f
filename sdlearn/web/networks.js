// The networks, as ONNX Runtime Web runs them: arrays of numbers in, an array of numbers out.
import { bytesOf } from './files.js';
import * as ort from './ort.js';

// One thread and plain WebAssembly: what every browser has, and the same numbers everywhere
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: new URL('./ort.wasm', import.meta.url).href };

// Improving a network before it runs takes a second, and saves a few hundredths of one at each picture
const how = { executionProviders: ['wasm'], graphOptimizationLevel: 'disabled' };

// How files of either kind start: a network with the version of its format, WebAssembly with "asm"
const network = [8], wasm = [0, 97, 115, 109];

// A function that uses SIMD, as small as one can be: browsers without it find it invalid
const simd = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

// Why did a network not start? Errors with a code are about the network, others about the engine
async function broken(name, { message }) {
  const again = 'Load this page again; if that does not help, write it anew.';
  if (/ERROR_CODE/.test(message))
    return new Error(`expected a network in the file ${name}, got one that ONNX Runtime does not read: “${message}”. ${again}`);
  if (!WebAssembly.validate(simd))
    return new Error('expected a browser that runs WebAssembly with SIMD, got one without. ' +
                     'Take a current Firefox, Chrome, Edge or Safari.');
  try { await bytesOf('ort.wasm', wasm); }
  catch (why) { return why; }
  return new Error(`expected ONNX Runtime to start from the file ort.wasm, got “${message}”. ${again}`);
}

async function started(name, tell) {
  const bytes = await bytesOf(name, network);
  tell(name);
  try { return await ort.InferenceSession.create(bytes, how); }
  catch (error) { throw await broken(name, error); }
}

// -> { words, noise, sketch, pixels }, what `draw` asks; each waits for its own file alone
export async function loadNetworks(plan, tell = () => {}) {
  const names = [...new Set(['text_encoder', 'unet', plan.sketch, 'decoder'])];
  const nets = Object.fromEntries(names.map(name => [name, started(`${name}.onnx`, tell)]));
  for (const net of Object.values(nets)) net.catch(() => {});      // whoever waits for it hears of it
  const floats = (x, ...shape) => new ort.Tensor('float32', x, shape);
  const whole = ids => new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const ask = async (name, feeds) => {
    const net = await nets[name];
    try { return Object.values(await net.run(feeds))[0].data; }
    catch (error) {
      throw new Error(`expected the file ${name}.onnx to go with settings.json, got “${error.message}” from ONNX Runtime. ` +
                      'Write the page anew.');
    }
  };
  const latents = x => floats(x, 1, ...plan.shape);
  return {
    words: ids => ask('text_encoder', { ids: whole(ids) }),
    noise: (x, t, words) => ask('unet', { x_in: latents(x), t: floats([t], 1),
                                          text_embeddings: floats(words, 1, plan.length, words.length / plan.length) }),
    sketch: x => ask(plan.sketch, { latents: latents(x) }),
    pixels: x => ask('decoder', { latents: latents(x) }),
  };
}
