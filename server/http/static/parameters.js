// The sampling parameters: their ranges, their meaning in a sentence, and the presets.

// off: the value at which a parameter does nothing. slider: [first, last, step], within the allowed range.
const number = (name, label, off, range, slider, text) => ({ kind: "number", name, label, off, range, slider, text });
const flag = (name, label, text) => ({ kind: "flag", name, label, text });
const list = (name, label, form, hint, text) => ({ kind: "list", name, label, form, hint, text });
// What the text must be: null, or {kind, text, value} as forms.js has it.
const form = (name, label) => ({ kind: "form", name, label, text: "" });

export const GROUPS = [
  {
    title: "Chance",
    open: true,
    parameters: [
      number("temperature", "Temperature", 1, [0, 2], [0, 2, 0.05],
        "Below 1 the favourites win more often, above 1 the unlikely get a chance; at 0 the most likely always wins."),
      number("top_k", "Top-k", 0, [-1, null], [0, 100, 1],
        "Only the k most likely tokens may be drawn; 0 is off."),
      number("top_p", "Top-p", 1, [0, 1], [0.01, 1, 0.01],
        "Only the most likely tokens that together have this share may be drawn; 1 is off."),
      number("min_p", "Min-p", 0, [0, 1], [0, 0.5, 0.01],
        "Only tokens at least this fraction as likely as the favourite may be drawn; 0 is off."),
      number("typical_p", "Typical-p", 1, [0, 1], [0.01, 1, 0.01],
        "Keeps the tokens about as surprising as the model expects, up to this share; 1 is off."),
    ],
  },
  {
    title: "Repetition",
    parameters: [
      number("repetition_penalty", "Repetition penalty", 1, [0, 10], [0.5, 2, 0.05],
        "Above 1, whatever occurs in the prompt or the text becomes less likely; 1 is off."),
      number("presence_penalty", "Presence penalty", 0, [-2, 2], [-2, 2, 0.1],
        "Taken once from every token that the text already has; 0 is off."),
      number("frequency_penalty", "Frequency penalty", 0, [-2, 2], [-2, 2, 0.1],
        "Taken from a token for each time that the text has it; 0 is off."),
    ],
  },
  {
    title: "Length and end",
    parameters: [
      number("max_new_tokens", "Most tokens", null, [1, null], [1, 512, 1],
        "The text is cut off after so many tokens; empty is the server's default."),
      number("min_new_tokens", "Fewest tokens", 0, [0, null], [0, 256, 1],
        "Until there are so many, the text cannot end; 0 is off."),
      list("stop", "Stop strings", "texts", "one a line; \\n is a line break",
        "The text ends before the first of these."),
      flag("include_stop", "Keep the stop string", "The stop string stays at the end of the text."),
      list("stop_token_ids", "Stop tokens", "ids", "ids, such as 17 42", "The text ends at one of these tokens."),
      flag("ignore_eos", "Ignore the model's end", "The text goes on where the model would end it."),
      number("n", "Choices", 1, [1, 8], [1, 8, 1],
        "So many texts of the same prompt, each drawn for itself."),
    ],
  },
  { title: "Form of the text", parameters: [form("form", "The text is")] },
  {
    title: "Single tokens",
    parameters: [
      list("bad_words", "Bad words", "texts", "one a line", "These are never drawn, at the begin or after a space."),
      list("logit_bias", "Logit bias", "biases", "id: number, such as 17: -5", "Makes a token more or less likely; −100 forbids it."),
      list("allowed_token_ids", "Allowed tokens", "ids", "ids, such as 17 42", "No other token is drawn; empty allows all."),
    ],
  },
];

export const PARAMETERS = GROUPS.flatMap((group) => group.parameters);

/** Every parameter at the value at which it does nothing. */
export const neutral = () => Object.fromEntries(
  PARAMETERS.map(({ kind, name, off }) => [name, { number: off, flag: false, list: [], form: null }[kind]]),
);

const CHANCE = ["temperature", "top_k", "top_p", "min_p", "typical_p"];
const PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty"];

/** What a preset says of chance and repetition; length and single tokens stay as they are. */
export const PRESETS = {
  greedy: ["Greedy", "The most likely token, always: for facts and tests.", { temperature: 0 }],
  balanced: ["Balanced", "Some chance, without the long tail: for text that reads well.", { temperature: 0.8, top_p: 0.95 }],
  creative: ["Creative", "Much chance, held in by min-p: for many different ideas.", { temperature: 1.2, min_p: 0.08 }],
  plain: ["Plain", "The model's own probabilities, as they are.", {}],
};

/** Settings with a preset applied. */
export function withPreset(settings, name) {
  const off = neutral();
  const base = Object.fromEntries([...CHANCE, ...PENALTIES].map((key) => [key, off[key]]));
  return { ...settings, ...base, ...PRESETS[name][2] };
}

/** The preset that settings agree with; null if none does. */
export function presetOf(settings) {
  const same = (name) => [...CHANCE, ...PENALTIES].every((key) => withPreset(settings, name)[key] === settings[key]);
  return Object.keys(PRESETS).find(same) ?? null;
}

// The model may have defaults of its own for these, so that "off" has to be said.
const ALWAYS_SENT = new Set(["temperature", "top_k", "top_p", "typical_p", "repetition_penalty"]);

/** The parameters of settings as the server takes them: what does nothing is left out. */
export function toRequest(settings) {
  const body = {};
  for (const { kind, name, off, form } of PARAMETERS) {
    const value = settings[name];
    if (kind === "number" && value !== null && (value !== off || ALWAYS_SENT.has(name))) body[name] = value;
    if (kind === "flag" && value) body[name] = true;
    if (kind === "form" && value) body[value.kind] = value.value;
    if (kind === "list" && value.length) body[name] = form === "biases" ? Object.fromEntries(value) : value;
  }
  return body;
}

/** What a list's text says. Throws Error with what is wrong, for the person who wrote it. */
export function parseList(form, text) {
  if (form === "texts") return text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  const words = text.split(form === "ids" ? /[\s,;]+/ : /[\n,;]+/).map((word) => word.trim()).filter(Boolean);
  return words.map((word) => {
    const match = /^(\d+)(?:\s*[:=]\s*([-−+]?\d+(?:\.\d+)?))?$/.exec(word);
    if (!match || (form === "biases") !== (match[2] !== undefined)) {
      throw new Error(form === "ids" ? `“${word}” is no token id.` : `“${word}” is not of the form id: number.`);
    }
    return form === "ids" ? Number(match[1]) : [match[1], Number(match[2].replace("−", "-"))];
  });
}

/** How settings differ from others, in short: "temperature 1.2 · min_p 0.08". */
export function differences(settings, others) {
  const differing = PARAMETERS.filter(({ name }) => JSON.stringify(settings[name]) !== JSON.stringify(others[name]));
  const shown = ({ kind, name }) => {
    const value = settings[name];
    if (kind === "form") return value ? value.kind : "no form";
    return `${name} ${Array.isArray(value) ? (value.length ? value.join(" ") : "none") : String(value ?? "default")}`;
  };
  return differing.map(shown).join(" · ");
}
