// The dialog that shows a request as code, to be copied.

import { apiKey } from "./api.js";
import { byId, copyText, segmented } from "./dom.js";
import { asCurl, asPython } from "./snippets.js";

const LANGUAGES = [["curl", "curl"], ["python", "Python"]];
const WRITERS = { curl: asCurl, python: asPython };

/** bodyOf(name): the request with the settings of that name. */
export class CodeDialog {
  constructor(bodyOf) {
    Object.assign(this, { bodyOf, language: "curl", name: "" });
    byId("code-close").addEventListener("click", () => byId("code").close());
    byId("code-copy").addEventListener("click", () => this.copy());
  }

  /** Shows the request with one of the settings; where there are several, another can be chosen. */
  open(name, names) {
    this.name = name;
    const choose = (what) => (value) => {
      this[what] = value;
      this.show();
    };
    const which = segmented("code-of", "Settings", names.map((one) => [one, one]), name, choose("name"));
    const language = segmented("language", "Language", LANGUAGES, this.language, choose("language"));
    byId("code-choice").replaceChildren(language, ...(names.length > 1 ? [which] : []));
    this.show();
    byId("code").showModal();
  }

  show() {
    const body = { ...this.bodyOf(this.name), stream: true };
    const text = WRITERS[this.language](`${location.origin}/generate`, body, Boolean(apiKey.get()));
    byId("code-text").replaceChildren(text);
    byId("code-done").replaceChildren();
  }

  async copy() {
    const text = byId("code-text");
    const done = await copyText(text.textContent);
    if (!done) getSelection().selectAllChildren(text);
    const words = "This address has no clipboard: it is selected, press Ctrl or ⌘ and C.";
    byId("code-done").replaceChildren(done ? "Copied." : words);
  }
}
