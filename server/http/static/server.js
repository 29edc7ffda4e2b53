// What is known of the server: whether it answers, which model it serves, and the API key that it may ask for.

import { apiKey, getJson } from "./api.js";
import { byId, element } from "./dom.js";
import { showServer } from "./panel.js";
import { plural } from "./words.js";

const STATES = {
  ready: "ready",
  loading: "loading the model",
  draining: "stopping",
  engine_restarting: "engine restarting",
  failed: "failed: see the server’s log",
  unreachable: "does not answer",
};

// So many milliseconds without an answer are none.
const SILENCE = 5000;

/** Shows it at the top of the page. onInfo(info), onLocked(error): a key is needed; onError(error). */
export class Server {
  constructor({ onInfo, onLocked, onError }) {
    Object.assign(this, { onInfo, onLocked, onError, info: null, state: null, timer: 0 });
    byId("key-open").addEventListener("click", () => this.askForKey(byId("key").hidden));
    byId("key").addEventListener("submit", (event) => {
      event.preventDefault();
      this.takeKey(byId("key-input").value.trim());
      this.askForKey(false);
    });
    byId("key-forget").addEventListener("click", () => this.takeKey(""));
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  /** Opens the field for the key, or closes it. */
  askForKey(open = true) {
    byId("key").hidden = !open;
    byId("key-open").hidden = false;
    byId("key-open").setAttribute("aria-expanded", String(open));
    if (open) byId("key-input").focus();
  }

  takeKey(key) {
    apiKey.set(key);
    byId("key-input").value = "";
    this.load();
  }

  /** Asks what is served. */
  async load() {
    try {
      const info = await getJson("/info");
      this.info = info.model ? info : null;
    } catch (error) {
      this.info = null;
      byId("model").replaceChildren();
      if (error.code === "unauthorized") {
        this.askForKey();
        this.onLocked(error);
      } else if (error.code !== "unreachable") this.onError(error);
    }
    if (apiKey.get()) byId("key-open").hidden = false;
    if (this.info) {
      this.showModel();
      this.onInfo(this.info);
    }
    showServer(byId("server"));
  }

  showModel() {
    const { model, context_length: length, identity } = this.info;
    const { dtype, quantization, device } = identity;
    const weights = quantization === "none" ? dtype : `${quantization}, ${dtype}`;
    const parts = [weights, device, `context of ${plural(length, "token")}`];
    byId("model").replaceChildren(element("strong", {}, model), ` ${parts.join(" · ")}`);
  }

  /** Asks whether it is ready, now and from time to time. */
  async check() {
    let state = "unreachable";
    try {
      state = (await (await fetch("/readyz", { cache: "no-store", signal: AbortSignal.timeout(SILENCE) })).json()).status;
    } catch {
      // It stays "unreachable".
    }
    if (this.state !== state) {
      const again = this.state !== null;
      this.state = state;
      byId("state").dataset.state = state;
      byId("state").replaceChildren(STATES[state] ?? state);
      if (state === "ready" && (again || !this.info)) this.load();
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => document.hidden || this.check(), state === "ready" ? 10_000 : 2_000);
  }
}
