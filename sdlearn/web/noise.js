// The noise of a seed, number for number torch's own: seed 32 here is seed 32 in Python.

// Whole numbers of 32 bits, one after the other: the Mersenne Twister (Matsumoto and Nishimura 1998)
export function* wholeNumbers(seed) {
  const n = 624, state = new Uint32Array(n);
  state[0] = seed;
  for (let i = 1; i < n; i++) {
    const last = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, last) + i;
  }
  while (true) {
    for (let i = 0; i < n; i++) {                       // all 624 at once, each from three others
      const y = (state[i] & 0x80000000) | (state[(i + 1) % n] & 0x7fffffff);
      state[i] = state[(i + 397) % n] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    for (let y of state) {                              // stirred once more on the way out
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      yield (y ^ (y >>> 18)) >>> 0;
    }
  }
}

// Two uniform numbers in 0..1 become two normal ones (Box and Muller 1958)
function boxMuller(block) {                             // 16 numbers, in place: k goes with k + 8
  for (let k = 0; k < 8; k++) {
    const radius = Math.sqrt(-2 * Math.log(1 - block[k]));
    const angle = 2 * Math.PI * block[k + 8];
    block[k] = radius * Math.cos(angle);
    block[k + 8] = radius * Math.sin(angle);
  }
}

// `size` standard normal numbers, at least 16, as torch.randn(size, generator=...) draws them
export function normal(seed, size) {
  if (size < 16) throw new Error(`expected at least 16 numbers, got ${size}: torch draws fewer in another way`);
  const draw = wholeNumbers(seed);
  const uniform = () => (draw.next().value & 0xffffff) / 2 ** 24;   // torch keeps 24 bits of 32
  const out = new Float32Array(size).map(uniform);
  for (let i = 0; i + 16 <= size; i += 16) boxMuller(out.subarray(i, i + 16));
  if (size % 16) {                                      // the last 16 are drawn anew, whole
    const end = out.subarray(size - 16);
    end.set(end.map(uniform));
    boxMuller(end);
  }
  return out;
}
