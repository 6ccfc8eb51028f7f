// What a hand does and an eye sees: form, pictures, sentences. The drawing is done in worker.js.
import { settingsOf, textOf } from './files.js';
import { fileName, nextSeed, pythonOf, readSeed, sentence } from './texts.js';
import { Tokenizer, readPrompt } from './tokenizer.js';

const $ = id => document.getElementById(id);
const files = new Set();
let settings, tokenizer, worker, run = 0, wish, good, failed, began = performance.now();

// ---------------------------------------------------------------- sentences

function say(text) { $('status').textContent = text; }

// The last good picture stays
function fail(error) {
  failed = true;
  $('error').textContent = sentence(error.message ?? String(error));
  say(good ? 'The last picture stays.' : 'No picture.');
  if (good) show(good);
}

function whatIsAsked() {
  const seed = readSeed($('seed').value), text = $('prompt').value;
  return { text, seed, ...readPrompt(tokenizer, text) };
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

function keep({ text, seed, images }) {
  Object.assign($('keep'), { href: images.at(-1), download: fileName(text, seed), hidden: false });
  if (!settings.load) return;                                // who wrote the page did not say
  $('python').textContent = pythonOf(settings.load, text, seed);
  $('same').hidden = false;
}

// ---------------------------------------------------------------- drawing

function start() {
  try { wish = { ...whatIsAsked(), images: [], began: performance.now() }; }
  catch (error) { return fail(error); }
  failed = false;
  $('error').textContent = '';
  history.replaceState(null, '', '?' + new URLSearchParams({ prompt: wish.text, seed: wish.seed }));
  say(files.size < settings.networks ? 'Loading the networks.' : 'Drawing.');
  const nothing = tokenizer.padded('').ids;
  worker ??= hired();
  worker.postMessage({ run: ++run, plan: settings.plan, seed: wish.seed,
                       prompt: { ids: wish.ids, weights: wish.weights, nothing } });
}

function another() {
  try { $('seed').value = nextSeed($('seed').value); }
  catch (error) { return fail(error); }                      // what stands there stays
  start();
}

function hired() {
  const one = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  one.onmessage = hear;
  one.onerror = e => dismiss('expected the files worker.js, files.js, networks.js, noise.js, draw.js and ort.js beside this page, ' +
    `got ${e.message ? `“${e.message}”` : 'one that does not load'}. Load this page again; if that does not help, write it anew.`);
  return one;
}

// After an error the next wish starts from nothing: an engine that failed once refuses ever after
function dismiss(why) {
  worker.terminate();
  worker = undefined;
  files.clear();
  fail(new Error(why));
}

function hear({ data }) {
  if (data.file) {
    files.add(data.file);
    return failed || say(`Loading the networks: ${files.size} of ${settings.networks}.`);
  }
  if (data.run != run) return;                               // an older wish
  if (data.error) return dismiss(data.error);
  wish.images.push(address(data.image));
  show(wish);
  if (!data.last) return say(`Step ${data.i + 1} of ${settings.plan.timesteps.length}.`);
  good = wish;
  keep(good);
  const seconds = (performance.now() - wish.began) / 1000;
  say([`${run > 1 ? "Drawn" : "Loaded and drawn"} in ${seconds.toFixed(1)} s.`, ...wish.notes.map(sentence)].join(' '));
  document.body.dataset.drawn = run;
  document.body.dataset.seconds ??= ((performance.now() - began) / 1000).toFixed(2);
}

async function main() {
  settings = await settingsOf('settings.json');
  tokenizer = new Tokenizer(await textOf('merges.txt', '#version'), settings.tokenizer);
  const asked = new URLSearchParams(location.search);
  $('prompt').value = asked.get('prompt') ?? settings.prompt;
  $('seed').value = asked.get('seed') ?? settings.seed;
  $('count').textContent = settings.plan.timesteps.length;
  $('wish').addEventListener('submit', e => { e.preventDefault(); start(); });
  $('other').addEventListener('click', another);
  start();
}

if (!$('error').textContent) main().catch(fail);             // else there is a sentence already
