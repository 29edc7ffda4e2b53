// What families other than Llama do to each row by itself: layer norm, activations without a gate, learned positions,
// sums, and the soft cap of the logits.

inline float row_sum(const float* x, int64_t n) {
    F16 sums = splat(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        sums = sums + load(x + i);
    }
    float total = sum(sums);
    for (; i < n; ++i) {
        total = total + x[i];
    }
    return total;
}

inline void add_row(const float* x, const float* y, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        store(out + i, load(x + i) + load(y + i));
    }
    for (; i < n; ++i) {
        out[i] = x[i] + y[i];
    }
}

// y = f(x), sixteen at a time; the last ones in a vector of their own, so that every element is computed alike.
template <class Function>
inline void map_row(const float* x, int64_t n, float* y, Function f) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        store(y + i, f(load(x + i)));
    }
    if (i < n) {
        float rest[16] = {};
        std::memcpy(rest, x + i, (n - i) * sizeof(float));
        store(rest, f(load(rest)));
        std::memcpy(y + i, rest, (n - i) * sizeof(float));
    }
}

// p: x, residual or null, weight, bias or null, x + residual, y or integers y, y's scales or null.
// n: H, elements from row to row of x, of the residual, of the sum, of y.  f: eps. With scales, y is quantized.
void layer_norm(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, H = c.n[0];
    const float *weight = (const float*)c.p[2], *bias = (const float*)c.p[3];
    for (int64_t row; (row = work.take()) < rows;) {
        const float* x = (const float*)c.p[0] + row * c.n[1];
        if (c.p[1]) {
            float* total = (float*)c.p[4] + row * c.n[3];
            add_row(x, (const float*)c.p[1] + row * c.n[2], H, total);
            x = total;
        }
        float* y = c.p[6] ? work.scratch : (float*)c.p[5] + row * c.n[4];
        const float mean = row_sum(x, H) / (float)H;
        map_row(x, H, y, [mean](F16 v) { return v - splat(mean); });
        const float by = inverse_rms(y, H, c.f[0]);
        const F16 factor = splat(by);
        int64_t i = 0;
        for (; i + 16 <= H; i += 16) {
            F16 v = load(y + i) * factor * load(weight + i);
            store(y + i, bias ? v + load(bias + i) : v);
        }
        for (; i < H; ++i) {
            const float v = y[i] * by * weight[i];
            y[i] = bias ? v + bias[i] : v;
        }
        if (c.p[6]) {
            quantize_row(y, H, whole_groups(H), (RowInteger*)c.p[5] + row * c.n[4], (float*)c.p[6] + row);
        }
    }
}

// x / 2 * (1 + erf(x / sqrt(2))) as max(x, 0) - |x| * tail, with tail = (1 - erf(|x| / sqrt(2))) / 2 from Abramowitz and
// Stegun, Handbook of Mathematical Functions, 7.1.26: within 1.5e-7.
inline F16 exact_gelu(F16 x) {
    const F16 magnitude = abs(x), z = magnitude * splat(0.70710678118654752f);
    const F16 t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
    F16 tail = splat(1.061405429f);
    tail = fma(tail, t, splat(-1.453152027f));
    tail = fma(tail, t, splat(1.421413741f));
    tail = fma(tail, t, splat(-0.284496736f));
    tail = fma(tail, t, splat(0.254829592f));
    tail = tail * t * exp(splat(0.0f) - z * z) * splat(0.5f);
    return max(x, splat(0.0f)) - magnitude * tail;
}

// p: x [rows][I], y or integers y, y's scales or null.  n: I, elements from row to row of x, of y.
// flags: 0 the tanh form, 1 exact.
void ungated(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, I = c.n[0];
    for (int64_t row; (row = work.take()) < rows;) {
        const float* x = (const float*)c.p[0] + row * c.n[1];
        float* y = c.p[2] ? work.scratch : (float*)c.p[1] + row * c.n[2];
        if (c.flags) map_row(x, I, y, [](F16 v) { return exact_gelu(v); });
        else map_row(x, I, y, [](F16 v) { return gelu(v); });
        if (c.p[2]) {
            quantize_row(y, I, whole_groups(I), (RowInteger*)c.p[1] + row * c.n[2], (float*)c.p[2] + row);
        }
    }
}

// p: x, residual, sum (which may be the residual's memory).  n: H, elements from row to row of each.
void add(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows;
    for (int64_t row; (row = work.take()) < rows;) {
        add_row((const float*)c.p[0] + row * c.n[1], (const float*)c.p[1] + row * c.n[2], c.n[0],
                (float*)c.p[2] + row * c.n[3]);
    }
}

// p: x, table [P][H], sum.  n: H, elements from row to row of x, of the sum.
void add_positions(const Command& c, const Step* step, Work& work) {
    for (int64_t token; (token = work.take()) < step->num_tokens;) {
        add_row((const float*)c.p[0] + token * c.n[1], (const float*)c.p[1] + step->positions[token] * c.n[0], c.n[0],
                (float*)c.p[2] + token * c.n[2]);
    }
}

// p: x [rows][V], y.  n: V, elements from row to row of x, of y.  f: the cap. Rows are long and few: cut into pieces.
void softcap(const Command& c, const Step* step, Work& work) {
    constexpr int64_t PIECE = 4096;
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, V = c.n[0], pieces = (V + PIECE - 1) / PIECE;
    const F16 cap = splat(c.f[0]), twice = splat(2.0f), one = splat(1.0f);
    for (int64_t item; (item = work.take()) < rows * pieces;) {
        const int64_t row = item / pieces, first = item % pieces * PIECE, count = V - first < PIECE ? V - first : PIECE;
        // tanh(u) = (e^2u - 1) / (e^2u + 1)
        map_row((const float*)c.p[0] + row * c.n[1] + first, count, (float*)c.p[1] + row * c.n[2] + first, [&](F16 v) {
            const F16 e = exp(twice * (v / cap));
            return cap * ((e - one) / (e + one));
        });
    }
}
