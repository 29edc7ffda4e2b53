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

inline void store_element(void* to, int64_t index, int32_t type, float x) {
    if (type == FLOAT32) ((float*)to)[index] = x;
    else ((bfloat16*)to)[index] = to_bfloat16(x);
}

// One head of one token into the cache: n elements, `apart` elements from one to the next.
inline void store_head(const Cache& cache, void* to, int64_t first, int64_t apart, float* scales, int64_t slot,
                       const float* x) {
    const int64_t n = cache.head_dim;
    if (cache.type == INT8) {
        int8_t q[1024];
        quantize_row(x, n, n, q, scales + slot);
        for (int64_t i = 0; i < n; ++i) {
            ((int8_t*)to)[first + i * apart] = q[i];
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        store_element(to, first + i * apart, cache.type, x[i]);
    }
}

// p: query, key, value, cosines and sines [positions][rotary_dim / 2], query norm, key norm (null: none), Cache,
// rotated queries [T][Hq][D].  n: Hq, rotary_dim / 2, elements from token to token of query, key, value.  f: eps.
void write_kv(const Command& c, const Step* step, Work& work) {
    const Cache& cache = *(const Cache*)c.p[7];
    const int64_t D = cache.head_dim, kv_heads = cache.num_heads, heads = c.n[0], half = c.n[1], size = cache.block_size;
    float* head = work.scratch;
    for (int64_t token; (token = work.take()) < step->num_tokens;) {
        const int64_t position = step->positions[token];
        const int64_t block = step->block_tables[step->sequences[token] * step->table_stride + position / size];
        const int64_t offset = position % size;
        const float *cos = (const float*)c.p[3] + position * half, *sin = (const float*)c.p[4] + position * half;
        // A token's keys are scattered over as many lines as there are pairs of elements: they come while queries are
        // rotated.
        const int64_t element = cache.type == FLOAT32 ? 4 : cache.type == INT8 ? 1 : 2;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t slot = (block * kv_heads + h) * size + offset / 16 * 16;
            const char* lines = (const char*)cache.keys + slot * D * element;
            for (int64_t at = 0; at < 16 * D * element; at += 64) __builtin_prefetch(lines + at, 1);
        }
        auto prepare = [&](const float* x, const void* norm, float* y) {
            if (norm) scale_row(x, (const float*)norm, inverse_rms(x, D, c.f[0]), D, y);
            else std::memcpy(y, x, D * sizeof(float));
            rotate(y, cos, sin, half);
        };
        for (int64_t h = 0; h < heads; ++h) {
            prepare((const float*)c.p[0] + token * c.n[2] + h * D, c.p[5], (float*)c.p[8] + (token * heads + h) * D);
        }
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t rows = (block * kv_heads + h) * size;  // the first slot of this block and head
            prepare((const float*)c.p[1] + token * c.n[3] + h * D, c.p[6], head);
            store_head(cache, cache.keys, rows * D + offset / 16 * 16 * D + offset % 16, 16, cache.key_scales,
                       rows + offset, head);
            store_head(cache, cache.values, (rows + offset) * D, 1, cache.value_scales, rows + offset,
                       (const float*)c.p[2] + token * c.n[4] + h * D);
        }
    }
}
