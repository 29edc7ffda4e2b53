// The server's routes: JSON, server-sent events, and errors with a code.

const KEY = "stet-api-key";

/** What went wrong. `code`: one of docs/api.md, or "unreachable", "broken". `details`: problems with parameters. */
export class ApiError extends Error {
  constructor(code, message, { status = 0, details = [], retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { code, status, details, retryAfter });
  }
}

/** The API key, for as long as this tab is open. "" is none. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", "The server does not answer.");
  }
  if (answer.ok) return answer;
  let told;
  try {
    told = (await answer.json()).error;
  } catch {
    throw new ApiError("internal", `The answer was ${answer.status}.`, { status: answer.status });
  }
  const retryAfter = Number(answer.headers.get("retry-after")) || 0;
  throw new ApiError(told.code, told.message, { status: answer.status, details: told.details, retryAfter });
}

const posted = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** The JSON of a GET. Throws ApiError. */
export const getJson = async (path) => (await ask(path)).json();

/** The text of a GET. Throws ApiError. */
export const getText = async (path) => (await ask(path)).text();

/** The JSON of a POST. Throws ApiError, or AbortError by the signal. */
export const postJson = async (path, body, signal) => (await ask(path, posted(body, signal))).json();

/**
 * Posts a body with "stream": true and calls `onEvent` with each event's JSON. Resolves after [DONE].
 * Throws ApiError: also for an error inside the stream, and for a stream that loses an event or its end.
 */
export async function postStream(path, body, signal, onEvent) {
  const answer = await ask(path, posted(body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = () => new ApiError("broken", "The connection broke.");
  let rest = "";
  for (let expected = 0; ; ) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw broken();
    }
    if (piece.done) throw broken();
    const blocks = (rest + piece.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data === undefined) continue; // a comment: the stream is alive
      if (Number(fields.id) !== expected++) throw broken();
      if (fields.data === "[DONE]") return;
      const event = JSON.parse(fields.data);
      if (event.error) throw new ApiError(event.error.code, event.error.message, event.error);
      onEvent(event);
    }
  }
}

/** The samples of /metrics: "name{labels}" to number. Throws ApiError. */
export async function readMetrics() {
  const samples = {};
  for (const line of (await getText("/metrics")).split("\n")) {
    const space = line.lastIndexOf(" ");
    if (line && line[0] !== "#") samples[line.slice(0, space)] = Number(line.slice(space + 1));
  }
  return samples;
}
