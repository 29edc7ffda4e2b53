// One draw, opened: the candidates before and after the settings, what removed which, and the point that was drawn.

import { element } from "./dom.js";
import { count, filterName, percent, visible } from "./words.js";

/** How many candidates of a draw are asked for. */
export const ASKED = 20;
const FEW = 10;
// So many letters have room on the line of a draw, at its least width.
const LINE_LETTERS = 44;
const SCALES = [0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1];

const share = (value) => `${(value * 100).toFixed(3)}%`;

/** A token's text in a box of its own, blanks visible. */
export const tokenBox = (text) => element("code", { class: "piece" }, visible(text));

/** Shows draws in a section of the page. */
export class Inspector {
  constructor(root) {
    this.root = root;
    this.all = false;
    this.drawing = null;
    this.more = element("button", { type: "button", class: "quiet", click: () => this.toggle() });
    this.rows = element("tbody");
    this.table = element(
      "table",
      { class: "candidates" },
      element("caption", { class: "unseen" }, "Candidates, the most likely first"),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "token"),
          element("th", { scope: "col" }, element("span", { class: "unseen" }, "bars")),
          element("th", { scope: "col", class: "before" }, "model"),
          element("th", { scope: "col", class: "after" }, "settings"),
        ),
      ),
      this.rows,
    );
    this.rest = element("p", { class: "note" });
    this.line = element("figure", { class: "line" });
    root.replaceChildren(this.table, element("div", { class: "under" }, this.rest, this.more), this.line);
  }

  toggle() {
    this.all = !this.all;
    this.show(this.drawing);
  }

  /**
   * Shows a draw: {candidates, tail, exact, vocabulary, id, r, K}; null shows nothing. `id`: the token drawn, if it is
   * to be told. `tail`: the share of all other tokens after the settings. Without final probabilities (a draw that was
   * not explained) only the model's are shown.
   */
  show(drawing) {
    this.drawing = drawing;
    this.root.hidden = !drawing;
    if (!drawing) return;
    const { candidates, id } = drawing;
    const explained = candidates[0].final_probability !== undefined;
    this.table.classList.toggle("unexplained", !explained);
    const largest = Math.max(...candidates.map((one) => Math.max(one.probability, one.final_probability ?? 0)));
    const scale = SCALES.find((limit) => limit >= largest) ?? 1;
    const shown = this.all ? candidates : candidates.filter((one, place) => place < FEW || one.id === id);
    // Rows are kept and changed, so that the bars move instead of jumping.
    while (this.rows.children.length > shown.length) this.rows.lastChild.remove();
    shown.forEach((candidate, place) => {
      const row = this.rows.children[place] ?? this.rows.appendChild(makeRow());
      fillRow(row, candidate, scale, candidate.id === id);
    });
    this.more.hidden = candidates.length <= FEW;
    this.more.replaceChildren(this.all ? `Show ${FEW}` : `Show all ${candidates.length}`);
    this.rest.replaceChildren(...restWords(drawing, explained));
    this.line.hidden = !explained || drawing.r === undefined;
    if (!this.line.hidden) this.line.replaceChildren(...lineParts(drawing));
  }
}

function makeRow() {
  return element(
    "tr",
    {},
    element("th", { scope: "row" }),
    element(
      "td",
      { class: "bars", "aria-hidden": "true" },
      element("div", { class: "bar before" }),
      element("div", { class: "bar after" }),
    ),
    element("td", { class: "before" }),
    element("td", { class: "after" }),
  );
}

function fillRow(row, candidate, scale, drawn) {
  const [name, bars, before, after] = row.children;
  row.className = `${candidate.removed_by ? "removed" : ""} ${drawn ? "drawn" : ""}`.trim();
  name.replaceChildren(tokenBox(candidate.text), drawn ? element("span", { class: "unseen" }, " (drawn)") : "");
  name.title = `token ${candidate.id}`;
  const [first, second] = bars.children;
  first.style.setProperty("width", share(Math.min(1, candidate.probability / scale)));
  second.style.setProperty("width", share(Math.min(1, (candidate.final_probability ?? 0) / scale)));
  before.replaceChildren(percent(candidate.probability));
  if (candidate.removed_by) {
    after.replaceChildren(
      element("span", { class: "cut" }, element("span", { class: "unseen" }, "removed by "), filterName(candidate.removed_by)),
    );
  } else after.replaceChildren(candidate.final_probability === undefined ? "" : percent(candidate.final_probability));
}

function restWords({ candidates, tail, exact, vocabulary }, explained) {
  const others = vocabulary - candidates.length;
  const mass = Math.max(0, 1 - candidates.reduce((sum, one) => sum + one.probability, 0));
  const drawn = candidates.length > ASKED ? ", and the one drawn" : "";
  const words = [`The ${count(candidates.length - (drawn ? 1 : 0))} most likely of ${count(vocabulary)} tokens${drawn}. `];
  const number = (value) => element("span", { class: "number" }, percent(value));
  words.push(`The other ${count(others)} together have `, number(mass));
  if (explained) words.push(`, with the settings ${exact ? "" : "about "}`, number(tail));
  words.push(".");
  return words;
}

/** The line from 0 to K in the order of the ids, and the point on it. */
function lineParts({ candidates, id, r, K }) {
  const point = r / 2 ** 31;
  const kept = candidates.filter((one) => one.interval[1] > one.interval[0]);
  const ordered = [...kept].sort((a, b) => a.interval[0] - b.interval[0]);
  const segments = ordered.map((one, place) => {
    const [first, end] = one.interval.map((edge) => edge / K);
    const segment = element("span", { class: one.id === id ? "segment drawn" : `segment ${place % 2 ? "odd" : ""}` });
    segment.style.setProperty("left", share(first));
    segment.style.setProperty("width", share(end - first));
    segment.title = `${visible(one.text)}  ${percent(end - first)}`;
    const text = visible(one.text);
    if ((end - first) * LINE_LETTERS > text.length) segment.append(text);
    return segment;
  });
  const marker = element("span", { class: "point" });
  marker.style.setProperty("left", share(point));
  const drawn = candidates.find((one) => one.id === id);
  const [first, end] = drawn.interval.map((edge) => edge / K);
  const greedy = kept.length === 1;
  return [
    element("div", { class: "track", "aria-hidden": "true" }, ...segments, marker),
    element("div", { class: "scale", "aria-hidden": "true" }, element("span", {}, "0"), element("span", {}, "1")),
    element(
      "figcaption",
      {},
      `The tokens that are left, in the order of their ids, each as wide as it is likely. The random number of this place is `,
      element("strong", { class: "number" }, point.toFixed(4)),
      greedy ? ": only " : ", which lies between ",
      greedy ? "" : element("span", { class: "number" }, `${first.toFixed(4)} and ${end.toFixed(4)}: `),
      tokenBox(drawn.text),
      greedy ? " is left to be drawn." : " is drawn.",
    ),
  ];
}

/** The share after the settings of all tokens that are not among an explanation's candidates. */
export function tailOf(candidates) {
  const left = 1 - candidates.reduce((sum, one) => sum + one.final_probability, 0);
  return left < 1e-12 ? 0 : left;
}
