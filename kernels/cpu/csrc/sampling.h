// From logits to a token, by the integer rule of `kernels.sampling`, without a sort of the vocabulary.
//
// p: logits [rows][V], temperatures, top_ks int32 (0: off), top-p as multiples of 2^-31 int64 (2^31: off), the smallest
// weight that min-p keeps int64, random integers int64, adjusted uint8 (biases or penalties are applied already, so that
// -inf is no fault), tokens int64, finite uint8, scratch of threads * V * 24 bytes.
// n: V, elements from row to row of the logits.

constexpr int WEIGHT_BITS = 36, RANDOM_BITS = 31;
constexpr float LARGEST_FLOAT = 3.40282346638528859812e38f, SMALLEST_TEMPERATURE = 1.17549435082228750797e-38f;
constexpr int64_t PIECE = 64;

struct Candidate {
    int32_t id;
    float logit;
    int64_t weight;
};

// trunc(e^x * 2^36) for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 13 for e^r.
inline int64_t weight_of(double x) {
    if (!(x >= -26.0)) return 0;  // NaN too, of which there is no integer: where the maximum itself is -inf
    const double n = std::nearbyint(x * 1.4426950408889634074);
    double r = std::fma(n, -6.93147180369123816490e-01, x);
    r = std::fma(n, -1.90821492927058770002e-10, r);
    double p = 1.0 / 6227020800.0;
    constexpr double factors[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                  1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,
                                  1.0};
    for (double factor : factors) p = std::fma(p, r, factor);
    const int64_t bits = ((int64_t)n + WEIGHT_BITS + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return (int64_t)(p * power);
}

// floor(fraction * total / 2^31), and the same rounded up but at least 1; no term exceeds 2^62.
inline int64_t multiply_shift_floor(int64_t fraction, int64_t total) {
    const int64_t low = total & ((1ll << RANDOM_BITS) - 1);
    return fraction * (total >> RANDOM_BITS) + ((fraction * low) >> RANDOM_BITS);
}
inline int64_t multiply_shift_ceil(int64_t fraction, int64_t total) {
    const int64_t mask = (1ll << RANDOM_BITS) - 1, low = total & mask;
    const int64_t product = fraction * (total >> RANDOM_BITS) + ((fraction * low + mask) >> RANDOM_BITS);
    return product > 1 ? product : 1;
}

// The smallest weight that top-p keeps: descending, the one at which the sum of weights reaches the threshold. Weights
// are told apart by their highest bit first; only those that share the crossing one's are sorted.
inline int64_t top_p_cutoff(Candidate* c, int64_t count, int64_t threshold, int64_t* sorted) {
    int64_t sums[WEIGHT_BITS + 2] = {};
    auto bin_of = [](int64_t weight) { return weight ? 64 - __builtin_clzll(weight) : 0; };
    for (int64_t i = 0; i < count; ++i) sums[bin_of(c[i].weight)] += c[i].weight;
    int bin = WEIGHT_BITS + 1;
    int64_t before = 0;
    while (bin > 0 && before + sums[bin] < threshold) before += sums[bin--];
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (bin_of(c[i].weight) == bin) sorted[n++] = c[i].weight;
    }
    std::sort(sorted, sorted + n, [](int64_t a, int64_t b) { return a > b; });
    for (int64_t i = 0; i < n; ++i) {
        before += sorted[i];
        if (before >= threshold) return sorted[i];
    }
    return n ? sorted[n - 1] : 0;
}

// Candidates in order of their ids: all, or those that top-k keeps, which have a scaled logit not below the k-th largest.
// The k-th largest maximum of disjoint pieces has at least k values at or above it, so it is a lower bound of the k-th
// largest value, close enough to leave few to choose from.
inline int64_t gather(const float* logits, int64_t V, float temperature, int64_t top_k, Candidate* c, float* values) {
    auto scaled = [&](float logit) { return std::min(logit / temperature, LARGEST_FLOAT); };
    const bool limited = top_k > 0 && top_k < V;
    const int64_t pieces = V / PIECE;
    float bound = -INFINITY;
    if (limited && pieces > top_k) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            F16 most = load(logits + piece * PIECE);
            for (int64_t i = 16; i < PIECE; i += 16) most = max(load(logits + piece * PIECE + i), most);
            values[piece] = scaled(largest(most));  // division keeps the order
        }
        std::nth_element(values, values + top_k - 1, values + pieces, std::greater<float>());
        bound = values[top_k - 1];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < V; ++i) {
        const float logit = scaled(logits[i]);
        if (logit >= bound) {
            c[count].id = (int32_t)i;
            c[count++].logit = logit;
        }
    }
    if (!limited || count <= top_k) return count;
    for (int64_t i = 0; i < count; ++i) values[i] = c[i].logit;
    std::nth_element(values, values + top_k - 1, values + count, std::greater<float>());
    const float kth = values[top_k - 1];
    return std::remove_if(c, c + count, [&](const Candidate& each) { return each.logit < kth; }) - c;
}

void sample(const Command& c, const Step*, Work& work) {
    const int64_t V = c.n[0];
    Candidate* candidates = (Candidate*)c.p[9] + work.thread * V;
    int64_t* spare = (int64_t*)((Candidate*)c.p[9] + work.num_threads * V) + work.thread * V;
    for (int64_t row; (row = work.take()) < c.rows;) {
        const float* logits = (const float*)c.p[0] + row * c.n[1];
        const float temperature = ((const float*)c.p[1])[row];
        const int64_t top_k = ((const int32_t*)c.p[2])[row], top_p = ((const int64_t*)c.p[3])[row];
        const int64_t min_weight = ((const int64_t*)c.p[4])[row], random = ((const int64_t*)c.p[5])[row];
        int64_t& token = ((int64_t*)c.p[7])[row];
        token = 0;

        F16 most = splat(-INFINITY), poison = splat(0.0f);
        int64_t i = 0;
        for (; i + 16 <= V; i += 16) {
            F16 v = load(logits + i);
            most = max(v, most);
            poison = fma(v, splat(0.0f), poison);  // NaN once v was not finite
        }
        float maximum = largest(most);
        bool finite = sum(poison) == 0.0f;
        for (; i < V; ++i) {
            maximum = logits[i] > maximum ? logits[i] : maximum;
            finite = finite && logits[i] * 0.0f == 0.0f;
        }
        const bool adjusted = ((const uint8_t*)c.p[6])[row];
        ((uint8_t*)c.p[8])[row] = finite || adjusted;
        if (!(finite || adjusted) || maximum == -INFINITY) continue;
        if (temperature < SMALLEST_TEMPERATURE) {
            while (logits[token] != maximum) ++token;
            continue;
        }

        const int64_t count = gather(logits, V, temperature, top_k, candidates, (float*)spare);
        const double scaled_maximum = std::min(maximum / temperature, LARGEST_FLOAT);
        int64_t total = 0;
        for (int64_t j = 0; j < count; ++j) {
            candidates[j].weight = weight_of((double)candidates[j].logit - scaled_maximum);
            total += candidates[j].weight;
        }
        int64_t cutoff = min_weight > 1 ? min_weight : 1;
        if (top_p < 1ll << RANDOM_BITS) {
            const int64_t least = top_p_cutoff(candidates, count, multiply_shift_ceil(top_p, total), spare);
            cutoff = least > cutoff ? least : cutoff;
        }
        int64_t kept = 0;
        for (int64_t j = 0; j < count; ++j) kept += candidates[j].weight >= cutoff ? candidates[j].weight : 0;
        const int64_t target = multiply_shift_floor(random, kept);
        int64_t cumulative = 0;
        for (int64_t j = 0; j < count; ++j) {
            if (candidates[j].weight < cutoff) continue;
            cumulative += candidates[j].weight;
            if (cumulative > target) {
                token = candidates[j].id;
                break;
            }
        }
    }
}

// The weights that `sample` gives to logits after temperature. p: logits [rows][V], maxima [rows], weights int64 [rows][V].
// n: V.
void weights(const Command& c, const Step*, Work& work) {
    const int64_t V = c.n[0];
    for (int64_t row; (row = work.take()) < c.rows;) {
        const float* logits = (const float*)c.p[0] + row * V;
        const double maximum = ((const float*)c.p[1])[row];
        int64_t* out = (int64_t*)c.p[2] + row * V;
        for (int64_t i = 0; i < V; ++i) out[i] = weight_of((double)logits[i] - maximum);
    }
}
