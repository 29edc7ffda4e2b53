// Causal attention over the paged cache, read where it lies.
//
// A part is some tokens of one sequence and the query heads of one KV head: their rows share every key and value that
// is loaded. Keys pass by in blocks of 64, at fixed positions, with an online softmax (arXiv:2205.14135):
//
//     m' = max(m, max s)    p = e^(s - m')    l = l e^(m - m') + sum p    acc = acc e^(m - m') + sum p v
//
// What happens to a row depends on its own query and on the keys that it may see, in their order, alone: not on the
// other rows of its part, nor on how many there are. Keys that it may not see, or that are not there, are never
// multiplied into it: what an earlier owner of a block left in it (NaN, say) is harmless.
//
// p: query [T][Hq][D], Cache, output [T][Hq * D].  n: Hq.  f: scale, soft cap (0: none).

inline int within_sixteen(int64_t n) { return n < 0 ? 0 : n < 16 ? (int)n : 16; }

constexpr int64_t KEYS = 64;
constexpr int64_t PART_ROWS = 24;  // about so many rows share the keys

inline F16 cap(F16 s, float softcap) {
    // softcap * tanh(s / softcap) = softcap * (1 - 2 / (1 + e^(2 s / softcap)))
    F16 e = exp(s * splat(2.0f / softcap));
    return splat(softcap) * (splat(1.0f) - splat(2.0f) / (splat(1.0f) + e));
}

// acc[r] += p[r] v over 16 keys, for `count` rows from r on. Row r sees the keys from[r] to to[r] - 1 of the sixteen: those
// that all of these rows see are added together, what single rows see before and after them one row at a time.
template <class T>
inline void add_values(int count, const int* from, const int* to, const float* p, const T* values, int64_t D,
                       int panels, float* acc, int64_t lda) {
    const T* panel[64];
    auto add = [&](int row, int rows, int first, int last) {
        if (first >= last) return;
        for (int i = 0; i < panels; ++i) {
            panel[i] = values + first * D + 16 * i;
        }
        fma_block<T, 0>(rows, p + row * KEYS + first, KEYS, panel, panels, D, last - first, acc + row * lda, lda, true);
    };
    int first = 0, last = 16;
    for (int i = 0; i < count; ++i) {
        first = from[i] > first ? from[i] : first;
        last = to[i] < last ? to[i] : last;
    }
    if (first >= last) {
        for (int i = 0; i < count; ++i) add(i, 1, from[i], to[i]);
        return;
    }
    for (int i = 0; i < count; ++i) add(i, 1, from[i], first);
    add(0, count, first, last);
    for (int i = 0; i < count; ++i) add(i, 1, last, to[i]);
}

template <class T>
inline void fetch(const T* first, int64_t count) {
    for (const char* p = (const char*)first; p < (const char*)(first + count); p += 64) __builtin_prefetch(p);
}

template <class T>
void attention_of(const Command& c, const Step* step, Work& work) {
    const float* query = (const float*)c.p[0];
    const Cache& cache = *(const Cache*)c.p[1];
    float* output = (float*)c.p[2];
    const int64_t D = cache.head_dim, kv_heads = cache.num_heads, size = cache.block_size, heads = c.n[0];
    const int64_t group = heads / kv_heads, part_tokens = group < PART_ROWS ? PART_ROWS / group : 1;
    const int64_t rows_most = part_tokens * group, panels_of_head = (D + 15) / 16;
    const T *keys = (const T*)cache.keys, *values = (const T*)cache.values;
    const float scale = c.f[0], softcap = c.f[1];

    float* q = work.scratch;                     // [rows][D]
    float* acc = q + rows_most * D;              // [rows][16 * panels_of_head]
    float* p = acc + rows_most * panels_of_head * 16;  // [rows][KEYS]
    float* m = p + rows_most * KEYS;             // [rows]
    float* l = m + rows_most;                    // [rows]
    const int64_t lda = 16 * panels_of_head;

    // Parts are numbered through, sequence by sequence. Each thread walks along with the numbers that it takes.
    int64_t sequence = 0, first_part = 0;
    auto parts_of = [&](int64_t s) {
        return (step->query_starts[s + 1] - step->query_starts[s] + part_tokens - 1) / part_tokens * kv_heads;
    };
    for (int64_t part; (part = work.take(), true);) {
        while (sequence < step->num_sequences && part >= first_part + parts_of(sequence)) {
            first_part += parts_of(sequence++);
        }
        if (sequence == step->num_sequences) return;
        const int64_t head = (part - first_part) % kv_heads;
        // The last tokens have the most keys: they go first.
        const int64_t in_reverse = parts_of(sequence) / kv_heads - 1 - (part - first_part) / kv_heads;
        const int64_t first = step->query_starts[sequence] + in_reverse * part_tokens;
        const int64_t end = step->query_starts[sequence + 1];
        const int64_t tokens = end - first < part_tokens ? end - first : part_tokens, rows = tokens * group;
        const int32_t* table = step->block_tables + sequence * step->table_stride;
        const int64_t position = step->positions[first];

        for (int64_t t = 0; t < tokens; ++t) {
            std::memcpy(q + t * group * D, query + ((first + t) * heads + head * group) * D, group * D * sizeof(float));
        }
        std::memset(acc, 0, rows * lda * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            m[r] = -INFINITY;
            l[r] = 0.0f;
        }
        // Row r sees the keys from oldest(r) to position + r / group.
        auto oldest = [&](int64_t r) {
            const int64_t from = position + r / group - cache.window + 1;
            return cache.window && from > 0 ? from : 0;
        };
        // The first slot of the sixteen from key `at` on. Blocks before the window may be somebody else's by now, or none
        // at all: any will do, it is not used.
        auto slot_of = [&](int64_t at) {
            const int64_t block = at + 16 > oldest(0) ? table[at / size] : table[position / size];
            return (block * kv_heads + head) * size + at % size;
        };
        for (int64_t key = oldest(0) / KEYS * KEYS; key < position + tokens; key += KEYS) {
            // The blocks of a sequence lie anywhere: the processor cannot guess what comes next.
            for (int64_t at = key + KEYS; at < key + 2 * KEYS && at < position + tokens; at += 16) {
                const int64_t slot = slot_of(at);
                fetch(keys + slot * D, 16 * D);
                fetch(values + slot * D, 16 * D);
            }
            const int64_t last_key = key + KEYS < position + tokens ? key + KEYS : position + tokens;
            const int num_panels = (int)((last_key - key + 15) / 16);
            const T *key_panels[KEYS / 16], *value_rows[KEYS / 16];
            const float *key_scales[KEYS / 16], *value_scales[KEYS / 16];
            for (int i = 0; i < num_panels; ++i) {
                const int64_t slot = slot_of(key + 16 * i);
                key_panels[i] = keys + slot * D;
                value_rows[i] = values + slot * D;
                key_scales[i] = cache.key_scales + slot;
                value_scales[i] = cache.value_scales + slot;
            }
            for (int64_t r = 0; r < rows;) {
                const int count = next_block(rows - r, MAX_ROWS);
                fma_block<T, 0>(count, q + r * D, D, key_panels, num_panels, 16, D, p + r * KEYS, KEYS, false);
                r += count;
            }
            // Visible keys of each row within this block: [low, high).
            auto low = [&](int64_t r) { return oldest(r) > key ? oldest(r) - key : 0; };
            auto high = [&](int64_t r) {
                const int64_t seen = position + r / group + 1 - key;
                return seen < 0 ? 0 : seen < KEYS ? seen : KEYS;
            };
            for (int64_t r = 0; r < rows; ++r) {
                const int from = (int)low(r), to = (int)high(r);
                if (from >= to) continue;
                float* s = p + r * KEYS;
                F16 best = splat(-INFINITY);
                for (int i = from / 16; 16 * i < to; ++i) {
                    F16 v = load(s + 16 * i) * splat(scale);
                    if (sizeof(T) == 1) v = v * load(key_scales[i]);
                    if (softcap > 0.0f) v = cap(v, softcap);
                    v = where_between(from - 16 * i, to - 16 * i, v, splat(-INFINITY));
                    store(s + 16 * i, v);
                    best = max(v, best);
                }
                float largest_score = largest(best);
                const float next = m[r] > largest_score ? m[r] : largest_score;
                F16 total = splat(0.0f);
                for (int i = from / 16; 16 * i < to; ++i) {
                    F16 e = exp(load(s + 16 * i) - splat(next));
                    total = total + e;
                    if (sizeof(T) == 1) e = where_between(from - 16 * i, to - 16 * i, e * load(value_scales[i]), e);
                    store(s + 16 * i, e);
                }
                if (m[r] != next) {
                    float shrink[16];
                    store(shrink, exp(splat(m[r] - next)));
                    l[r] = l[r] * shrink[0];
                    const F16 by = splat(shrink[0]);
                    for (int64_t i = 0; i < lda; i += 16) {
                        store(acc + r * lda + i, load(acc + r * lda + i) * by);
                    }
                    m[r] = next;
                }
                l[r] = l[r] + sum(total);
            }
            for (int64_t r = 0; r < rows;) {
                const int count = next_block(rows - r, MAX_ROWS);
                for (int i = 0; i < num_panels; ++i) {
                    int from[MAX_ROWS], to[MAX_ROWS];
                    for (int j = 0; j < count; ++j) {
                        from[j] = within_sixteen(low(r + j) - 16 * i);
                        to[j] = within_sixteen(high(r + j) - 16 * i);
                    }
                    add_values<T>(count, from, to, p + r * KEYS + 16 * i, value_rows[i], D, (int)panels_of_head,
                                  acc + r * lda, lda);
                }
                r += count;
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* y = output + ((first + r / group) * heads + head * group + r % group) * D;
            for (int64_t d = 0; d < D; ++d) {
                y[d] = acc[r * lda + d] / l[r];
            }
        }
    }
}

void attention(const Command& c, const Step* step, Work& work) {
    switch (((const Cache*)c.p[1])->type) {
        case FLOAT32: return attention_of<float>(c, step, work);
        case BFLOAT16: return attention_of<bfloat16>(c, step, work);
        case INT8: return attention_of<int8_t>(c, step, work);
    }
}
