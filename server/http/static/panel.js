// What a run took, and what the server holds: times, speed, blocks of the KV cache, hits of the prefix cache.

import { readMetrics } from "./api.js";
import { element } from "./dom.js";
import { bytes, count, duration, percent, plural } from "./words.js";

/** A bar of parts with a legend that says the same in words. parts: [class, label, value, words]. */
function partsBar(parts) {
  const total = parts.reduce((sum, [, , value]) => sum + value, 0) || 1;
  const bars = parts.filter(([, , value]) => value > 0).map(([kind, , value]) => {
    const part = element("span", { class: kind });
    part.style.setProperty("width", `${((100 * value) / total).toFixed(2)}%`);
    return part;
  });
  const words = parts.map(([kind, label, , text]) =>
    element("li", {}, element("span", { class: `swatch ${kind}` }), `${label} `, element("strong", {}, text)),
  );
  return [element("div", { class: "parts", "aria-hidden": "true" }, ...bars), element("ul", { class: "legend" }, ...words)];
}

const figure = (label, value, note) =>
  element("div", {}, element("dt", {}, label), element("dd", {}, value, note && element("small", {}, note)));

/** What one run took. name: "A", "B", or null. */
export function runFigures(name, outcome) {
  const { usage, timings, firstMs, totalMs } = outcome;
  const title = name && element("h3", {}, element("span", { class: "letter" }, name));
  if (!usage) {
    const words = firstMs === null ? "Nothing came." : `The first token came after ${duration(firstMs)}; the rest is told at the end of a whole text.`;
    return element("article", {}, title, element("p", { class: "note" }, words));
  }
  const after = usage.completion_tokens - (outcome.body.n ?? 1);
  const speed = after > 0 && timings.decode_ms > 0 ? `${count(Math.round((after * 1000) / timings.decode_ms))}` : "–";
  const rest = Math.max(0, totalMs - timings.total_ms);
  return element(
    "article",
    {},
    title,
    element(
      "dl",
      { class: "figures" },
      figure("First token", firstMs === null ? "–" : duration(firstMs), "seen here"),
      figure("Speed", speed, "tokens/s"),
      figure("Tokens", count(usage.completion_tokens), `after ${count(usage.prompt_tokens)}`),
      figure("From the cache", count(usage.cached_tokens), `of ${count(usage.prompt_tokens)} in the prompt`),
    ),
    ...partsBar([
      ["queue", "waiting", timings.queue_ms, duration(timings.queue_ms)],
      ["prefill", "reading the prompt", timings.prefill_ms, duration(timings.prefill_ms)],
      ["decode", "writing", timings.decode_ms, duration(timings.decode_ms)],
      ["rest", "on the way", rest, duration(rest)],
    ]),
  );
}

/** Says what is known while `runs` are under way; returns a function that ends that. */
export function followRuns(root, runs) {
  const began = performance.now();
  const tell = () => {
    const first = runs.filter(({ outcome }) => !outcome.error).map(({ outcome }) => outcome.firstMs);
    if (!first.length) return;
    const seconds = Math.floor((performance.now() - began) / 1000);
    const waited = seconds ? `: ${plural(seconds, "second")}` : "…";
    const words = first.includes(null) ? `Waiting for the first token${waited}` : `The first token came after ${first.map(duration).join(" and ")}…`;
    root.replaceChildren(element("p", { class: "note" }, words));
  };
  tell();
  const timer = setInterval(tell, 250);
  return () => clearInterval(timer);
}

/** What the server holds, by its metrics. */
function serverFigures(samples) {
  const blocks = (state) => samples[`stet_kv_cache_blocks{state="${state}"}`] ?? 0;
  const [used, cached, free] = ["used", "cached", "free"].map(blocks);
  const queried = samples.stet_prefix_cache_queried_tokens_total ?? 0;
  const hits = samples.stet_prefix_cache_hit_tokens_total ?? 0;
  const memory = samples['stet_memory_bytes{kind="kv_cache"}'] ?? 0;
  return [
    element(
      "dl",
      { class: "figures" },
      figure("KV blocks in use", count(used), `of ${count(used + cached + free)} · ${bytes(memory)}`),
      figure("Cache hits", queried ? percent(hits / queried) : "–", `${count(hits)} of ${plural(queried, "token")}`),
      figure("Running", count(samples.stet_requests_running ?? 0), plural(samples.stet_requests_running ?? 0, "request").replace(/^\S+ /, "")),
      figure("Waiting", count(samples.stet_requests_waiting ?? 0), "in the queue"),
    ),
    ...partsBar([
      ["used", "in use", used, count(used)],
      ["cached", "kept for prompts to come", cached, count(cached)],
      ["free", "free", free, count(free)],
    ]),
  ];
}

/** Fills the server's part of the panel, or says why that cannot be. */
export async function showServer(root) {
  try {
    root.replaceChildren(...serverFigures(await readMetrics()));
  } catch (error) {
    const words = {
      forbidden: "This API key may not read the server's metrics: that takes a key with the role metrics or admin.",
      unauthorized: "The server's metrics need an API key with the role metrics or admin.",
      unreachable: "The server does not answer.",
    };
    root.replaceChildren(element("p", { class: "note" }, words[error.code] ?? `No metrics: ${error.message}`));
  }
}
