// The server's API: the key, the models, streamed pictures, feedback, and errors in plain words.

const KEY = "diffray-key"; // in sessionStorage: gone with the tab
const ROOT = new URL("../v1/", import.meta.url);

export const apiKey = () => sessionStorage.getItem(KEY);

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export class ApiError extends Error {
  /** What the server refused: an HTTP status (0: not reached), its message, the field, seconds to wait. */
  constructor(status, message, { param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }

  /** A sentence or two for a person. */
  get words() {
    const said = this.message.replace(/^[a-z_]+: /, "");
    const sentence = said.charAt(0).toUpperCase() + said.slice(1) + (/[.!?]$/.test(said) ? "" : ".");
    const opening = OPENINGS[this.code] ?? OPENINGS[this.status] ?? "";
    return [opening, sentence].filter(Boolean).join(" ");
  }
}

const OPENINGS = {
  0: "The server cannot be reached.",
  401: "The server requires an API key.",
  403: "Your API key does not allow this.",
  413: "The request is too large for the server.",
  429: "Too many requests.",
  500: "The server could not draw this.",
  503: "The server is busy.",
  504: "This took too long.",
  content_policy_violation: "The server blocked this picture.",
  image_not_found: "The server no longer knows this picture.",
  model_refused: "This model is not available now.",
};

/** The answer to a request, if the server did not refuse it; `body` is sent as JSON, or as the form that it is. */
async function ask(path, body, signal) {
  // Another letter, as a paste may bring, could not even be sent.
  if (/[^\x21-\x7e]/.test(apiKey() ?? "")) throw new ApiError(401, "this key is unknown");
  const isForm = body instanceof FormData;
  const headers = body && !isForm ? { "Content-Type": "application/json" } : {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const sent = body && !isForm ? JSON.stringify(body) : body;
  const options = { method: body ? "POST" : "GET", headers, body: sent, signal };
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "look whether it runs and whether you are online");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw toldError(answer.status, told, secondsOf(answer.headers.get("Retry-After")));
}

function toldError(status, told, retryAfter = null) {
  const error = told.error ?? {};
  return new ApiError(status, error.message ?? `it answered with the status ${status}`, { ...error, retryAfter });
}

/** Seconds of a Retry-After header, which is a number or a date; null without one. */
export function secondsOf(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}

export const models = async () => (await (await ask("models")).json()).data;

/** The next pair of a study for this key. */
export const nextPair = async (study) => (await ask(`feedback/studies/${encodeURIComponent(study)}`)).json();

export const studyImage = async (study, image) =>
  (await ask(`feedback/studies/${encodeURIComponent(study)}/images/${encodeURIComponent(image)}`)).blob();

export const giveFeedback = (body) => ask("feedback", body);

/** An edit's fields and files. */
function formOf({ images, mask, ...fields }) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  for (const image of images) form.append("image[]", image);
  if (mask) form.append("mask", mask);
  return form;
}

/**
 * The events of one picture: unfinished ones, then the finished one. Aborting the signal frees the server.
 *
 * `request`: the fields; with `images`, files to draw from, an edit, and with `mask` the file of what is painted.
 */
export async function* draw(request, signal) {
  const streamed = { ...request, stream: true, partial_images: 3 };
  const [path, body] = request.images ? ["images/edits", formOf(streamed)] : ["images/generations", streamed];
  const answer = await ask(path, body, signal);
  for await (const { name, data } of serverSentEvents(answer.body)) {
    if (name === "error") throw toldError(500, data);
    yield data;
    if (name.endsWith(".completed")) return;
  }
  throw new ApiError(0, "the connection ended before the picture was finished; try again");
}

/** Events of a body, each with its name and its data from JSON. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = block.split("\n").map((line) => line.split(/: ?(.*)/s));
        const of = (name) => fields.filter((field) => field[0] === name).map((field) => field[1]).join("\n");
        if (of("data")) yield { name: of("event"), data: JSON.parse(of("data")) };
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, "the connection broke off; try again");
  } finally {
    reader.cancel().catch(() => {}); // the connection may be closed already
  }
}
