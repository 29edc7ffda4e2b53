// A mixture of experts: which experts each token goes through, their linear layers, and the sum of what they make.
//
// A token and one of its k experts are a pair, number token * k + rank. Pairs are sorted by expert, so that each expert's
// weight is read once for all of its rows; what a pair's row becomes does not depend on the others.

// p: logits [rows][E], experts int32 [rows][k], weights [rows][k].  n: E, k, elements from row to row of the logits.
// flags: 1: weights sum to 1. The largest logits, the lower index first on a tie. Of a row that is not finite the first
// k experts, with weights that are not finite either.
void route(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, E = c.n[0], k = c.n[1];
    for (int64_t row; (row = work.take()) < rows;) {
        const float* logits = (const float*)c.p[0] + row * c.n[2];
        int32_t* experts = (int32_t*)c.p[1] + row * k;
        float *weights = (float*)c.p[2] + row * k, *each = work.scratch, poison = 0.0f;
        for (int64_t i = 0; i < E; ++i) {
            poison = poison + logits[i] * 0.0f;
        }
        if (poison != 0.0f) {
            for (int64_t rank = 0; rank < k; ++rank) {
                experts[rank] = (int32_t)rank;
                weights[rank] = NAN;
            }
            continue;
        }
        std::memcpy(each, logits, E * sizeof(float));
        for (int64_t rank = 0; rank < k; ++rank) {
            int64_t best = 0;
            for (int64_t i = 1; i < E; ++i) {
                if (each[i] > each[best]) best = i;
            }
            experts[rank] = (int32_t)best;
            each[best] = -INFINITY;
        }
        const F16 largest = splat(logits[experts[0]]);
        map_row(logits, E, each, [largest](F16 v) { return exp(v - largest); });
        float total = 0.0f;
        if (!c.flags) total = row_sum(each, E);
        for (int64_t rank = 0; rank < k; ++rank) {
            weights[rank] = each[experts[rank]];
            if (c.flags) total = total + weights[rank];
        }
        for (int64_t rank = 0; rank < k; ++rank) {
            weights[rank] = weights[rank] / total;
        }
    }
}

// p: experts int32 [rows][k], offsets int32 [E + 1], pairs int32 [rows * k] sorted by expert.  n: E, k.
void group(const Command& c, const Step* step, Work& work) {
    if (work.take() != 0) return;
    const int64_t count = (c.rows < 0 ? step->num_tokens : c.rows) * c.n[1], E = c.n[0];
    const int32_t* experts = (const int32_t*)c.p[0];
    int32_t *offsets = (int32_t*)c.p[1], *pairs = (int32_t*)c.p[2];
    std::memset(offsets, 0, (E + 1) * sizeof(int32_t));
    for (int64_t pair = 0; pair < count; ++pair) {
        ++offsets[experts[pair] + 1];
    }
    for (int64_t e = 0; e < E; ++e) {
        offsets[e + 1] += offsets[e];
    }
    for (int64_t pair = 0; pair < count; ++pair) {  // each offset moves to its expert's end …
        pairs[offsets[experts[pair]]++] = (int32_t)pair;
    }
    for (int64_t e = E; e > 0; --e) {  // … which is where the next one begins
        offsets[e] = offsets[e - 1];
    }
    offsets[0] = 0;
}

constexpr int64_t EXPERT_PANELS = 4;  // that a thread takes at once
constexpr int64_t EXPERT_ROWS = 24;   // as many rows pass by them, then somebody else may take the same panels

// Sixteen columns of a row: scaled, and written as far as they go.
inline void store_scaled(const float* acc, const float* scales, float* y) {
    F16 v = load(acc);
    store(y, scales ? v * load(scales) : v);
}

template <class T>
inline void expert_rows(const Command& c, const int32_t* pairs, int64_t rows, const T* w, const float* scales,
                        int64_t first_panel, int count, float* scratch) {
    const int64_t K = c.n[1], divisor = c.n[5];
    const T *panel[EXPERT_PANELS], *later[EXPERT_PANELS];
    for (int p = 0; p < count; ++p) {
        panel[p] = w + (first_panel + p) * K * 16;
        later[p] = panel[p] + AHEAD / (int64_t)sizeof(T);
    }
    float acc[MAX_ROWS * 16 * EXPERT_PANELS];
    for (int64_t row = 0; row < rows;) {
        const int m = next_block(rows - row, MAX_ROWS);
        for (int i = 0; i < m; ++i) {
            std::memcpy(scratch + i * K, (const float*)c.p[0] + pairs[row + i] / divisor * c.n[2], K * sizeof(float));
        }
        fma_block<T, FIRST_LEVEL>(m, scratch, K, panel, later, count, 16, K, acc, 16 * EXPERT_PANELS);
        for (int i = 0; i < m; ++i) {
            float* y = (float*)c.p[4] + pairs[row + i] * c.n[3];
            for (int p = 0; p < count; ++p) {
                const int64_t n = (first_panel + p) * 16;
                store_scaled(acc + (i * EXPERT_PANELS + p) * 16, scales ? scales + n : nullptr, y + n);
            }
        }
        row += m;
    }
}

inline void expert_rows_dot(const Command& c, const int32_t* pairs, int64_t rows, const int8_t* w, const float* scales,
                            int64_t first_panel, int count, float* scratch) {
    const int64_t K = whole_groups(c.n[1]), divisor = c.n[5];
    RowInteger* gathered = (RowInteger*)scratch;
    const int8_t* own = w + first_panel * K * 16;
    for (int64_t row = 0; row < rows;) {
        const int m = next_block(rows - row, DOT_ROWS);
        for (int i = 0; i < m; ++i) {
            std::memcpy(gathered + i * K, (const RowInteger*)c.p[0] + pairs[row + i] / divisor * c.n[2],
                        K * sizeof(RowInteger));
        }
        dot_block<FIRST_LEVEL>(m, gathered, K, own, own + AHEAD, count, K, [&](int i, int p, F16 sums) {
            const int64_t n = (first_panel + p) * 16, pair = pairs[row + i];
            const F16 v = sums * splat(((const float*)c.p[1])[pair / divisor]) * load(scales + n);
            store((float*)c.p[4] + pair * c.n[3] + n, v);
        });
        row += m;
    }
}

// The rows of each expert's pairs by its weight: y[pair] = W[expert] x[pair / divisor]. Experts lie one after the other
// in W, N features each, a multiple of 16.
// p: x, row scales, W, feature scales, y, offsets, pairs.  n: N, K, elements from row to row of x, of y; E; divisor.
// flags: the Type of W.
void expert_linear(const Command& c, const Step*, Work& work) {
    const int64_t N = c.n[0], K = c.n[1], E = c.n[4], panels = N / 16;
    const int64_t groups = (panels + EXPERT_PANELS - 1) / EXPERT_PANELS;
    const int32_t *offsets = (const int32_t*)c.p[5], *pairs = (const int32_t*)c.p[6];
    int64_t expert = 0, base = 0;  // items of the experts before
    for (int64_t item; (item = work.take()) >= 0;) {
        int64_t items;
        for (;; ++expert) {
            if (expert == E) return;
            items = (offsets[expert + 1] - offsets[expert] + EXPERT_ROWS - 1) / EXPERT_ROWS * groups;
            if (item < base + items) break;
            base += items;
        }
        const int64_t first_row = offsets[expert] + (item - base) / groups * EXPERT_ROWS;
        const int64_t left = offsets[expert + 1] - first_row, rows = left < EXPERT_ROWS ? left : EXPERT_ROWS;
        const int64_t first_panel = (item - base) % groups * EXPERT_PANELS;
        const int count = (int)(panels - first_panel < EXPERT_PANELS ? panels - first_panel : EXPERT_PANELS);
        const float* scales = c.p[3] ? (const float*)c.p[3] + expert * N : nullptr;
        const int32_t* own = pairs + first_row;
        const int64_t start = expert * N * K;
        switch (c.flags) {
            case FLOAT32:
                expert_rows(c, own, rows, (const float*)c.p[2] + start, scales, first_panel, count, work.scratch);
                break;
            case BFLOAT16:
                expert_rows(c, own, rows, (const bfloat16*)c.p[2] + start, scales, first_panel, count, work.scratch);
                break;
            case FLOAT16:
                expert_rows(c, own, rows, (const float16*)c.p[2] + start, scales, first_panel, count, work.scratch);
                break;
            case INT8:
                expert_rows(c, own, rows, (const int8_t*)c.p[2] + start, scales, first_panel, count, work.scratch);
                break;
            case INT8_DOT:
                expert_rows_dot(c, own, rows, (const int8_t*)c.p[2] + expert * N * whole_groups(K), scales,
                                first_panel, count, work.scratch);
                break;
        }
    }
}

// p: y [rows * k][H], weights [rows][k], out [rows][H].  n: H, k, elements from row to row of y, of out.
// The sum goes from a token's first expert to its last.
void combine(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows, H = c.n[0], k = c.n[1];
    for (int64_t row; (row = work.take()) < rows;) {
        const float *weights = (const float*)c.p[1] + row * k, *y = (const float*)c.p[0] + row * k * c.n[2];
        float* out = (float*)c.p[2] + row * c.n[3];
        int64_t i = 0;
        for (; i + 16 <= H; i += 16) {
            F16 total = splat(0.0f);
            for (int64_t rank = 0; rank < k; ++rank) {
                total = fma(splat(weights[rank]), load(y + rank * c.n[2] + i), total);
            }
            store(out + i, total);
        }
        for (; i < H; ++i) {
            float total = 0.0f;
            for (int64_t rank = 0; rank < k; ++rank) {
                total = std::fma(weights[rank], y[rank * c.n[2] + i], total);
            }
            out[i] = total;
        }
    }
}
