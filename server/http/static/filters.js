// The filters over the most likely candidates: what the server would do, as far as these candidates tell.
//
// The server knows every token, this module the most likely ones and how much all the others (the tail) have together.
// What a temperature makes of the tail is known in bounds only. Where both bounds lead to the same tokens the answer
// is exact; where they do not, or where a filter needs the tail itself, it is an estimate and says so.

const WEIGHT_BITS = 36;
const WEIGHT = 2 ** WEIGHT_BITS;
const CERTAIN = 1e-9;

/** Bounds on the tail's weight at a temperature, relative to the best candidate's weight of 1. */
function tailBounds(mass, size, most, best, temperature) {
  if (mass < CERTAIN || size <= 0) return [0, 0];
  const power = 1 / temperature;
  // Evenly spread over the tail, and in as few tokens as possible, each as likely as the least likely candidate.
  const even = size * (mass / size / best) ** power;
  const packed = (mass / most) * (most / best) ** power;
  return [Math.min(even, packed), Math.max(even, packed)];
}

/** The smallest weight that top-p keeps, where the tail weighs `tail`; 0 if it reaches into the tail. */
function topPCutoff(weights, tail, share) {
  const total = weights.reduce((sum, weight) => sum + weight, 0) + tail;
  let sum = 0;
  for (const weight of [...weights].sort((a, b) => b - a)) {
    sum += weight;
    // A share of 1 is reached by rounding alone, long before the last token.
    if (sum >= share * total) return weight;
  }
  return 0;
}

/** Which tokens typical-p keeps, where there is no tail: the least surprised or surprising first. */
function typicalKeep(weights, share) {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const surprise = weights.map((weight) => (weight > 0 ? -Math.log(weight / total) : Infinity));
  const entropy = weights.reduce((sum, weight, i) => sum + (weight > 0 ? (weight / total) * surprise[i] : 0), 0);
  const distance = surprise.map((value) => Math.abs(value - entropy));
  const order = weights.map((_, i) => i).filter((i) => weights[i] > 0).sort((a, b) => distance[a] - distance[b]);
  let sum = 0;
  let last = 0;
  for (const i of order) {
    sum += weights[i];
    last = distance[i];
    if (sum >= share * total) break;
  }
  return weights.map((weight, i) => weight > 0 && distance[i] <= last * (1 + 1e-12));
}

/** Whether these settings can be carried out on candidates: what changes single logits is known to the server only. */
export function canRecompute(settings) {
  const off = settings.repetition_penalty === 1 && !(settings.min_new_tokens > 0) && !settings.form;
  const lists = [settings.logit_bias, settings.allowed_token_ids, settings.bad_words];
  const numbers = ["temperature", "top_k", "top_p", "min_p", "typical_p"];
  return off && lists.every((list) => list.length === 0) && numbers.every((name) => settings[name] !== null);
}

/**
 * The candidates under other settings.
 *
 * candidates  of one `explain`, with the model's own `probability`
 * asked       how many were asked for: one more may be there, the drawn token
 * vocabulary  how many tokens the model has
 *
 * Returns {candidates, tail, exact}: copies with `final_probability` and `removed_by`; the share of all other tokens;
 * and whether this is what the server would answer.
 */
export function recompute(candidates, asked, vocabulary, settings) {
  const known = [...candidates].sort((a, b) => b.probability - a.probability || a.id - b.id);
  const probabilities = known.map(({ probability }) => probability);
  const removed = known.map(() => null);
  const remove = (i, name) => {
    if (weights[i] > 0 || removed[i] === null) removed[i] ??= name;
    weights[i] = 0;
  };
  const best = probabilities[0];
  const least = probabilities[Math.min(asked, known.length) - 1];
  const mass = Math.max(0, 1 - probabilities.reduce((sum, value) => sum + value, 0));
  const size = vocabulary - known.length;
  let weights;
  let tail = [0, 0];
  let exact = true;

  if (settings.temperature === 0) {
    weights = known.map((_, i) => (i === 0 ? 1 : 0));
    weights.forEach((weight, i) => weight || remove(i, "temperature"));
    return result();
  }
  weights = probabilities.map((value) => (value / best) ** (1 / settings.temperature));
  weights.forEach((weight, i) => weight < 1 / WEIGHT && remove(i, "weight"));
  tail = tailBounds(mass, size, least, best, settings.temperature);

  const k = settings.top_k;
  if (k > 0 && k < vocabulary) {
    const reached = k < known.length ? weights[k - 1] : 0;
    weights.forEach((weight, i) => weight < reached && remove(i, "top_k"));
    // Ties with the last one that is kept are kept too: beyond the candidates there might be one.
    if (k < asked && probabilities[k - 1] > least) tail = [0, 0];
    else if (tail[1] > 0) [tail, exact] = [[0, tail[1] * Math.min(1, (k - asked + 1) / size)], false];
  }
  if (settings.top_p < 1) {
    const share = Math.round(settings.top_p * 2 ** 31) / 2 ** 31;
    const cutoffs = tail.map((weight) => topPCutoff(weights, weight, share));
    const middle = topPCutoff(weights, (tail[0] + tail[1]) / 2, share);
    const tailWeight = (least / best) ** (1 / settings.temperature);
    if (cutoffs[0] !== cutoffs[1]) exact = false;
    weights.forEach((weight, i) => weight < middle && remove(i, "top_p"));
    if (middle > tailWeight) tail = [0, 0];
    else if (tail[1] > 0) exact = false;
  }
  if (settings.min_p > 0) {
    weights.forEach((weight, i) => weight < settings.min_p && remove(i, "min_p"));
    if ((least / best) ** (1 / settings.temperature) < settings.min_p) tail = [0, 0];
    else if (tail[1] > 0) exact = false;
  }
  if (settings.typical_p < 1) {
    if (tail[1] > 0) exact = false;
    const kept = typicalKeep(weights, settings.typical_p);
    kept.forEach((keep, i) => keep || remove(i, "typical_p"));
  }
  return result();

  function result() {
    const middle = (tail[0] + tail[1]) / 2;
    const total = weights.reduce((sum, weight) => sum + weight, 0) + middle;
    if (tail[1] - tail[0] > 1e-3 * total) exact = false;
    const shown = known.map((candidate, i) => ({
      ...candidate,
      final_probability: weights[i] / total,
      removed_by: removed[i],
      interval: null,
    }));
    return { candidates: shown, tail: middle / total, exact };
  }
}
