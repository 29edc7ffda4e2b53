// The form of a text: a JSON schema, a regular expression, a grammar, or a list. One control for the four, since a
// request may have one of them.

import { element } from "./dom.js";

/** What a text may be, by the request's parameter: its name in the list, its label, its meaning, something to begin with. */
export const FORMS = {
  json_schema: {
    choice: "JSON by a schema",
    label: "JSON schema",
    text: "The text is JSON that this schema accepts.",
    begin: `{
  "type": "object",
  "properties": {
    "animal": { "enum": ["fox", "owl", "bear"] },
    "age": { "type": "integer", "minimum": 1, "maximum": 9 },
    "brave": { "type": "boolean" }
  },
  "required": ["animal", "age", "brave"],
  "additionalProperties": false
}`,
  },
  regex: {
    choice: "a match of a regex",
    label: "Regular expression",
    text: "The whole text matches this regular expression.",
    begin: "( [a-z]{2,9}){3,6}\\.",
  },
  grammar: {
    choice: "of a grammar",
    label: "Grammar",
    text: "The whole text is derived from start, by the rules of this grammar in the notation of Lark.",
    begin: 'start: " " animal " who " verb ", and " verb "."\nanimal: "fox" | "owl" | "bear"\nverb: "sang" | "slept" | "ran away"',
  },
  choice: {
    choice: "one of a list",
    label: "Choices",
    text: "The text is one of these, one a line; a space at the begin of a line is part of it.",
    begin: " fox\n owl\n bear",
  },
};

const NONE = "The text may be anything. With a form, only tokens are drawn that can still lead to a text of it.";

/** Whether a request asks for a form. */
export const isFormed = (body) => Object.keys(FORMS).some((kind) => kind in body);

/** What was written, as the request has it. Throws Error with what is wrong, for the person who wrote it. */
export function parseForm(kind, text) {
  if (kind === "choice") return text.split("\n").filter(Boolean);
  if (kind !== "json_schema") return text;
  let schema;
  try {
    schema = JSON.parse(text);
  } catch (error) {
    throw new Error(`The schema is no JSON: ${error.message}.`);
  }
  if (schema === null || typeof schema !== "object" || Array.isArray(schema)) throw new Error("The schema must be an object: {…}.");
  return schema;
}

/** The row of controls.js. Its value: null, or {kind, text, value}, value being what parseForm made of text. */
export function formRow(parameter, row, described, names, changed, wrong) {
  const drafts = Object.fromEntries(Object.entries(FORMS).map(([kind, { begin }]) => [kind, begin]));
  const options = [["", "anything"], ...Object.entries(FORMS).map(([kind, { choice }]) => [kind, choice])];
  const code = names.at(-1);
  const [meaning] = described["aria-describedby"].split(" ");
  const select = element(
    "select", { ...described, change: () => { show(select.value); tell(); } },
    ...options.map(([value, label]) => element("option", { value }, label)),
  );
  const area = element("textarea", {
    id: `${described.id}-text`, "aria-describedby": described["aria-describedby"], rows: "1", spellcheck: "false",
    input: () => { drafts[select.value] = area.value; tell(); },
  });
  row.input = area;
  row.text = NONE;

  function show(kind) {
    select.value = kind;
    area.hidden = !kind;
    area.value = drafts[kind] ?? "";
    area.setAttribute("aria-label", FORMS[kind]?.label ?? "");
    code.replaceChildren(kind);
    document.getElementById(meaning)?.replaceChildren(FORMS[kind]?.text ?? NONE);
  }
  function tell() {
    const kind = select.value;
    if (!kind) return changed(null);
    try {
      changed({ kind, text: area.value, value: parseForm(kind, area.value) });
    } catch (error) {
      wrong(error.message);
    }
  }
  row.set = (value) => {
    if (value) drafts[value.kind] = value.text;
    show(value?.kind ?? "");
  };
  return [element("div", { class: "head" }, element("label", { for: described.id }, ...names)), select, area];
}
