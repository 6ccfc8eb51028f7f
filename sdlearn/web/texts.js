// What is read and written around a picture: the seed, the name of its file, the lines of Python that draw it too.

const most = 2 ** 32 - 1;

export function readSeed(text) {
  const seed = text.trim();
  if (/^\d+$/.test(seed) && Number(seed) <= most) return Number(seed);
  throw new Error(`expected a seed from 0 to ${most}, got “${seed}”: a whole number`);
}

// The last is followed by the first
export const nextSeed = text => (readSeed(text) + 1) % (most + 1);

// "A (red:1.3) fox" with seed 1 -> "a-red-1-3-fox-1.png"
export function fileName(prompt, seed) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) ?? ['picture'];
  return `${[...words.join('-')].slice(0, 60).join('').replace(/-$/, '')}-${seed}.png`;
}

// `load` is the line that loads the checkpoint; a string in JSON is one in Python
export const pythonOf = (load, prompt, seed) =>
  `from sdlearn import load_sd, txt2img\ntxt2img(${load}, ${JSON.stringify(prompt)}, seed=${seed})[0]`;

export const sentence = text => text[0].toUpperCase() + text.slice(1);
