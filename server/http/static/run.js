// One generation: the request, its stream into a view, and what it took.

import { ApiError, postStream } from "./api.js";

/**
 * A run that can be stopped. `view`: an object with begin(body), add(event), end(outcome).
 * outcome: what is known so far; finished: a promise of all of it, {usage, timings, seed, firstMs, totalMs, error, left}; it never rejects.
 */
export function startRun(body, view) {
  const controller = new AbortController();
  const began = performance.now();
  const outcome = { body, seed: body.seed, usage: null, timings: null, firstMs: null, totalMs: 0, error: null, left: false };
  view.begin(body);

  const onEvent = (event) => {
    if (outcome.firstMs === null && event.text !== undefined) outcome.firstMs = performance.now() - began;
    if (event.usage) Object.assign(outcome, { usage: event.usage, timings: event.timings, seed: event.seed });
    view.add(event);
  };
  const run = async () => {
    try {
      await postStream("/generate", { ...body, stream: true }, controller.signal, onEvent);
    } catch (error) {
      if (error.name === "AbortError") outcome.left = true;
      else if (error instanceof ApiError) outcome.error = error;
      else outcome.error = new ApiError("internal", `This page could not read the answer: ${error.message}`);
    }
    outcome.totalMs = performance.now() - began;
    view.end(outcome);
    return outcome;
  };
  return { outcome, stop: () => controller.abort(), finished: run() };
}
