// Ids and a seed become a picture: the loop of Python's pipeline, with three networks that somebody else runs.
import { normal } from './noise.js';

const map = (x, f) => Float32Array.from(x, f);

// Noisy latents as the network wants them, of std about 1
const scaleInput = (x, sigma) => map(x, v => v / Math.sqrt(sigma ** 2 + 1));

// The picture that this noise prediction implies: x0 = x - sigma eps
const predictX0 = (x, sigma, eps) => map(x, (v, i) => v - sigma * eps[i]);

// Euler's step along the slope eps: x' = x + (sigma' - sigma) eps
const eulerStep = (x, eps, sigma, next) => map(x, (v, i) => v + (next - sigma) * eps[i]);

// -1..1, red, green and blue in planes -> 0..255, red, green, blue and opacity of a pixel side by side
export function toBytes(planes) {
  const n = planes.length / 3, bytes = new Uint8ClampedArray(4 * n);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) bytes[4 * i + c] = (planes[c * n + i] + 1) * 127.5;   // rounds and clips
    bytes[4 * i + 3] = 255;
  }
  return bytes;
}

// A weight moves what is said about a token away from what the empty prompt says there
const weigh = (words, nothing, weights) =>
  map(words, (v, i) => nothing[i] + weights[Math.floor(i * weights.length / words.length)] * (v - nothing[i]));

async function wordsOf(nets, { ids, weights, nothing }) {
  const words = await nets.words(ids);
  return weights.every(w => w == 1) ? words : weigh(words, await nets.words(nothing), weights);
}

// A step at a time: { i, last, x, x0, image }.
// `prompt` is { ids, weights, nothing: ids of the empty prompt };
// `nets` are functions from numbers to numbers: words(ids), noise(x, t, words), sketch(x0), pixels(latents)
export async function* draw(nets, plan, prompt, seed) {
  const words = await wordsOf(nets, prompt);
  const size = plan.shape.reduce((a, b) => a * b);
  let x = map(normal(seed, size), v => v * plan.start_std);
  for (let i = 0; i < plan.timesteps.length; i++) {
    const sigma = plan.sigmas[i];
    const eps = await nets.noise(scaleInput(x, sigma), plan.timesteps[i], words);
    const x0 = predictX0(x, sigma, eps);
    x = eulerStep(x, eps, sigma, plan.sigmas[i + 1]);
    const last = i + 1 == plan.timesteps.length;
    const image = toBytes(last ? await nets.pixels(x) : await nets.sketch(x0));
    yield { i, last, x, x0, image };
  }
}
