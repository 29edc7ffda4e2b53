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
// later: sixteen values that are fetched meanwhile.
template <class T>
inline void add_values(int count, const int* from, const int* to, const float* p, const T* values, const T* later,
                       int64_t D, int panels, float* acc, int64_t lda) {
    const T *panel[64], *later_panel[64];
    auto add = [&](int row, int rows, int first, int last) {
        if (first >= last) return;
        for (int i = 0; i < panels; ++i) {
            panel[i] = values + first * D + 16 * i;
            later_panel[i] = later + first * D + 16 * i;
        }
        fma_block<T, SECOND_LEVEL>(rows, p + row * KEYS + first, KEYS, panel, later_panel, panels, D, last - first,
                                   acc + row * lda, lda, true);
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
    for (const char* p = (const char*)first; p < (const char*)(first + count); p += 64) __builtin_prefetch(p, 0, 2);
}

// Some tokens of one sequence and the query heads of one KV head; without tokens: there is none left. The first token
// stands at `position`; the first row sees the keys from `oldest` on, the last one those before `end`.
struct Part {
    int64_t sequence, head, first, tokens, position, oldest, end;
};

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

    auto oldest_of = [&](int64_t position) {
        const int64_t from = position - cache.window + 1;
        return cache.window && from > 0 ? from : 0;
    };
    // Parts are numbered through, sequence by sequence. Each thread walks along with the numbers that it takes.
    int64_t sequence = 0, first_part = 0;
    auto parts_of = [&](int64_t s) {
        return (step->query_starts[s + 1] - step->query_starts[s] + part_tokens - 1) / part_tokens * kv_heads;
    };
    auto take = [&]() -> Part {
        const int64_t part = work.take();
        while (sequence < step->num_sequences && part >= first_part + parts_of(sequence)) {
            first_part += parts_of(sequence++);
        }
        if (sequence == step->num_sequences) return Part{};
        // The last tokens have the most keys: they go first.
        const int64_t in_reverse = parts_of(sequence) / kv_heads - 1 - (part - first_part) / kv_heads;
        const int64_t first = step->query_starts[sequence] + in_reverse * part_tokens;
        const int64_t rest = step->query_starts[sequence + 1] - first, tokens = rest < part_tokens ? rest : part_tokens;
        const int64_t position = step->positions[first];
        return Part{sequence, (part - first_part) % kv_heads, first, tokens, position, oldest_of(position),
                    position + tokens};
    };
    // The first slots of up to four sixteens of keys, from `key` on; returns how many. Blocks before the window may be
    // somebody else's by now, or none at all: any will do, it is not used.
    auto find_slots = [&](const Part& part, int64_t key, int64_t* slots) -> int {
        const int32_t* table = step->block_tables + part.sequence * step->table_stride;
        int count = 0;
        for (int64_t at = key; at < key + KEYS && at < part.end; at += 16) {
            const int64_t block = at + 16 > part.oldest ? table[at / size] : table[part.position / size];
            slots[count++] = (block * kv_heads + part.head) * size + at % size;
        }
        return count;
    };

    Part next = take();
    while (next.tokens > 0) {
        // Taken one part ahead: its first keys are fetched while the last ones of this part are worked on.
        const Part part = next;
        next = take();
        const int64_t head = part.head, first = part.first, position = part.position, rows = part.tokens * group;
        for (int64_t t = 0; t < part.tokens; ++t) {
            std::memcpy(q + t * group * D, query + ((first + t) * heads + head * group) * D, group * D * sizeof(float));
        }
        std::memset(acc, 0, rows * lda * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            m[r] = -INFINITY;
            l[r] = 0.0f;
        }
        // Row r sees the keys from oldest(r) to position + r / group.
        auto oldest = [&](int64_t r) { return oldest_of(position + r / group); };
        for (int64_t key = part.oldest / KEYS * KEYS; key < part.end; key += KEYS) {
            int64_t slots[KEYS / 16], later[KEYS / 16];
            const int num_panels = find_slots(part, key, slots);
            // The blocks of a sequence lie anywhere: the processor cannot guess what comes next.
            int num_later = 0;
            if (key + KEYS < part.end) num_later = find_slots(part, key + KEYS, later);
            else if (next.tokens > 0) num_later = find_slots(next, next.oldest / KEYS * KEYS, later);
            for (int i = num_panels; i < num_later; ++i) {
                fetch(keys + later[i] * D, 16 * D);
                fetch(values + later[i] * D, 16 * D);
            }
            const T *key_panels[KEYS / 16], *later_keys[KEYS / 16];
            for (int i = 0; i < num_panels; ++i) {
                key_panels[i] = keys + slots[i] * D;
                later_keys[i] = i < num_later ? keys + later[i] * D : key_panels[i];
            }
            for (int64_t r = 0; r < rows;) {
                const int count = next_block(rows - r, MAX_ROWS);
                fma_block<T, SECOND_LEVEL>(count, q + r * D, D, key_panels, r == 0 ? later_keys : key_panels, num_panels,
                                           16, D, p + r * KEYS, KEYS, false);
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
                    if (sizeof(T) == 1) v = v * load(cache.key_scales + slots[i]);
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
                    if (sizeof(T) == 1) {
                        e = where_between(from - 16 * i, to - 16 * i, e * load(cache.value_scales + slots[i]), e);
                    }
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
                    const T* own = values + slots[i] * D;
                    add_values<T>(count, from, to, p + r * KEYS + 16 * i, own,
                                  r == 0 && i < num_later ? values + later[i] * D : own, D, (int)panels_of_head,
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
