// Draws beside the page, so that the page never freezes: a wish comes in as a message, pictures go out as messages.
import { draw } from './draw.js';
import { loadNetworks } from './networks.js';

let networks, newest;
const pause = () => new Promise(go => setTimeout(go));      // lets a newer wish come in

self.onmessage = async ({ data: { run, plan, prompt, seed } }) => {
  newest = run;
  try {
    networks ??= loadNetworks(plan, file => postMessage({ file }));
    const nets = await networks;
    for await (const step of draw(nets, plan, prompt, seed)) {
      if (run != newest) return;
      postMessage({ run, i: step.i, last: step.last, image: step.image });
      await pause();
    }
  } catch (error) {
    postMessage({ run, error: error.message });
  }
};
