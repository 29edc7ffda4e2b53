// The two inner loops that everything large is made of.
//
// fma_tile   out[m][lane] = a chain of fused multiply-adds along k, from its start on, for M rows and P panels of 16
//            lanes. A linear layer's lanes are output features, those of attention's scores are keys, those of its
//            outputs are elements of a head.
// dot_tile   the same in integers, four products at a time; exact, so that its order does not matter.
//
// Each element is computed alike whatever M and P are: that is what makes rows independent of their number.

// Loops over the rows and panels of a tile must be gone before the compiler assigns registers.
#define STET_UNROLL _Pragma("GCC unroll 16")

#if defined(STET_AVX512)
constexpr int MAX_ROWS = 12;  // at once: 24 sums, two panels and what is multiplied fill 27 of 32 registers
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 2; }
#else
constexpr int MAX_ROWS = 6;
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

// What will be multiplied later is asked for line by line while this is multiplied: left to itself the processor fetches
// while it multiplies single rows, but not while it multiplies several; then a step would take the sum of both times, not
// the larger one. Where a weight's panels follow each other, what comes later is so many bytes on, and is fetched to the
// first level of the caches: the processor then sees a stream, and runs ahead of it. Blocks of a KV cache lie scattered;
// they go to the second level, which has room for more lines on their way.
constexpr int64_t AHEAD = 2048;
constexpr int FIRST_LEVEL = 1, SECOND_LEVEL = 2;

// The same element of M rows, `ld` apart.
//
// With many rows: a pointer for every third of them; x + m ld is then one operand, and all pointers stay in registers. The
// compiler would make one for each row, and load most of them from the stack in each turn; it cannot, where it does not
// know what becomes of them.
template <class T, int M>
struct Rows {
    static constexpr int STEP = M > 6 ? 3 : 1, COUNT = (M + STEP - 1) / STEP;
    const T* first[COUNT];
    const int64_t ld;

    Rows(const T* x, int64_t ld) : ld(ld) {
        STET_UNROLL for (int i = 0; i < COUNT; ++i) {
            first[i] = x + STEP * i * ld;
        }
    }
    const T* at(int m) const { return first[m / STEP] + m % STEP * ld; }
    void advance(int by) {
        STET_UNROLL for (int i = 0; i < COUNT; ++i) {
            first[i] += by;
            if (STEP > 1) asm("" : "+r"(first[i]));
        }
    }
};

// sum += x w over k, for x [M][ldx] floats; w[p] points to panel p: 16 lanes at k, then stride elements on, 16 lanes at
// k + 1, and so on. later[p] is fetched to the given level, in the same pattern as w[p] is read.
template <class T, int Level, int M, int P>
inline __attribute__((always_inline)) void fma_chain(F16 (&sum)[M][P], const float* x, int64_t ldx, const T* const* w,
                                                     const T* const* later, int64_t stride, int64_t K) {
    const T* wp[P];
    int64_t ahead[P];
    STET_UNROLL for (int p = 0; p < P; ++p) {
        wp[p] = w[p];
        ahead[p] = (const char*)later[p] - (const char*)w[p];
    }
    Rows<float, M> rows(x, ldx);
    for (int64_t k = 0; k < K; ++k) {
        F16 lanes[P];
        STET_UNROLL for (int p = 0; p < P; ++p) {
            __builtin_prefetch((const char*)wp[p] + ahead[p], 0, Level == FIRST_LEVEL ? 3 : 2);
            lanes[p] = load(wp[p]);
            wp[p] += stride;
        }
        STET_UNROLL for (int m = 0; m < M; ++m) {
            F16 each = splat(*rows.at(m));
            STET_UNROLL for (int p = 0; p < P; ++p) {
                sum[m][p] = fma(each, lanes[p], sum[m][p]);
            }
        }
        rows.advance(1);
    }
}

template <int M, int P>
inline void store_tile(F16 (&sum)[M][P], float* acc, int64_t lda) {
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            store(acc + m * lda + 16 * p, sum[m][p]);
        }
    }
}

// acc = x w, as `fma_chain` has it: acc [M][lda] floats, panel p at acc + 16 p.
template <class T, int Level, int M, int P>
inline void fma_tile(const float* x, int64_t ldx, const T* const* w, const T* const* later, int64_t stride, int64_t K,
                     float* acc, int64_t lda) {
    F16 sum[M][P];
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            sum[m][p] = splat(0.0f);
        }
    }
    fma_chain<T, Level>(sum, x, ldx, w, later, stride, K);
    store_tile(sum, acc, lda);
}

// fma_tile for M rows and any number of panels.
template <class T, int Level, int M>
inline void fma_rows(const float* x, int64_t ldx, const T* const* w, const T* const* later, int num_panels,
                     int64_t stride, int64_t K, float* acc, int64_t lda) {
    constexpr int P = panels_at_once(M);
    int p = 0;
    for (; p + P <= num_panels; p += P) {
        fma_tile<T, Level, M, P>(x, ldx, w + p, later + p, stride, K, acc + 16 * p, lda);
    }
    for (; p < num_panels; ++p) {
        fma_tile<T, Level, M, 1>(x, ldx, w + p, later + p, stride, K, acc + 16 * p, lda);
    }
}

// fma_tile for `rows` (1 to MAX_ROWS) rows and any number of panels.
template <class T, int Level>
inline void fma_block(int rows, const float* x, int64_t ldx, const T* const* w, const T* const* later, int num_panels,
                      int64_t stride, int64_t K, float* acc, int64_t lda) {
    switch (rows) {
        case 1: return fma_rows<T, Level, 1>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 2: return fma_rows<T, Level, 2>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 3: return fma_rows<T, Level, 3>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 4: return fma_rows<T, Level, 4>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 5: return fma_rows<T, Level, 5>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 6: return fma_rows<T, Level, 6>(x, ldx, w, later, num_panels, stride, K, acc, lda);
#if defined(STET_AVX512)
        case 7: return fma_rows<T, Level, 7>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 8: return fma_rows<T, Level, 8>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 9: return fma_rows<T, Level, 9>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 10: return fma_rows<T, Level, 10>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 11: return fma_rows<T, Level, 11>(x, ldx, w, later, num_panels, stride, K, acc, lda);
        case 12: return fma_rows<T, Level, 12>(x, ldx, w, later, num_panels, stride, K, acc, lda);
#endif
    }
}

// Rows are quantized to integers of which GROUP_OF take four bytes, as the instruction multiplies them; a weight's panel
// has as many of one output feature side by side: [K / GROUP_OF][16][GROUP_OF] int8. AVX-512's instruction multiplies
// unsigned by signed bytes: there a weight is stored as w + 128 (`stet_pack_dot`), and 128 times the sum of the row is
// taken off its results.
#if defined(STET_AVX512)
using RowInteger = int8_t;
constexpr int STORED_ABOVE = 128;
constexpr int DOT_ROWS = 12;  // at once: 24 sums, two panels and what is multiplied fill 27 of 32 registers
constexpr int dot_panels_at_once(int rows) { return rows == 1 ? 4 : 2; }
#else
using RowInteger = int16_t;
constexpr int STORED_ABOVE = 0;
constexpr int DOT_ROWS = 6;
constexpr int dot_panels_at_once(int) { return 1; }
#endif
constexpr int GROUP_OF = 4 / sizeof(RowInteger);
constexpr int64_t whole_groups(int64_t k) { return (k + GROUP_OF - 1) / GROUP_OF * GROUP_OF; }
inline float stored_weight(int8_t w) { return (float)(STORED_ABOVE ? (uint8_t)w - STORED_ABOVE : w); }

// What is taken off the results of a row. K is a multiple of GROUP_OF.
inline int32_t row_excess(const RowInteger* x, int64_t K) {
#if defined(STET_AVX512)
    __m512i total = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < K; k += 64) {
        const __mmask64 there = K - k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (K - k)) - 1;
        total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_loadu_epi8(there, x + k));
    }
    return STORED_ABOVE * _mm512_reduce_add_epi32(total);
#else
    (void)x, (void)K;
    return 0;
#endif
}

// P panels of 16 output features: w [P][K / GROUP_OF][16][GROUP_OF], x [M][ldx]. `later` is fetched to the given level in the
// same pattern as w is read. done(m, p, v): v are the sums of row m and panel p, rounded to float32.
template <int Level, int M, int P, class F>
inline void dot_tile(const RowInteger* x, int64_t ldx, const int32_t* excess, const int8_t* w, const int8_t* later,
                     int64_t K, F done) {
#if defined(STET_AVX512)
    const int64_t ahead = later - w, panel_bytes = 16 * K;
    // Sums of integers, not __m512i, which stands for eight of 64 bits: with that type in between the compiler copies
    // every sum in each turn, and spills most of them.
    __v16si sum[M][P];
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            sum[m][p] = __v16si{};
        }
    }
    Rows<RowInteger, M> rows(x, ldx);
    for (int64_t k = 0; k < K; k += 4, w += 64) {
        __m512i lanes[P];
        STET_UNROLL for (int p = 0; p < P; ++p) {
            __builtin_prefetch(w + p * panel_bytes + ahead, 0, Level == FIRST_LEVEL ? 3 : 2);
            lanes[p] = _mm512_loadu_si512(w + p * panel_bytes);
        }
        STET_UNROLL for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, rows.at(m), 4);
            const __m512i each = _mm512_set1_epi32(four);
            STET_UNROLL for (int p = 0; p < P; ++p) {
                sum[m][p] = (__v16si)_mm512_dpbusd_epi32((__m512i)sum[m][p], lanes[p], each);
            }
        }
        rows.advance(4);
    }
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            const __v16si exact = sum[m][p] - (__v16si)_mm512_set1_epi32(excess[m]);
            done(m, p, F16{_mm512_cvtepi32_ps((__m512i)exact)});
        }
    }
#elif defined(STET_AVX2)
    // The instruction for bytes adds pairs of products in 16 bits, where they need not fit; the one for 16 bits is exact.
    static_assert(P == 1);
    (void)excess;
    __v8si sum[M][2];  // see above
    STET_UNROLL for (int m = 0; m < M; ++m) {
        sum[m][0] = sum[m][1] = __v8si{};
    }
    for (int64_t k = 0; k < K; k += 2) {
        __builtin_prefetch(later + 16 * k, 0, Level == FIRST_LEVEL ? 3 : 2);
        __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * k)));
        __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * k + 16)));
        STET_UNROLL for (int m = 0; m < M; ++m) {
            int32_t two;
            std::memcpy(&two, x + m * ldx + k, 4);
            __m256i each = _mm256_set1_epi32(two);
            sum[m][0] += (__v8si)_mm256_madd_epi16(each, low);
            sum[m][1] += (__v8si)_mm256_madd_epi16(each, high);
        }
    }
    STET_UNROLL for (int m = 0; m < M; ++m) {
        done(m, 0, F16{_mm256_cvtepi32_ps((__m256i)sum[m][0]), _mm256_cvtepi32_ps((__m256i)sum[m][1])});
    }
#else
    static_assert(P == 1);
    (void)excess, (void)later;
    for (int m = 0; m < M; ++m) {
        int32_t sum[16] = {};
        for (int64_t k = 0; k < K; k += GROUP_OF) {
            for (int lane = 0; lane < 16; ++lane) {
                for (int i = 0; i < GROUP_OF; ++i) {
                    sum[lane] += (int32_t)x[m * ldx + k + i] * (int32_t)w[16 * k + GROUP_OF * lane + i];
                }
            }
        }
        F16 rounded;
        for (int lane = 0; lane < 16; ++lane) {
            rounded.v[lane] = (float)sum[lane];
        }
        done(m, 0, rounded);
    }
#endif
}

// dot_tile for M rows and any number of panels.
template <int Level, int M, class F>
inline void dot_rows(const RowInteger* x, int64_t ldx, const int8_t* w, const int8_t* later, int num_panels, int64_t K,
                     F done) {
    constexpr int P = dot_panels_at_once(M);
    int32_t excess[M];
    for (int m = 0; m < M; ++m) {
        excess[m] = row_excess(x + m * ldx, K);
    }
    int p = 0;
    for (; p + P <= num_panels; p += P) {
        dot_tile<Level, M, P>(x, ldx, excess, w + p * 16 * K, later + p * 16 * K, K,
                              [&](int m, int i, F16 v) { done(m, p + i, v); });
    }
    for (; p < num_panels; ++p) {
        dot_tile<Level, M, 1>(x, ldx, excess, w + p * 16 * K, later + p * 16 * K, K,
                              [&](int m, int, F16 v) { done(m, p, v); });
    }
}

// dot_tile for `rows` (1 to DOT_ROWS) rows and any number of panels.
template <int Level, class F>
inline void dot_block(int rows, const RowInteger* x, int64_t ldx, const int8_t* w, const int8_t* later, int num_panels,
                      int64_t K, F done) {
    switch (rows) {
        case 1: return dot_rows<Level, 1>(x, ldx, w, later, num_panels, K, done);
        case 2: return dot_rows<Level, 2>(x, ldx, w, later, num_panels, K, done);
        case 3: return dot_rows<Level, 3>(x, ldx, w, later, num_panels, K, done);
        case 4: return dot_rows<Level, 4>(x, ldx, w, later, num_panels, K, done);
        case 5: return dot_rows<Level, 5>(x, ldx, w, later, num_panels, K, done);
        case 6: return dot_rows<Level, 6>(x, ldx, w, later, num_panels, K, done);
#if defined(STET_AVX512)
        case 7: return dot_rows<Level, 7>(x, ldx, w, later, num_panels, K, done);
        case 8: return dot_rows<Level, 8>(x, ldx, w, later, num_panels, K, done);
        case 9: return dot_rows<Level, 9>(x, ldx, w, later, num_panels, K, done);
        case 10: return dot_rows<Level, 10>(x, ldx, w, later, num_panels, K, done);
        case 11: return dot_rows<Level, 11>(x, ldx, w, later, num_panels, K, done);
        case 12: return dot_rows<Level, 12>(x, ldx, w, later, num_panels, K, done);
#endif
    }
}

// How many rows the next block takes so that `rows` are shared out evenly, `most` at once.
inline int next_block(int64_t rows, int most) {
    int64_t blocks = (rows + most - 1) / most;
    return (int)((rows + blocks - 1) / blocks);
}
