// Text as it streams in, token by token, each shaded by how likely the model found it.

import { element } from "./dom.js";
import { isFormed } from "./forms.js";
import { ending, percent, plural, spoken } from "./words.js";

/** One token: what the server told of it, and the span that shows its text (shared where texts overlap). */
class Token {
  constructor(told, explained) {
    Object.assign(this, { id: told.id, text: told.text, explained, span: null });
    const own = explained?.candidates.find(({ id }) => id === told.id);
    this.probability = own ? own.probability : Math.exp(told.logprob);
  }
}

/** One text of a run: its tokens, and the text that the server sent, which is what is shown. */
class Choice {
  constructor(view, index) {
    Object.assign(this, { view, index, tokens: [], text: "", waiting: [], unshown: "", spoken: "", finish: null });
    this.body = element("div", { class: "text", role: "group", "aria-label": `Text ${index + 1}` });
    this.end = element("p", { class: "ending", dir: "ltr" });
    this.root = element("div", { class: "choice" }, this.body, this.end);
    this.body.addEventListener("click", (event) => this.open(event.target.closest(".token")));
    this.body.addEventListener("keydown", (event) => this.onKey(event));
  }

  add(event) {
    const told = event.explain ?? event.logprobs ?? [];
    for (const item of told) {
      const token = new Token(item, event.explain ? item : null);
      token.alternatives = event.explain ? null : item.top;
      token.position = this.tokens.length;
      token.choice = this;
      this.tokens.push(token);
      this.waiting.push(token);
    }
    this.text += event.text;
    this.unshown += event.text;
    this.show(false);
    if (event.finish_reason) {
      this.finish = event;
      this.show(true);
    }
  }

  /** Shows what has arrived. A token's text and the text of the stream can come apart: at bytes that are no whole
   * character, and where text is held back because a stop string could begin there. */
  show(last) {
    while (this.waiting.length && this.unshown) {
      const [token] = this.waiting;
      if (token.text && !token.text.includes("\ufffd") && this.unshown.startsWith(token.text)) {
        this.append(token.text, [this.waiting.shift()]);
        this.unshown = this.unshown.slice(token.text.length);
        continue;
      }
      if (token.text.startsWith(this.unshown)) break; // the rest of it is held back
      // Several tokens make this text together: up to the next one whose own text can be found in it.
      const next = this.waiting.findIndex(
        ({ text }, i) => i > 0 && text && !text.includes("\ufffd") && this.unshown.indexOf(text) > 0,
      );
      if (next < 0) break;
      const cut = this.unshown.indexOf(this.waiting[next].text);
      this.append(this.unshown.slice(0, cut), this.waiting.splice(0, next));
      this.unshown = this.unshown.slice(cut);
    }
    if (!last) return;
    if (this.unshown) {
      this.append(this.unshown, this.waiting);
      this.unshown = "";
    } else if (this.waiting.length) {
      // Tokens without any text: the end of the text itself.
      this.append("", this.waiting);
    }
    this.waiting = [];
  }

  append(text, tokens) {
    const probability = Math.min(...tokens.map((token) => token.probability), 1);
    // The space before a word belongs to its token, but a shaded end of a line would look like a mistake.
    const blank = /^ +(?=\S)/.exec(text)?.[0] ?? "";
    const span = element("span", { class: "token", role: "button", tabindex: "-1" }, blank, element("b", {}, text.slice(blank.length)));
    if (!text) span.classList.add("empty");
    if (!text.trim()) span.setAttribute("aria-label", text ? spoken(text) : "end of the text");
    if (tokens.length) {
      span.style.setProperty("--surprise", Math.min(1, -Math.log2(Math.max(probability, 1e-9)) / 7).toFixed(3));
      span.title = percent(probability);
    } else span.removeAttribute("role");
    for (const token of tokens) token.span = span;
    span.token = tokens[0];
    if (!this.body.querySelector("[tabindex='0']") && tokens.length) span.tabIndex = 0;
    this.body.append(span);
  }

  open(span) {
    if (span?.token) this.view.onToken(span.token);
  }

  onKey(event) {
    const span = event.target.closest(".token");
    if (!span) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.open(span);
    }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const all = [...this.body.querySelectorAll(".token[role]")];
    const jump = { Home: all[0], End: all.at(-1) }[event.key];
    const next = jump ?? (step && all[all.indexOf(span) + step]);
    if (!next) return;
    event.preventDefault();
    for (const other of all) other.tabIndex = other === next ? 0 : -1;
    next.focus();
    if (this.view.openToken) this.open(next);
  }
}

/** Everything that one run shows: one text, or several. */
export class OutputView {
  /** root: an element. onToken(token): one was opened. announce(text): to be read aloud. */
  constructor(root, onToken, announce) {
    Object.assign(this, { root, onToken, announce, openToken: null, choices: [], running: false });
    this.body = null;
  }

  begin(body) {
    this.body = body;
    this.openToken = null;
    // A number that the server will refuse makes one, too: there is room for what it says.
    const number = Math.min(Math.max(1, Math.trunc(body.n ?? 1)), 8);
    this.choices = Array.from({ length: number }, (_, index) => new Choice(this, index));
    this.root.replaceChildren(...this.choices.map((choice) => choice.root));
    this.root.classList.toggle("several", this.choices.length > 1);
    this.root.classList.add("running");
    this.root.setAttribute("aria-busy", "true");
    this.running = true;
  }

  add(event) {
    if (event.index === undefined) return;
    const choice = this.choices[event.index];
    choice.add(event);
    if (event.finish_reason) this.sayEnd(choice, ending(event.finish_reason, event.stop_reason, isFormed(this.body)));
    else if (event.index === 0) this.saySentences(choice);
  }

  end(outcome) {
    this.running = false;
    this.root.classList.remove("running");
    this.root.setAttribute("aria-busy", "false");
    for (const choice of this.choices) {
      if (choice.finish) continue;
      choice.show(true);
      this.sayEnd(choice, ending(outcome.left ? "left" : "error"));
    }
  }

  sayEnd(choice, words) {
    choice.end.replaceChildren(`${plural(choice.tokens.length, "token")} · ${words}`);
    if (choice.index === 0) this.saySentences(choice, true);
  }

  /** Whole sentences, so that a screen reader is not interrupted by every token. */
  saySentences(choice, last = false) {
    const rest = choice.text.slice(choice.spoken.length);
    const whole = last ? rest : /^[^]*[.!?…][”"’)]?\s/.exec(rest)?.[0];
    if (!whole) return;
    choice.spoken += whole;
    if (whole.trim()) this.announce(whole.trim());
  }

  /** Marks the token that is looked at; null is none. */
  mark(token) {
    this.openToken = token;
    for (const span of this.root.querySelectorAll("[aria-pressed]")) span.removeAttribute("aria-pressed");
    token?.span?.setAttribute("aria-pressed", "true");
  }

  /** How many tokens the first texts of two views share at their begin; what comes after is marked in both. */
  static compare(first, second) {
    const [a, b] = [first, second].map((view) => view.choices[0]?.tokens ?? []);
    let same = 0;
    while (same < Math.min(a.length, b.length) && a[same].id === b[same].id) same++;
    for (const tokens of [a, b]) {
      for (const [place, token] of tokens.entries()) {
        token.span?.classList.toggle("apart", place >= same);
        token.span?.classList.toggle("parting", place === same);
      }
    }
    return { same, equal: same === a.length && same === b.length };
  }
}
