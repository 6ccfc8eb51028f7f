// What a hand does and an eye sees: form, pictures, sentences. The drawing is done in worker.js.
import { Tokenizer, readPrompt } from './tokenizer.js';

const $ = id => document.getElementById(id);
const files = new Set();
let settings, tokenizer, worker, run = 0, wish, good, began = performance.now();

async function answer(name) {
  const got = await fetch(name);
  if (!got.ok)
    throw new Error(`expected the file ${name} beside this page, got “${got.status} ${got.statusText}”. ` +
                    'Write the page anew.');
  return got;
}

// ---------------------------------------------------------------- sentences

function say(text) { $('status').textContent = text; }

// The last good picture stays
function fail(error) {
  const text = error.message ?? String(error);
  $('error').textContent = text[0].toUpperCase() + text.slice(1);
  say(good ? 'The last picture stays.' : 'No picture.');
  if (good) show(good);
}

function whatIsAsked() {
  const seed = $('seed').value.trim();
  if (!/^\d+$/.test(seed) || Number(seed) >= 2 ** 32)
    throw new Error(`expected a seed from 0 to ${2 ** 32 - 1}, got “${seed}”: a whole number`);
  const text = $('prompt').value;
  return { text, seed: Number(seed), ...readPrompt(tokenizer, text) };
}

// ---------------------------------------------------------------- pictures

function address(image) {                                    // bytes of pixels -> a picture as an address
  const side = Math.sqrt(image.length / 4), canvas = document.createElement('canvas');
  canvas.width = canvas.height = side;
  canvas.getContext('2d').putImageData(new ImageData(image, side), 0, 0);
  return canvas.toDataURL();
}

// A picture and its steps: { text, seed, images: one address for each step }
function show({ text, seed, images }) {
  const n = settings.plan.timesteps.length, said = text.trim() || 'No prompt';
  Object.assign($('picture'), { src: images.at(-1), alt: said, hidden: false });
  $('caption').textContent = `${said}, seed ${seed}`;
  $('steps').replaceChildren(...settings.plan.timesteps.map((_, i) => {
    const item = document.createElement('li');
    if (images[i]) item.append(Object.assign(new Image(128, 128), { src: images[i], alt: `${said}: step ${i + 1} of ${n}` }));
    item.append(`step ${i + 1}, noise ${settings.plan.sigmas[i].toFixed(1)}`);
    return item;
  }));
}

function keep() {
  const name = good.text.trim().toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60) || 'picture';
  Object.assign($('keep'), { href: good.images.at(-1), download: `${name}-${good.seed}.png`, hidden: false });
  $('python').textContent = `txt2img(sd, ${JSON.stringify(good.text)}, seed=${good.seed})`;
}

// ---------------------------------------------------------------- drawing

function start() {
  try { wish = { ...whatIsAsked(), images: [], began: performance.now() }; }
  catch (error) { return fail(error); }
  $('error').textContent = '';
  history.replaceState(null, '', '?' + new URLSearchParams({ prompt: wish.text, seed: wish.seed }));
  say(files.size < settings.networks ? 'Loading the networks.' : 'Drawing.');
  const nothing = tokenizer.padded('').ids;
  worker.postMessage({ run: ++run, plan: settings.plan, seed: wish.seed,
                       prompt: { ids: wish.ids, weights: wish.weights, nothing } });
}

function hear({ data }) {
  if (data.file) {
    files.add(data.file);
    return say(`Loading the networks: ${files.size} of ${settings.networks}.`);
  }
  if (data.run != run) return;                               // an older wish
  if (data.error) return fail(new Error(data.error));
  wish.images.push(address(data.image));
  show(wish);
  if (!data.last) return say(`Step ${data.i + 1} of ${settings.plan.timesteps.length}.`);
  good = wish;
  keep();
  const seconds = (performance.now() - wish.began) / 1000;
  say([`${run > 1 ? "Drawn" : "Loaded and drawn"} in ${seconds.toFixed(1)} s.`, ...wish.notes].join(' '));
  document.body.dataset.drawn = run;
  document.body.dataset.seconds ??= ((performance.now() - began) / 1000).toFixed(2);
}

async function main() {
  settings = await (await answer('settings.json')).json();
  tokenizer = new Tokenizer(await (await answer('merges.txt')).text(), settings.tokenizer);
  worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = hear;
  worker.onerror = e => fail(new Error(e.message ||
    'expected the files worker.js, networks.js and ort.js beside this page, got one that does not load. Write the page anew.'));
  const asked = new URLSearchParams(location.search);
  $('prompt').value = asked.get('prompt') ?? settings.prompt;
  $('seed').value = asked.get('seed') ?? settings.seed;
  $('count').textContent = settings.plan.timesteps.length;
  $('wish').addEventListener('submit', e => { e.preventDefault(); start(); });
  $('other').addEventListener('click', () => {
    $('seed').value = (Number($('seed').value) + 1 || 0) % 2 ** 32;
    start();
  });
  start();
}

if (!$('error').textContent) main().catch(fail);             // else there is a sentence already
