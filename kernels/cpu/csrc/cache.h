// A token's query, key and value: normalized by heads, rotated, and K and V written to their slot of the cache.

// Rotate the first 2 * half elements of a head, halves against each other (arXiv:2104.09864).
inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        F16 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

// The first slot of the block that holds a token, counted as if the cache had one KV head.
inline int64_t slot_of(const Step* step, int64_t token, int64_t block_size) {
    const int64_t entry = step->sequences[token] * step->table_stride + step->positions[token] / block_size;
    return step->block_tables[entry] * block_size;
}

// One head of one token into the cache: n elements, `apart` elements from one to the next.
inline void store_head(const Cache& cache, void* to, int64_t first, int64_t apart, float* scales, int64_t slot,
                       const float* x) {
    const int64_t n = cache.head_dim;
    if (cache.type == INT8) {
        int8_t q[MAX_HEAD_DIM];
        quantize_row(x, n, n, q, scales + slot);
        for (int64_t i = 0; i < n; ++i) ((int8_t*)to)[first + i * apart] = q[i];
    } else if (cache.type == FLOAT32) {
        for (int64_t i = 0; i < n; ++i) ((float*)to)[first + i * apart] = x[i];
    } else {
        bfloat16 rounded[MAX_HEAD_DIM];
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {  // of so many, known beforehand, the compiler makes vectors
            for (int lane = 0; lane < 16; ++lane) rounded[i + lane] = to_bfloat16(x[i + lane]);
        }
        for (; i < n; ++i) rounded[i] = to_bfloat16(x[i]);
        for (i = 0; i < n; ++i) ((bfloat16*)to)[first + i * apart] = rounded[i];
    }
}

// p: query, key, value, cosines and sines [positions][rotary_dim / 2], query norm, key norm (null: none), Cache,
// rotated queries [T][Hq][D].  n: Hq, rotary_dim / 2, elements from token to token of query, key, value.  f: eps.
void write_kv(const Command& c, const Step* step, Work& work) {
    const Cache& cache = *(const Cache*)c.p[7];
    const int64_t D = cache.head_dim, kv_heads = cache.num_heads, heads = c.n[0], half = c.n[1], size = cache.block_size;
    const int64_t element = cache.type == FLOAT32 ? 4 : cache.type == INT8 ? 1 : 2, tokens = step->num_tokens;
    float* head = work.scratch;
    auto prepare = [&](int64_t position, const float* x, const void* norm, float* y) {
        if (norm) scale_row(x, (const float*)norm, inverse_rms(x, D, c.f[0]), D, y);
        else std::memcpy(y, x, D * sizeof(float));
        rotate(y, (const float*)c.p[3] + position * half, (const float*)c.p[4] + position * half, half);
    };
    // Sixteen neighbours of a sequence share the lines of their keys. So where there are many tokens a thread takes as
    // many at once, and a head's lines stay with it, in its first-level cache, until they are full.
    const int64_t run = tokens >= 32 * work.num_threads ? 16 : 1;
    for (int64_t begin; (begin = work.take() * run) < tokens;) {
        const int64_t end = begin + run < tokens ? begin + run : tokens;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t position = step->positions[token];
            if (run == 1) {
                // A token's keys are scattered over as many lines as there are pairs of elements: they come while
                // queries are rotated.
                const int64_t first_slot = slot_of(step, token, size) * kv_heads + position % size / 16 * 16;
                for (int64_t h = 0; h < kv_heads; ++h) {
                    const char* lines = (const char*)cache.keys + (first_slot + h * size) * D * element;
                    for (int64_t at = 0; at < 16 * D * element; at += 64) __builtin_prefetch(lines + at, 1);
                }
            }
            for (int64_t h = 0; h < heads; ++h) {
                const float* x = (const float*)c.p[0] + token * c.n[2] + h * D;
                prepare(position, x, c.p[5], (float*)c.p[8] + (token * heads + h) * D);
            }
        }
        for (int64_t h = 0; h < kv_heads; ++h) {
            for (int64_t token = begin; token < end; ++token) {
                const int64_t position = step->positions[token], offset = position % size;
                const int64_t slots = slot_of(step, token, size) * kv_heads + h * size;  // of this block and head
                prepare(position, (const float*)c.p[1] + token * c.n[3] + h * D, c.p[6], head);
                store_head(cache, cache.keys, slots * D + offset / 16 * 16 * D + offset % 16, 16, cache.key_scales,
                           slots + offset, head);
                store_head(cache, cache.values, (slots + offset) * D, 1, cache.value_scales, slots + offset,
                           (const float*)c.p[2] + token * c.n[4] + h * D);
            }
        }
    }
}
