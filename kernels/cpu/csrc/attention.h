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

constexpr int64_t KEYS = 64;
constexpr int64_t PART_ROWS = 24;  // about so many rows share the keys

inline F16 cap(F16 s, float softcap) {
    // softcap * tanh(s / softcap) = softcap * (1 - 2 / (1 + e^(2 s / softcap)))
    F16 e = exp(s * splat(2.0f / softcap));
    return splat(softcap) * (splat(1.0f) - splat(2.0f) / (splat(1.0f) + e));
}

// Some of a block's keys that follow each other in one sixteen: the first one's place in the block, how many, their
// values, and values that are fetched meanwhile.
template <class T>
struct Stretch {
    int64_t first, length;
    const T *values, *later;
};

// acc += p v over the keys of the stretches, for M rows and P times 16 elements of the head.
template <class T, int M, int P>
inline void add_tile(const float* p, const Stretch<T>* stretches, int count, int64_t D, int64_t element, float* acc,
                     int64_t lda) {
    F16 sum[M][P];
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int i = 0; i < P; ++i) {
            sum[m][i] = load(acc + m * lda + 16 * i);
        }
    }
    for (int s = 0; s < count; ++s) {
        const T *panel[P], *later[P];
        STET_UNROLL for (int i = 0; i < P; ++i) {
            panel[i] = stretches[s].values + element + 16 * i;
            later[i] = stretches[s].later + element + 16 * i;
        }
        fma_chain<T, SECOND_LEVEL>(sum, p + stretches[s].first, KEYS, panel, later, D, stretches[s].length);
    }
    store_tile(sum, acc, lda);
}

template <class T, int M>
inline void add_rows(const float* p, const Stretch<T>* stretches, int count, int64_t D, int panels, float* acc,
                     int64_t lda) {
    constexpr int P = panels_at_once(M);
    int i = 0;
    for (; i + P <= panels; i += P) {
        add_tile<T, M, P>(p, stretches, count, D, 16 * i, acc + 16 * i, lda);
    }
    for (; i < panels; ++i) {
        add_tile<T, M, 1>(p, stretches, count, D, 16 * i, acc + 16 * i, lda);
    }
}

template <class T>
inline void add_block(int rows, const float* p, const Stretch<T>* stretches, int count, int64_t D, int panels, float* acc,
                      int64_t lda) {
    switch (rows) {
        case 1: return add_rows<T, 1>(p, stretches, count, D, panels, acc, lda);
        case 2: return add_rows<T, 2>(p, stretches, count, D, panels, acc, lda);
        case 3: return add_rows<T, 3>(p, stretches, count, D, panels, acc, lda);
        case 4: return add_rows<T, 4>(p, stretches, count, D, panels, acc, lda);
        case 5: return add_rows<T, 5>(p, stretches, count, D, panels, acc, lda);
        case 6: return add_rows<T, 6>(p, stretches, count, D, panels, acc, lda);
#if defined(STET_AVX512)
        case 7: return add_rows<T, 7>(p, stretches, count, D, panels, acc, lda);
        case 8: return add_rows<T, 8>(p, stretches, count, D, panels, acc, lda);
        case 9: return add_rows<T, 9>(p, stretches, count, D, panels, acc, lda);
        case 10: return add_rows<T, 10>(p, stretches, count, D, panels, acc, lda);
        case 11: return add_rows<T, 11>(p, stretches, count, D, panels, acc, lda);
        case 12: return add_rows<T, 12>(p, stretches, count, D, panels, acc, lda);
#endif
    }
}

// acc[r] += p[r] v over a block of keys, for `count` rows from r on. Row r sees the keys from[r] to to[r] - 1 of the block:
// those that all of these rows see are added together, what single rows see before and after them one row at a time.
// values, later: of each sixteen.
template <class T>
inline void add_values(int count, const int32_t* from, const int32_t* to, const float* p, const T* const* values,
                       const T* const* later, int64_t D, int panels, float* acc, int64_t lda) {
    auto add = [&](int row, int rows, int first, int last) {
        Stretch<T> stretches[KEYS / 16];
        int n = 0;
        for (int i = first / 16; i * 16 < last; ++i) {
            const int begin = first > 16 * i ? first : 16 * i, end = last < 16 * i + 16 ? last : 16 * i + 16;
            const int64_t at = (begin - 16 * i) * D;
            stretches[n++] = {begin, end - begin, values[i] + at, later[i] + at};
        }
        if (n) add_block<T>(rows, p + row * KEYS, stretches, n, D, panels, acc + row * lda, lda);
    };
    int first = 0, last = KEYS;
    for (int i = 0; i < count; ++i) {
        first = from[i] > first ? from[i] : first;
        last = to[i] < last ? to[i] : last;
    }
    if (first >= last) {
        for (int i = 0; i < count; ++i) {
            if (from[i] < to[i]) add(i, 1, from[i], to[i]);
        }
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (from[i] < first) add(i, 1, from[i], first);
    }
    add(0, count, first, last);
    for (int i = 0; i < count; ++i) {
        if (last < to[i]) add(i, 1, last, to[i]);
    }
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

    const int64_t padded_rows = (rows_most + 15) / 16 * 16;
    float* q = work.scratch;                           // [rows][D]
    float* acc = q + rows_most * D;                    // [rows][16 * panels_of_head]
    float* p = acc + rows_most * panels_of_head * 16;  // [rows][KEYS]
    float* m = p + rows_most * KEYS;                   // [padded_rows]
    float* next_m = m + padded_rows;                   // [padded_rows]
    float* shrink = next_m + padded_rows;              // [padded_rows]: e^(m - next_m)
    float* l = shrink + padded_rows;                   // [rows]
    int32_t* from = (int32_t*)(l + rows_most);         // [rows]: the keys of a block that a row sees are from[r] …
    int32_t* to = from + rows_most;                    // [rows]: … to to[r] - 1
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
            m[r] = next_m[r] = -INFINITY;
            l[r] = 0.0f;
        }
        // The rest is computed along and not used.
        for (int64_t r = rows; r < padded_rows; ++r) m[r] = next_m[r] = 0.0f;
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
                                           16, D, p + r * KEYS, KEYS);
                r += count;
            }
            for (int64_t t = 0; t < part.tokens; ++t) {
                const int64_t oldest = oldest_of(position + t) - key, seen = position + t + 1 - key;
                for (int64_t r = t * group; r < (t + 1) * group; ++r) {
                    from[r] = (int32_t)(oldest < 0 ? 0 : oldest < KEYS ? oldest : KEYS);
                    to[r] = (int32_t)(seen < 0 ? 0 : seen < KEYS ? seen : KEYS);
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                float* s = p + r * KEYS;
                F16 best = splat(-INFINITY);
                for (int i = from[r] / 16; 16 * i < to[r]; ++i) {
                    F16 v = load(s + 16 * i) * splat(scale);
                    if (sizeof(T) == 1) v = v * load(cache.key_scales + slots[i]);
                    if (softcap > 0.0f) v = cap(v, softcap);
                    if (from[r] > 16 * i || to[r] < 16 * i + 16) {
                        v = where_between(from[r] - 16 * i, to[r] - 16 * i, v, splat(-INFINITY));
                    }
                    store(s + 16 * i, v);
                    best = max(v, best);
                }
                const float largest_score = largest(best);
                next_m[r] = m[r] > largest_score ? m[r] : largest_score;
            }
            for (int64_t r = 0; r < rows; r += 16) {
                store(shrink + r, exp(load(m + r) - load(next_m + r)));
            }
            for (int64_t r = 0; r < rows; ++r) {
                if (from[r] >= to[r]) continue;
                float* s = p + r * KEYS;
                F16 total = splat(0.0f);
                for (int i = from[r] / 16; 16 * i < to[r]; ++i) {
                    F16 e = exp(load(s + 16 * i) - splat(next_m[r]));
                    total = total + e;
                    if (sizeof(T) == 1) {
                        e = where_between(from[r] - 16 * i, to[r] - 16 * i, e * load(cache.value_scales + slots[i]), e);
                    }
                    store(s + 16 * i, e);
                }
                if (m[r] != next_m[r]) {
                    l[r] = l[r] * shrink[r];
                    const F16 by = splat(shrink[r]);
                    for (int64_t i = 0; i < lda; i += 16) {
                        store(acc + r * lda + i, load(acc + r * lda + i) * by);
                    }
                    m[r] = next_m[r];
                }
                l[r] = l[r] + sum(total);
            }
            const T *own_values[KEYS / 16], *later_values[KEYS / 16];
            for (int i = 0; i < num_panels; ++i) {
                own_values[i] = values + slots[i] * D;
                later_values[i] = i < num_later ? values + later[i] * D : own_values[i];
            }
            for (int64_t r = 0; r < rows;) {
                const int count = next_block(rows - r, MAX_ROWS);
                add_values<T>(count, from + r, to + r, p + r * KEYS, own_values, r == 0 ? later_values : own_values, D,
                              (int)panels_of_head, acc + r * lda, lda);
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
