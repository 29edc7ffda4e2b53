// The distribution of the next token, before anything is generated: asked for again whenever something changes.
//
// While a slider moves, the candidates that are known are filtered here, at once; the server's own answer follows and
// replaces that. One question is under way at a time, and the last one wins.

import { ApiError, postJson } from "./api.js";
import { canRecompute, recompute } from "./filters.js";
import { ASKED, tailOf } from "./inspector.js";

const PAUSE = 120;

/** The request for one draw and its explanation. Nothing that ends a text has a say in it. */
export function questionOf(body) {
  const question = { ...body, max_new_tokens: 1, explain: ASKED };
  for (const name of ["stop", "include_stop", "stop_token_ids", "n", "logprobs", "stream"]) delete question[name];
  if (question.min_new_tokens > 1) question.min_new_tokens = 1;
  return question;
}

/** Follows a prompt and settings. onDrawing(drawing), onError(error), onAsked(): what is shown is out of date. */
export class NextToken {
  constructor(onDrawing, onError, onAsked) {
    Object.assign(this, { onDrawing, onError, onAsked, known: null, wanted: null, busy: false, timer: 0 });
  }

  /** body: the request as it would be sent. settings: what it was made of. vocabulary: tokens of the model. */
  follow(body, settings, vocabulary) {
    const prompt = JSON.stringify([body.prompt, body.messages]);
    this.wanted = { body, settings, vocabulary, prompt };
    clearTimeout(this.timer);
    let pause = PAUSE;
    if (this.known?.prompt === prompt && canRecompute(settings)) {
      const guess = recompute(this.known.candidates, ASKED, vocabulary, settings);
      this.onDrawing({ ...guess, vocabulary, source: "page" });
    } else {
      this.onAsked();
      if (this.known?.prompt === prompt) pause = 0;
    }
    this.timer = setTimeout(() => this.ask(), pause);
  }

  /** Forgets the question, not the answers. */
  pause() {
    clearTimeout(this.timer);
    this.wanted = null;
  }

  async ask() {
    if (this.busy || !this.wanted) return;
    this.busy = true;
    const { body, vocabulary, prompt } = this.wanted;
    const question = this.wanted;
    let again = 0;
    try {
      const answer = await postJson("/generate", questionOf(body));
      const [draw] = answer.outputs[0].explain;
      // One more is the token drawn, where it is not among the most likely.
      this.known = { prompt, candidates: draw.candidates.slice(0, ASKED) };
      if (this.wanted === question) {
        this.wanted = null;
        const tail = tailOf(draw.candidates);
        const told = { tail, exact: true, vocabulary, seeded: body.seed !== undefined, source: "server" };
        this.onDrawing({ ...draw, ...told, promptTokens: answer.usage.prompt_tokens });
      }
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (this.wanted === question) {
        this.onError(error);
        if (error.retryAfter) again = error.retryAfter * 1000;
        else this.wanted = null;
      }
    } finally {
      this.busy = false;
    }
    if (this.wanted) this.timer = setTimeout(() => this.ask(), again);
  }
}
