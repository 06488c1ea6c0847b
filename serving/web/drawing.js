// Drawing: a few streams at a time, and another try when the server says when.

import { ApiError, draw } from "./api.js";

const AT_ONCE = 4; // streams; a server lets a key have some more
const TRIES = 4;

let running = 0;
const waiting = [];

/** Wait for a place among the streams; an aborted signal gives the place in the queue up. */
async function place(signal) {
  signal.throwIfAborted();
  if (running < AT_ONCE) return void running++;
  await new Promise((resolve, reject) => {
    waiting.push(resolve);
    signal.addEventListener("abort", () => {
      const index = waiting.indexOf(resolve);
      if (index >= 0) reject(waiting.splice(index, 1) && signal.reason);
    });
  });
}

/** Hand the place to the next one. */
function leave() {
  const next = waiting.shift();
  if (next) next();
  else running--;
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/**
 * Draw one picture.
 *
 * `view` shows it: `partial(blob, index)` an unfinished one, `wait(error, seconds)` each second until the
 * next try. Gives the finished picture: { image_id, blob, seed, model, size, request }.
 */
export async function drawPicture(request, view, signal) {
  await place(signal);
  try {
    for (let tried = 1; ; tried++) {
      try {
        return await drawOnce(request, view, signal);
      } catch (error) {
        if (!(error instanceof ApiError) || error.retryAfter === null || tried === TRIES) throw error;
        for (let left = Math.max(1, error.retryAfter); left > 0; left--) {
          view.wait(error, left);
          await pause(1000, signal);
        }
        view.wait(null, 0);
      }
    }
  } finally {
    leave();
  }
}

async function drawOnce(request, view, signal) {
  for await (const event of draw(request, signal)) {
    const blob = pngOf(event.b64_json);
    if (event.type.endsWith(".partial_image")) view.partial(blob, event.partial_image_index);
    else return { image_id: event.id, blob, seed: event.seed, model: event.model, size: event.size, request };
  }
}

const pngOf = (base64) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });
