// How numbers, tokens and endings are written for a person.

const whole = new Intl.NumberFormat("en");

/** 12345 as "12,345". */
export const count = (value) => whole.format(value);

/** "1 token", "2 tokens". */
export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

/** A probability in percent, always short: "31.2 %", "< 0.1 %", "0 %". */
export function percent(value) {
  if (value === 0 || value === 1) return `${value * 100} %`;
  if (value < 0.0005) return "< 0.1 %";
  if (value > 0.9995 && value < 1) return "> 99.9 %";
  return `${(value * 100).toFixed(1)} %`;
}

/** Milliseconds: "0.4 ms", "12 ms", "1.25 s". */
export function duration(milliseconds) {
  if (milliseconds < 9.95) return `${milliseconds.toFixed(1)} ms`;
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

/** Bytes: "7.5 MiB". */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };

/** A token's text with its blanks made visible. */
export function visible(text) {
  if (text === "") return "∅";
  const marked = text.replace(/^ +| +$|[\n\t\r]/g, (blank) => [...blank].map((sign) => SIGNS[sign]).join(""));
  return marked.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g, (sign) => {
    return `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`;
  });
}

/** A token's text to be read aloud. */
export function spoken(text) {
  if (text === "") return "empty token";
  if (/^ +$/.test(text)) return "space";
  if (/^\s+$/.test(text)) return "line break";
  return text.trim();
}

/** Why an output ended. formed: whether a form said what it may be, and so where it may end. */
export function ending(reason, stopReason, formed = false) {
  if (reason === "length") return "max_new_tokens reached";
  if (reason === "stop") {
    if (typeof stopReason === "string") return `stopped before “${visible(stopReason)}”`;
    return formed ? "complete in its form" : "the model ended it";
  }
  const words = {
    cancelled: "cut off: the server is stopping",
    deadline: "cut off: its time was up",
    left: "stopped by you",
    error: "broken off",
  };
  return words[reason] ?? reason;
}

/** What an error means and what to do: [title, advice]. */
export function explainError(error) {
  const wait = error.retryAfter ? `about ${plural(error.retryAfter, "second")}` : "a moment";
  const known = {
    unreachable: [
      "The server does not answer",
      "Is “stet serve” still running, and can this machine reach it? The dot at the top turns green once it answers again.",
    ],
    broken: [
      "The connection broke in the middle of the text",
      "What had arrived is shown. Press Generate to ask again: the same seed gives the same text.",
    ],
    unauthorized: ["This server asks for an API key", "Enter one that is in force; it stays in this tab only."],
    forbidden: ["This API key may not do that", error.message],
    queue_full: ["All places are taken", `Other requests are running and waiting. Try again in ${wait}.`],
    rate_limited: ["A limit of this API key is used up", `There is something again in ${wait}.`],
    context_length_exceeded: [
      "The prompt is too long",
      `${error.message} Shorten the prompt, or lower max_new_tokens.`,
    ],
    too_large: ["The prompt is too long to be sent", error.message],
    unsupported_grammar: ["This form of text is not supported", error.message],
    loading: ["The model is still loading", `Try again in ${wait}.`],
    draining: ["The server is stopping", "It takes no new requests; running ones may finish."],
    engine_restarting: ["The engine is restarting after a crash", `Try again in ${wait}.`],
    deadline: ["It took too long", error.message],
    internal: ["Something is wrong in the server", error.message],
    invalid_request: ["The server refused the request", error.message],
  };
  return known[error.code] ?? ["The server refused the request", error.message];
}

const FILTERS = {
  temperature: "temperature 0",
  weight: "too unlikely",
  allowed_token_ids: "not allowed",
  grammar: "not in the form",
  bad_words: "bad_words",
  min_new_tokens: "too early to end",
};

/** What removed a token, in the words of the controls. */
export const filterName = (name) => FILTERS[name] ?? name;
