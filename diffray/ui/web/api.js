// The server's answers, and its refusals in words that belong to an input of the form.

export class ApiError extends Error {
  /** What was refused: an HTTP status (0: not reached), the message, the input that it is about. */
  constructor(status, message, field = null) {
    super(message);
    Object.assign(this, { status, field });
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ApiError(0, "The page's server is not reached. Runs go on; start it again with: diffray ui");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const error = new ApiError(answer.status, told.detail ?? `The server answered with the status ${answer.status}`, told.field);
  if (answer.status === 401) dispatchEvent(new CustomEvent("key-needed", { detail: error.message }));
  throw error;
}

const JSON_HEADERS = { "Content-Type": "application/json" };

export const get = async (path) => (await ask(path)).json();

export const send = (method, path, body = {}) =>
  ask(path, { method, headers: JSON_HEADERS, body: JSON.stringify(body) });

export const post = async (path, body) => (await send("POST", path, body)).json();

export const upload = (folder, file) =>
  ask(`uploads?${new URLSearchParams({ folder, name: file.name })}`, {
    method: "PUT",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
  });

export const runPath = (name, rest = "") => `runs/${encodeURIComponent(name)}${rest}`;
