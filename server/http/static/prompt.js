// What is asked: a text to go on with, a chat, or a question after no, one or more examples.

import { element, segmented } from "./dom.js";

const MODES = [["prompt", "Prompt"], ["chat", "Chat"], ["examples", "Examples"]];
const SHOTS = [["zero", "Zero-shot"], ["one", "One-shot"], ["few", "Few-shot"]];
const ROLES = ["system", "user", "assistant"];

const START = {
  prompt: "Once upon a time there was a",
  chat: [{ role: "user", content: "Tell me a story about a fox who lost her kite." }],
  examples: {
    shots: "few",
    turns: false,
    instruction: "",
    labels: ["Q", "A"],
    pairs: [
      ["Translate into Lumi: the red fox", "la roto vika"],
      ["Translate into Lumi: the bear sleeps", "la bruma somna"],
      ["Translate into Lumi: my little boat", "mi eti navi"],
    ],
    question: "Translate into Lumi: the happy owl sings",
  },
};

/** The examples that are used: none, the first, or all that have both sides. */
function used({ shots, pairs }) {
  const whole = pairs.filter(([question, answer]) => question.trim() && answer.trim());
  return shots === "zero" ? [] : shots === "one" ? whole.slice(0, 1) : whole;
}

/** The text of a prompt from examples: label, question, label, answer, and so on up to the answer that is wanted. */
export function examplesText(examples) {
  const [ask, tell] = examples.labels;
  const shown = used(examples).map(([question, answer]) => `${ask}: ${question}\n${tell}: ${answer}`);
  const parts = [examples.instruction.trim(), ...shown, `${ask}: ${examples.question}\n${tell}:`];
  return parts.filter(Boolean).join("\n\n");
}

function examplesMessages(examples) {
  const system = examples.instruction.trim();
  const turns = used(examples).flatMap(([question, answer]) => [
    { role: "user", content: question },
    { role: "assistant", content: answer },
  ]);
  const first = system ? [{ role: "system", content: system }] : [];
  return [...first, ...turns, { role: "user", content: examples.question }];
}

const textarea = (value, label, rows, onInput) => {
  const made = element("textarea", { rows, dir: "auto", "aria-label": label, placeholder: label, input: () => onInput(made.value) });
  made.value = value;
  return made;
};

/** The editor of the prompt, in `root`. onChange() follows every change. */
export class PromptEditor {
  constructor(root, onChange) {
    Object.assign(this, { root, onChange, mode: "prompt", hasTemplate: true }, structuredClone(START));
    this.tabs = element("div", { class: "tabs" });
    this.area = element("div", { class: "editor" });
    root.append(this.tabs, this.area);
    this.draw();
  }

  /** Whether the model has a chat template, without which there is no chat. */
  setTemplate(hasTemplate) {
    if (hasTemplate === this.hasTemplate) return;
    this.hasTemplate = hasTemplate;
    this.draw();
  }

  /** The parameters of the request that say what is asked, and the stop strings that go with it. */
  request() {
    if (this.mode === "prompt") return [{ prompt: this.prompt }, []];
    if (this.mode === "chat") return [{ messages: this.chat.map(({ role, content }) => ({ role, content })) }, []];
    if (this.examples.turns && this.hasTemplate) return [{ messages: examplesMessages(this.examples) }, []];
    // A model that goes on would ask itself the next question.
    return [{ prompt: examplesText(this.examples) }, [`\n${this.examples.labels[0]}:`]];
  }

  /** The text that a generated one goes on from; "" where it does not. */
  lead() {
    return this.mode === "prompt" ? this.prompt : "";
  }

  /** Adds an answer to the chat, and room for what comes next. */
  addAnswer(text) {
    this.chat.push({ role: "assistant", content: text }, { role: "user", content: "" });
    this.draw();
    this.area.querySelector(".message:last-of-type textarea").focus();
    this.onChange();
  }

  changed(redraw = false) {
    if (redraw) this.draw();
    this.onChange();
  }

  draw() {
    const choose = (mode) => {
      this.mode = mode;
      this.changed(true);
      this.tabs.querySelector("input:checked").focus();
    };
    this.tabs.replaceChildren(segmented("mode", "What is asked", MODES, this.mode, choose));
    this.area.replaceChildren(...{ prompt: () => this.drawPrompt(), chat: () => this.drawChat(), examples: () => this.drawExamples() }[this.mode]());
  }

  drawPrompt() {
    const change = (value) => ((this.prompt = value), this.changed());
    return [textarea(this.prompt, "Prompt: a text to go on with", 3, change)];
  }

  drawChat() {
    if (!this.hasTemplate) return [element("p", { class: "note" }, "This model has no chat template: use Prompt or Examples.")];
    const rows = this.chat.map((message, place) => {
      const role = element(
        "select",
        { "aria-label": `Role of message ${place + 1}`, change: () => ((message.role = role.value), this.changed()) },
        ...ROLES.map((name) => element("option", { value: name }, name)),
      );
      role.value = message.role;
      const text = textarea(message.content, `Message ${place + 1}`, 2, (value) => ((message.content = value), this.changed()));
      const remove = removeButton(`Remove message ${place + 1}`, this.chat.length > 1, () => (this.chat.splice(place, 1), this.changed(true)));
      return element("div", { class: "message" }, role, text, remove);
    });
    const add = () => {
      this.chat.push({ role: this.chat.at(-1)?.role === "user" ? "assistant" : "user", content: "" });
      this.changed(true);
      this.area.querySelector(".message:last-of-type textarea").focus();
    };
    return [...rows, element("button", { type: "button", class: "quiet", click: add }, "Add a message")];
  }

  drawExamples() {
    const { examples } = this;
    const change = (set) => (value) => (set(value), preview.replaceChildren(this.previewText()), this.changed());
    const preview = element("pre", { tabindex: "0", "aria-label": "The prompt that is made" }, this.previewText());
    const pairs = examples.pairs.map((pair, place) =>
      element(
        "div",
        { class: `pair ${used(examples).includes(pair) ? "" : "unused"}` },
        textarea(pair[0], `Question of example ${place + 1}`, 1, change((value) => (pair[0] = value))),
        textarea(pair[1], `Answer of example ${place + 1}`, 1, change((value) => (pair[1] = value))),
        removeButton(`Remove example ${place + 1}`, true, () => (examples.pairs.splice(place, 1), this.changed(true))),
      ),
    );
    const add = () => {
      examples.pairs.push(["", ""]);
      this.changed(true);
      [...this.area.querySelectorAll(".pair textarea")].at(-2).focus();
    };
    const shots = (value) => {
      examples.shots = value;
      this.changed(true);
      this.area.querySelector("input[name=shots]:checked").focus();
    };
    const label = (place, words) => {
      const input = element("input", { "aria-label": words, class: "short", maxlength: "24", input: () => change((value) => (examples.labels[place] = value))(input.value) });
      input.value = examples.labels[place];
      return input;
    };
    const turns = element("input", { type: "checkbox", change: () => ((examples.turns = turns.checked), this.changed(true)) });
    turns.checked = examples.turns && this.hasTemplate;
    turns.disabled = !this.hasTemplate;
    return [
      element("div", { class: "row" }, segmented("shots", "How many examples", SHOTS, examples.shots, shots),
        element("span", { class: "note" }, { zero: "no example", one: "the first example", few: "all examples" }[examples.shots])),
      textarea(examples.instruction, "Instruction, if any", 1, change((value) => (examples.instruction = value))),
      element("div", { class: "pair heads" }, label(0, "Label of questions"), label(1, "Label of answers"), element("span")),
      ...pairs,
      element("div", { class: "pair asked" }, textarea(examples.question, "The question", 1, change((value) => (examples.question = value))),
        element("span", { class: "note" }, "whose answer is wanted"), element("span")),
      element("div", { class: "row" }, element("button", { type: "button", class: "quiet", click: add }, "Add an example"),
        element("label", { class: "check" }, turns, "as turns of a chat")),
      element("details", { class: "preview" }, element("summary", {}, "The prompt that is made"), preview),
    ];
  }

  previewText() {
    const { examples } = this;
    if (!(examples.turns && this.hasTemplate)) return examplesText(examples);
    return examplesMessages(examples).map(({ role, content }) => `${role}: ${content}`).join("\n");
  }
}

function removeButton(label, possible, action) {
  return element("button", { type: "button", class: "remove", "aria-label": label, title: label, disabled: !possible, click: action }, "×");
}
