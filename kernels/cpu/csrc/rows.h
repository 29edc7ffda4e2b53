// What is done to each row by itself: token vectors, norms, activations, quantization.

// q = rint(x * (127 / max|x|)), scale = max|x| / 127: `kernels.int8`, to the bit. Elements from n to `padded` become 0.
template <class Integer>
inline void quantize_row(const float* x, int64_t n, int64_t padded, Integer* q, float* scale) {
    float most = 0.0f;
    bool finite = true;
    int64_t i = 0;
    F16 m = splat(0.0f), poison = splat(0.0f);
    for (; i + 16 <= n; i += 16) {
        F16 v = load(x + i);
        m = max(abs(v), m);
        poison = fma(v, splat(0.0f), poison);  // NaN once v was not finite
    }
    most = largest(m);
    finite = sum(poison) == 0.0f;
    for (; i < n; ++i) {
        float v = std::fabs(x[i]);
        most = v > most ? v : most;
        finite = finite && v * 0.0f == 0.0f;
    }
    if (!finite) {
        std::memset(q, 0, padded * sizeof(Integer));
        *scale = NAN;
        return;
    }
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    *scale = most / 127.0f;
    const F16 by = splat(inverse), low = splat(-127.0f), high = splat(127.0f);
    for (i = 0; i + 16 <= n; i += 16) {
        store(q + i, max(low, min(high, round_to_even(load(x + i) * by))));
    }
    for (; i < n; ++i) {
        float v = std::nearbyint(x[i] * inverse);
        q[i] = (Integer)(v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v);
    }
    for (; i < padded; ++i) {
        q[i] = 0;
    }
}

// p: token ids int64 [rows], packed weight, feature scales, y [rows][K].  n: V, K, elements from row to row of y.
// flags: the Type of the weight, whose row a token's vector is.  f: what it is multiplied by.
void embedding(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows;
    const int64_t *ids = (const int64_t*)c.p[0], K = c.n[1], ldy = c.n[2], padded = whole_groups(K);
    const float* scales = (const float*)c.p[2];
    constexpr int64_t g = GROUP_OF;
    const float by = c.f[0];
    for (int64_t row; (row = work.take()) < rows;) {
        float* y = (float*)c.p[3] + row * ldy;
        const int64_t id = ids[row] < 0 || ids[row] >= c.n[0] ? 0 : ids[row], lane = id % 16;
        const int64_t panel = id / 16 * 16 * (c.flags == INT8_DOT ? padded : K);
        switch (c.flags) {
            case FLOAT32:
                for (int64_t k = 0; k < K; ++k) y[k] = ((const float*)c.p[1])[panel + 16 * k + lane] * by;
                break;
            case BFLOAT16:
                for (int64_t k = 0; k < K; ++k) y[k] = to_float(((const bfloat16*)c.p[1])[panel + 16 * k + lane]) * by;
                break;
            case FLOAT16:
                for (int64_t k = 0; k < K; ++k) y[k] = to_float(((const float16*)c.p[1])[panel + 16 * k + lane]) * by;
                break;
            case INT8:
                for (int64_t k = 0; k < K; ++k) {
                    y[k] = (float)((const int8_t*)c.p[1])[panel + 16 * k + lane] * scales[id] * by;
                }
                break;
            case INT8_DOT:
                for (int64_t k = 0; k < K; ++k) {
                    y[k] = stored_weight(((const int8_t*)c.p[1])[panel + k / g * 16 * g + g * lane + k % g]) * scales[id] * by;
                }
                break;
        }
    }
}

// The mean of squares: 16 sums side by side, then the rest one by one.
inline float inverse_rms(const float* x, int64_t n, float eps) {
    F16 squares = splat(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        F16 v = load(x + i);
        squares = fma(v, v, squares);
    }
    float total = sum(squares);
    for (; i < n; ++i) {
        total = std::fma(x[i], x[i], total);
    }
    return 1.0f / std::sqrt(total / (float)n + eps);
}

inline void scale_row(const float* x, const float* weight, float by, int64_t n, float* y) {
    const F16 factor = splat(by);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        store(y + i, load(x + i) * factor * load(weight + i));
    }
    for (; i < n; ++i) {
        y[i] = x[i] * by * weight[i];
    }
}

// p: x, residual or null, weight, x + residual, y or integers y, y's scales or null.
// n: H, elements from row to row of x, of the residual, of the sum, of y.  f: eps. With scales, y is quantized.
void norm(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, H = c.n[0];
    for (int64_t row; (row = work.take()) < rows;) {
        const float* x = (const float*)c.p[0] + row * c.n[1];
        if (c.p[1]) {
            const float* residual = (const float*)c.p[1] + row * c.n[2];
            float* total = (float*)c.p[3] + row * c.n[3];
            int64_t i = 0;
            for (; i + 16 <= H; i += 16) {
                store(total + i, load(x + i) + load(residual + i));
            }
            for (; i < H; ++i) {
                total[i] = x[i] + residual[i];
            }
            x = total;
        }
        const float by = inverse_rms(x, H, c.f[0]);
        if (!c.p[5]) {
            scale_row(x, (const float*)c.p[2], by, H, (float*)c.p[4] + row * c.n[4]);
            continue;
        }
        scale_row(x, (const float*)c.p[2], by, H, work.scratch);
        quantize_row(work.scratch, H, whole_groups(H), (RowInteger*)c.p[4] + row * c.n[4], (float*)c.p[5] + row);
    }
}

inline F16 silu(F16 x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// The tanh form: x / 2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline F16 gelu(F16 x) {
    F16 u = fma(x * x * x, splat(0.044715f), x) * splat(0.7978845608028654f);
    return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

// p: gate and up [rows][2 * I], y or integers y, y's scales or null.  n: I, elements from row to row of the input, of y.
// flags: 0 silu, 1 gelu. rows: any multiple of the tokens.
void gated(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? -c.rows * step->num_tokens : c.rows, I = c.n[0];
    for (int64_t row; (row = work.take()) < rows;) {
        const float *gate = (const float*)c.p[0] + row * c.n[1], *up = gate + I;
        float* y = c.p[2] ? work.scratch : (float*)c.p[1] + row * c.n[2];
        float rest_gate[16] = {}, rest_up[16] = {}, rest[16];
        for (int64_t i = 0; i < I; i += 16) {
            if (i + 16 <= I) {
                F16 g = load(gate + i);
                store(y + i, (c.flags ? gelu(g) : silu(g)) * load(up + i));
                continue;
            }
            std::memcpy(rest_gate, gate + i, (I - i) * sizeof(float));
            std::memcpy(rest_up, up + i, (I - i) * sizeof(float));
            F16 g = load(rest_gate);
            store(rest, (c.flags ? gelu(g) : silu(g)) * load(rest_up));
            std::memcpy(y + i, rest, (I - i) * sizeof(float));
        }
        if (c.p[2]) {
            quantize_row(y, I, whole_groups(I), (RowInteger*)c.p[1] + row * c.n[2], (float*)c.p[2] + row);
        }
    }
}

// p: x [rows][K], integers y, its scales.  n: K, elements from row to row of x, of y.
void quantize(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows;
    for (int64_t row; (row = work.take()) < rows;) {
        quantize_row((const float*)c.p[0] + row * c.n[1], c.n[0], whole_groups(c.n[0]),
                     (RowInteger*)c.p[1] + row * c.n[2], (float*)c.p[2] + row);
    }
}
