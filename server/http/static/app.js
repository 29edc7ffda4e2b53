// Puts the page together: who is told what when something changes.

import { apiKey } from "./api.js";
import { CodeDialog } from "./code.js";
import { Controls } from "./controls.js";
import { byId, element, segmented } from "./dom.js";
import { ASKED, Inspector, tailOf, tokenBox } from "./inspector.js";
import { NextToken } from "./next.js";
import { OutputView } from "./output.js";
import { followRuns, runFigures, showServer } from "./panel.js";
import { PRESETS, differences, neutral, presetOf, toRequest, withPreset } from "./parameters.js";
import { PromptEditor } from "./prompt.js";
import { startRun } from "./run.js";
import { Server } from "./server.js";
import { count, explainError, percent, plural, spoken } from "./words.js";

const NAMES = ["A", "B"];
const first = { ...withPreset(neutral(), "balanced"), max_new_tokens: 120 };
const settings = { A: first, B: null };
let editing = "A";
let comparing = false;
let runs = [];
let opened = null;

// --- the request --------------------------------------------------------------------------------------------------

const seedField = byId("seed");
const vocabulary = () => server.info?.vocabulary ?? 0;
const seed = () => (seedField.value === "" ? undefined : Number(seedField.value));

/** The body of a request with one of the settings, as it is sent and copied. */
function bodyOf(name) {
  const [asked, stops] = prompt.request();
  const body = { ...asked, ...toRequest(settings[name]) };
  // A text of a form ends by itself, and only there.
  if (stops.length && !body.ignore_eos && !settings[name].form) body.stop = [...new Set([...(body.stop ?? []), ...stops])];
  if (seed() !== undefined) body.seed = seed();
  return body;
}

const drawSeed = () => (seedField.value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000);

// --- the next token -----------------------------------------------------------------------------------------------

const inspector = new Inspector(byId("inspector"));
const next = new NextToken(
  (drawing) => {
    if (opened) return;
    const drawn = byId("keep").checked && drawing.source === "server";
    if (drawn) inspector.show(drawing);
    else {
      // Nothing is drawn yet, so that no token is shown for having been.
      const candidates = drawing.candidates.slice(0, ASKED);
      const tail = drawing.source === "server" ? tailOf(candidates) : drawing.tail;
      inspector.show({ ...drawing, candidates, tail, id: undefined, r: undefined });
    }
    const words = [`What would follow the prompt${comparing ? ` with settings ${editing}` : ""}, before anything is generated. `];
    if (!drawing.exact) words.push(element("span", { class: "estimate" }, "An estimate while the server is asked."));
    else if (drawn) words.push("With seed ", element("strong", {}, String(seed())), " it would be ", tokenBox(drawing.candidates.find(({ id }) => id === drawing.id).text), ".");
    byId("draw-words").replaceChildren(...words);
    byId("draw").dataset.source = drawing.source;
    if (drawing.source === "server") showLength(`${count(drawing.promptTokens)} of ${plural(server.info.context_length, "token")}`);
  },
  (error) => {
    if (opened) return;
    inspector.show(null);
    const [title, advice] = explainError(error);
    const marked = error.details.length > 0 && tellControls(error).length === error.details.length;
    const tooLong = error.code === "context_length_exceeded";
    if (tooLong) showLength(element("span", { class: "problem" }, `more than ${plural(server.info.context_length, "token")}`));
    const words = tooLong ? `${title}: nothing can follow it.` : marked ? "These settings cannot be used: what is wrong is said at the control that is marked." : `${title}. ${advice}`;
    byId("draw-words").replaceChildren(element("span", { class: "problem" }, words));
    byId("draw").dataset.source = "nobody";
  },
  () => (byId("draw").dataset.source = "asked"),
);

/** Says how long the prompt is; empty where that is not known. */
const showLength = (words) => byId("length").replaceChildren(words);

/** Asks for the next token anew, if that is what is shown. */
function followNext() {
  if (opened || !server.info) return;
  next.follow(bodyOf(editing), settings[editing], vocabulary());
}

/** Opens one token of a text; null goes back to the next token. */
function openToken(token) {
  opened = token;
  for (const view of Object.values(views)) view.mark(view.choices.includes(token?.choice) ? token : null);
  byId("steps").hidden = !token;
  byId("draw-title").replaceChildren(token ? `Token ${count(token.position + 1)} of ${count(token.choice.tokens.length)}` : "Next token");
  if (!token) return followNext();
  next.pause();
  byId("draw").dataset.source = "token";
  const { choice, explained, position } = token;
  byId("step-back").disabled = position === 0;
  byId("step-on").disabled = position === choice.tokens.length - 1;
  const place = choice.view.several ? ` in ${choice.view === views.A ? "A" : "B"}` : "";
  const words = [tokenBox(token.text), `${place}: the model gave it ${percent(token.probability)}`];
  if (explained) {
    const own = explained.candidates.find(({ id }) => id === token.id);
    words.push(`, the settings made that ${percent(own.final_probability)}.`);
    inspector.show({ ...explained, tail: tailOf(explained.candidates), exact: true, vocabulary: vocabulary() });
  } else {
    words.push(". What the settings made of that was not explained.");
    const top = token.alternatives.map(({ id, text, logprob }) => ({ id, text, probability: Math.exp(logprob) }));
    inspector.show(top.length ? { candidates: top, id: token.id, vocabulary: vocabulary() } : null);
  }
  byId("draw-words").replaceChildren(...words);
  announce(`Token ${count(position + 1)}, ${spoken(token.text)}${words.slice(1).join("")}`);
  // Where it stands below the text, it comes into view; the text stays where it is otherwise.
  if (byId("draw").getBoundingClientRect().top > innerHeight * 0.8) byId("draw").scrollIntoView({ block: "center" });
}

function stepToken(by) {
  const token = opened.choice.tokens[opened.position + by];
  if (token) openToken(token);
}

// --- generating ---------------------------------------------------------------------------------------------------

const views = Object.fromEntries(
  NAMES.map((name) => [name, new OutputView(byId(`output-${name.toLowerCase()}`), openToken, announce)]),
);

function announce(text) {
  const announcer = byId("announcer");
  announcer.append(element("p", {}, text));
  while (announcer.children.length > 8) announcer.firstChild.remove();
}

async function generate() {
  if (runs.length || !controls.readable()) return;
  showError(null);
  if (!byId("keep").checked || seed() === undefined) drawSeed();
  openToken(null);
  const names = comparing ? NAMES : ["A"];
  const lead = prompt.lead();
  for (const name of NAMES) {
    const pane = byId(`pane-${name.toLowerCase()}`);
    pane.hidden = !names.includes(name);
    pane.querySelector("h3").hidden = !comparing;
    pane.querySelector(".lead").replaceChildren(lead.length > 240 ? `…${lead.slice(-240)}` : lead);
  }
  byId("empty").hidden = true;
  byId("parting").hidden = byId("continue").hidden = true;
  nameDifferences();
  for (const view of Object.values(views)) view.several = comparing;
  const watched = byId("explain").checked ? { explain: ASKED } : { logprobs: ASKED };
  runs = names.map((name) => startRun({ ...bodyOf(name), ...watched }, views[name]));
  setRunning(true);
  const followed = followRuns(byId("runs"), runs);
  // What fails is told at once, and not when the other text has ended; the first to fail is the one to be told of.
  runs.forEach((run, i) => run.finished.then(({ error }) => error && !told && showFailure(names[i], error)));
  const outcomes = await Promise.all(runs.map((run) => run.finished));
  followed();
  runs = [];
  setRunning(false);
  byId("runs").replaceChildren(...outcomes.map((outcome, i) => runFigures(comparing ? names[i] : null, outcome)));
  const failed = outcomes.find((outcome) => outcome.error);
  if (failed) {
    names.forEach((name) => (byId(`pane-${name.toLowerCase()}`).hidden = !views[name].choices[0].text));
    byId("empty").hidden = names.some((name) => views[name].choices[0].text);
  }
  if (comparing && !failed) showParting();
  byId("continue").hidden = prompt.mode !== "chat" || Boolean(failed) || !views.A.choices[0].text;
  showServer(byId("server"));
}

/** What is wrong with settings is said at their controls, which have to be there for that. */
function showFailure(name, error) {
  if (name !== editing && error.details.length) {
    edit(name);
    showWhich();
  }
  showError(error);
}

function setRunning(running) {
  const [from, to] = running ? [byId("generate"), byId("stop")] : [byId("stop"), byId("generate")];
  // A disabled button loses the focus, which would be nowhere then.
  const focused = document.activeElement === from;
  to.disabled = false;
  if (focused) to.focus();
  from.disabled = true;
}

const stop = () => runs.forEach((run) => run.stop());

function showParting() {
  const { same, equal } = OutputView.compare(views.A, views.B);
  const words = equal ? "Both texts are the same, token for token." : `Both texts begin with the same ${same === 1 ? "token" : plural(same, "token")}; then they part.`;
  byId("parting").hidden = false;
  byId("parting").replaceChildren(same || equal ? words : "The texts part with the first token.");
}

// --- errors -------------------------------------------------------------------------------------------------------

let told = null;

/** Says what is wrong at the controls that it is wrong with, and returns these problems. */
const tellControls = (error) =>
  error.details.filter(({ param, message }) => controls.setProblem(param?.split(/[.[]/)[0], message));

function showError(error) {
  told = error;
  const box = byId("error");
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  const [title, advice] = explainError(error);
  const named = tellControls(error);
  const others = error.details.filter((detail) => !named.includes(detail) && detail.message !== error.message);
  const list = others.length ? element("ul", {}, ...others.map(({ message }) => element("li", {}, message))) : null;
  const retry = element("button", { type: "button", click: generate }, "Try again");
  const hide = element("button", { type: "button", class: "quiet", click: () => showError(null) }, "Dismiss");
  box.replaceChildren(element("div", {}, element("strong", {}, title), element("p", {}, advice), ...[list].filter(Boolean)), retry, hide);
  if (error.code === "unauthorized") server.askForKey();
  if (error.code === "unreachable" || error.code === "broken") server.check();
}

// --- the server ---------------------------------------------------------------------------------------------------

const server = new Server({
  onInfo: (info) => {
    if (["unauthorized", "unreachable"].includes(told?.code)) showError(null);
    prompt.setTemplate(info.chat_template);
    followNext();
  },
  onLocked: (error) => {
    inspector.show(null);
    byId("draw-words").replaceChildren("Enter an API key to see what would follow the prompt.");
    if (apiKey.get()) showError(error);
  },
  onError: showError,
});

// --- settings -----------------------------------------------------------------------------------------------------

const controls = new Controls(byId("controls"), () => {
  showPreset();
  nameDifferences();
  followNext();
});

const presetButtons = Object.entries(PRESETS).map(([name, [label]]) => {
  const choose = () => {
    Object.assign(settings[editing], withPreset(settings[editing], name));
    controls.load(settings[editing]);
    showPreset();
    nameDifferences();
    followNext();
  };
  return element("button", { type: "button", "data-preset": name, click: choose }, label);
});
byId("presets").append(...presetButtons);

function showPreset() {
  const active = presetOf(settings[editing]);
  for (const button of presetButtons) button.setAttribute("aria-pressed", String(button.dataset.preset === active));
  byId("preset-meaning").replaceChildren(active ? PRESETS[active][1] : "Settings of your own.");
}

function edit(name) {
  editing = name;
  controls.load(settings[name]);
  showPreset();
  followNext();
}

function showWhich() {
  const names = NAMES.map((name) => [name, `Settings ${name}`]);
  byId("which").replaceChildren(segmented("which", "Settings to change", names, editing, edit));
}

function nameDifferences() {
  if (!settings.B) return;
  for (const [name, other] of [["A", "B"], ["B", "A"]]) {
    const words = differences(settings[name], settings[other]) || "the same settings";
    byId(`pane-${name.toLowerCase()}`).querySelector(".differs").replaceChildren(words);
  }
}

byId("compare").addEventListener("change", () => {
  comparing = byId("compare").checked;
  // At first B is like A but for chance, so that there is something to compare.
  settings.B ??= withPreset(settings.A, presetOf(settings.A) === "creative" ? "balanced" : "creative");
  byId("which").hidden = !comparing;
  document.body.classList.toggle("comparing", comparing);
  if (comparing) showWhich();
  edit(comparing ? editing : "A");
});

const code = new CodeDialog(bodyOf);
byId("copy").addEventListener("click", () => controls.readable() && code.open(editing, comparing ? NAMES : [editing]));

// --- the rest -----------------------------------------------------------------------------------------------------

const prompt = new PromptEditor(byId("prompt"), () => {
  if (opened) showLength("");
  followNext();
});

byId("generate").addEventListener("click", generate);
byId("stop").addEventListener("click", stop);
byId("close").addEventListener("click", () => openToken(null));
byId("step-back").addEventListener("click", () => stepToken(-1));
byId("step-on").addEventListener("click", () => stepToken(1));
byId("keep").addEventListener("change", () => {
  if (byId("keep").checked && seed() === undefined) drawSeed();
  followNext();
});
seedField.addEventListener("input", () => {
  byId("keep").checked = seedField.value !== "";
  followNext();
});
byId("continue").addEventListener("click", () => {
  prompt.addAnswer(views.A.choices[0].text);
  byId("continue").hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape" && !byId("code").open) {
    if (runs.length) stop();
    else if (opened) openToken(null);
  }
});

byId("runs").append(element("p", { class: "note" }, "The first token, the speed and where the time went: after a text."));
drawSeed();
edit("A");
server.check();
