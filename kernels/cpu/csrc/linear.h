// y = x W^T + bias, for W packed in panels of 16 output features.
//
// float types  [N / 16][K][16]              y[m][n] is one chain of multiply-adds along k, times the feature's scale
// INT8_DOT     [N / 16][K' / g][16][g]      exact int32 sums, then times the row's scale, then times the feature's;
//                                           g is GROUP_OF, K' is K rounded up to a multiple of it; the rows' rest is zeros
//
// p: x, row scales, W, feature scales, bias, y.  n: N, K, elements from row to row of x, of y.
// flags: the Type of W. Feature scales and bias may be null.

constexpr int64_t GROUP = 4;          // panels that a thread takes at once
constexpr int64_t ROWS_BYTES = 1 << 18;  // of x: what stays in the second-level cache while a group's panels pass by

// Scale, add the bias, write what there is of 16 columns.
inline void finish(F16 v, const float* scales, const float* bias, float* y, int64_t columns) {
    if (columns >= 16) {
        if (scales) v = v * load(scales);
        if (bias) v = v + load(bias);
        store(y, v);
        return;
    }
    float acc[16];
    store(acc, v);
    for (int64_t i = 0; i < columns; ++i) {
        float each = acc[i];
        if (scales) each = each * scales[i];
        if (bias) each = each + bias[i];
        y[i] = each;
    }
}

template <class T>
void linear_floats(const Command& c, int64_t rows, int64_t chunk, Work& work) {
    const float* x = (const float*)c.p[0];
    const T* w = (const T*)c.p[2];
    const float *scales = (const float*)c.p[3], *bias = (const float*)c.p[4];
    float* y = (float*)c.p[5];
    const int64_t N = c.n[0], K = c.n[1], ldx = c.n[2], ldy = c.n[3];
    const int64_t panels = (N + 15) / 16, groups = (panels + GROUP - 1) / GROUP, chunks = (rows + chunk - 1) / chunk;
    float acc[MAX_ROWS * 16 * GROUP];
    for (int64_t item; (item = work.take()) < groups * chunks;) {
        const int64_t first_panel = item % groups * GROUP, first_row = item / groups * chunk;
        const int count = (int)(panels - first_panel < GROUP ? panels - first_panel : GROUP);
        const int64_t last_row = first_row + chunk < rows ? first_row + chunk : rows;
        const T *panel[GROUP], *later[GROUP];
        for (int p = 0; p < count; ++p) {
            panel[p] = w + (first_panel + p) * K * 16;
            later[p] = panel[p] + AHEAD / (int64_t)sizeof(T);
        }
        for (int64_t row = first_row; row < last_row;) {
            const int m = next_block(last_row - row, MAX_ROWS);
            fma_block<T, FIRST_LEVEL>(m, x + row * ldx, ldx, panel, later, count, 16, K, acc, 16 * GROUP);
            for (int i = 0; i < m; ++i) {
                for (int p = 0; p < count; ++p) {
                    const int64_t n = (first_panel + p) * 16;
                    finish(load(acc + i * 16 * GROUP + p * 16), scales ? scales + n : nullptr, bias ? bias + n : nullptr,
                           y + (row + i) * ldy + n, N - n);
                }
            }
            row += m;
        }
    }
}

void linear_dot(const Command& c, int64_t rows, int64_t chunk, Work& work) {
    const RowInteger* x = (const RowInteger*)c.p[0];
    const int8_t* w = (const int8_t*)c.p[2];
    const float *row_scales = (const float*)c.p[1], *scales = (const float*)c.p[3], *bias = (const float*)c.p[4];
    float* y = (float*)c.p[5];
    const int64_t N = c.n[0], K = whole_groups(c.n[1]), ldx = c.n[2], ldy = c.n[3];
    const int64_t panels = (N + 15) / 16, groups = (panels + GROUP - 1) / GROUP, chunks = (rows + chunk - 1) / chunk;
    const int64_t items = groups * chunks;
    float own_scales[16 * GROUP], own_bias[16 * GROUP], partial[16 * DOT_ROWS];
    for (int64_t item = work.take(), next; item < items; item = next) {
        next = work.take();  // one ahead: its weights are fetched while these are multiplied
        const int64_t first_panel = item % groups * GROUP, first_row = item / groups * chunk, first = 16 * first_panel;
        const int count = (int)(panels - first_panel < GROUP ? panels - first_panel : GROUP);
        const int64_t last_row = first_row + chunk < rows ? first_row + chunk : rows;
        const int8_t *own = w + first_panel * K * 16, *other = next < items ? w + next % groups * GROUP * K * 16 : own;
        // No calls and nothing to decide where the sums leave their registers: what there is not is made up for here.
        const int64_t columns = N - first < 16 * count ? N - first : 16 * count;
        for (int64_t i = 0; i < 16 * count; ++i) {
            own_scales[i] = i < columns ? scales[first + i] : 0.0f;
            own_bias[i] = bias && i < columns ? bias[first + i] : 0.0f;
        }
        for (int64_t row = first_row; row < last_row;) {
            const int m = next_block(last_row - row, DOT_ROWS);
            float* to = y + row * ldy + first;
            dot_block<SECOND_LEVEL>(m, x + row * ldx, ldx, own, other, count, K, [&](int i, int p, F16 sums) {
                const F16 v = sums * splat(row_scales[row + i]) * load(own_scales + 16 * p);
                float* place = 16 * p + 16 <= columns ? to + i * ldy + 16 * p : partial + 16 * i;
                store(place, bias ? v + load(own_bias + 16 * p) : v);
            });
            for (int i = 0; columns % 16 && i < m; ++i) {
                std::memcpy(to + i * ldy + columns / 16 * 16, partial + 16 * i, columns % 16 * sizeof(float));
            }
            row += m;
        }
    }
}

void linear(const Command& c, const Step* step, Work& work) {
    const int64_t rows = c.rows < 0 ? step->num_tokens : c.rows;
    const int64_t row_bytes = c.n[1] * (int64_t)(c.flags == INT8_DOT ? sizeof(RowInteger) : sizeof(float));
    int64_t chunk = ROWS_BYTES / row_bytes / 24 * 24;
    if (chunk < 24) chunk = 24;
    switch (c.flags) {
        case FLOAT32: return linear_floats<float>(c, rows, chunk, work);
        case BFLOAT16: return linear_floats<bfloat16>(c, rows, chunk, work);
        case FLOAT16: return linear_floats<float16>(c, rows, chunk, work);
        case INT8: return linear_floats<int8_t>(c, rows, chunk, work);
        case INT8_DOT: return linear_dot(c, rows, chunk, work);
    }
}
