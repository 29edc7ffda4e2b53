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
constexpr int MAX_ROWS = 8;  // rows at once
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

// x [M][ldx] floats; w[p] points to panel p: 16 lanes at k, then stride elements on, 16 lanes at k + 1, and so on.
// later[p] is fetched to the given level, in the same pattern as w[p] is read.
// acc [M][lda] floats, panel p at acc + 16 p: read if `resume`, else 0; then written.
template <class T, int Level, int M, int P>
inline void fma_tile(const float* x, int64_t ldx, const T* const* w, const T* const* later, int64_t stride, int64_t K,
                     float* acc, int64_t lda, bool resume) {
    F16 sum[M][P];
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            sum[m][p] = resume ? load(acc + m * lda + 16 * p) : splat(0.0f);
        }
    }
    const T* wp[P];
    int64_t ahead[P];
    STET_UNROLL for (int p = 0; p < P; ++p) {
        wp[p] = w[p];
        ahead[p] = (const char*)later[p] - (const char*)w[p];
    }
    for (int64_t k = 0; k < K; ++k) {
        F16 lanes[P];
        STET_UNROLL for (int p = 0; p < P; ++p) {
            __builtin_prefetch((const char*)wp[p] + ahead[p], 0, Level == FIRST_LEVEL ? 3 : 2);
            lanes[p] = load(wp[p]);
            wp[p] += stride;
        }
        STET_UNROLL for (int m = 0; m < M; ++m) {
            F16 each = splat(x[m * ldx + k]);
            STET_UNROLL for (int p = 0; p < P; ++p) {
                sum[m][p] = fma(each, lanes[p], sum[m][p]);
            }
        }
    }
    STET_UNROLL for (int m = 0; m < M; ++m) {
        STET_UNROLL for (int p = 0; p < P; ++p) {
            store(acc + m * lda + 16 * p, sum[m][p]);
        }
    }
}

// fma_tile for M rows and any number of panels.
template <class T, int Level, int M>
inline void fma_rows(const float* x, int64_t ldx, const T* const* w, const T* const* later, int num_panels,
                     int64_t stride, int64_t K, float* acc, int64_t lda, bool resume) {
    constexpr int P = panels_at_once(M);
    int p = 0;
    for (; p + P <= num_panels; p += P) {
        fma_tile<T, Level, M, P>(x, ldx, w + p, later + p, stride, K, acc + 16 * p, lda, resume);
    }
    for (; p < num_panels; ++p) {
        fma_tile<T, Level, M, 1>(x, ldx, w + p, later + p, stride, K, acc + 16 * p, lda, resume);
    }
}

// fma_tile for `rows` (1 to MAX_ROWS) rows and any number of panels.
template <class T, int Level>
inline void fma_block(int rows, const float* x, int64_t ldx, const T* const* w, const T* const* later, int num_panels,
                      int64_t stride, int64_t K, float* acc, int64_t lda, bool resume) {
    switch (rows) {
        case 1: return fma_rows<T, Level, 1>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 2: return fma_rows<T, Level, 2>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 3: return fma_rows<T, Level, 3>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 4: return fma_rows<T, Level, 4>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 5: return fma_rows<T, Level, 5>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 6: return fma_rows<T, Level, 6>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
#if defined(STET_AVX512)
        case 7: return fma_rows<T, Level, 7>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
        case 8: return fma_rows<T, Level, 8>(x, ldx, w, later, num_panels, stride, K, acc, lda, resume);
#endif
    }
}

// Rows are quantized to integers of which GROUP_OF take four bytes, as the instruction multiplies them; a weight's panel
// has as many of one output feature side by side: [K / GROUP_OF][16][GROUP_OF] int8.
#if defined(STET_AVX512)
using RowInteger = int8_t;
#else
using RowInteger = int16_t;
#endif
constexpr int GROUP_OF = 4 / sizeof(RowInteger);
constexpr int64_t whole_groups(int64_t k) { return (k + GROUP_OF - 1) / GROUP_OF * GROUP_OF; }

// One panel of 16 output features: w [K / GROUP_OF][16][GROUP_OF], x [M][ldx], out [M][16] int32.
template <int M>
inline void dot_tile(const RowInteger* x, int64_t ldx, const int8_t* w, int64_t K, int32_t* out) {
#if defined(STET_AVX512)
    // The instruction multiplies unsigned by signed bytes: x + 128 is unsigned, and 128 times the sum of the weights,
    // which one more row of ones gives, is taken off again.
    __m512i sum[M], offset = _mm512_setzero_si512();
    STET_UNROLL for (int m = 0; m < M; ++m) {
        sum[m] = _mm512_setzero_si512();
    }
    const __m512i flip = _mm512_set1_epi32((int)0x80808080u);
    for (int64_t k = 0; k < K; k += 4) {
        __builtin_prefetch(w + 16 * k + AHEAD);
        __m512i lanes = _mm512_loadu_si512(w + 16 * k);
        offset = _mm512_dpbusd_epi32(offset, flip, lanes);
        STET_UNROLL for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, x + m * ldx + k, 4);
            sum[m] = _mm512_dpbusd_epi32(sum[m], _mm512_xor_si512(_mm512_set1_epi32(four), flip), lanes);
        }
    }
    STET_UNROLL for (int m = 0; m < M; ++m) {
        _mm512_storeu_si512(out + 16 * m, _mm512_sub_epi32(sum[m], offset));
    }
#elif defined(STET_AVX2)
    // The instruction for bytes adds pairs of products in 16 bits, where they need not fit; the one for 16 bits is exact.
    __m256i sum[M][2];
    STET_UNROLL for (int m = 0; m < M; ++m) {
        sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    }
    for (int64_t k = 0; k < K; k += 2) {
        __builtin_prefetch(w + 16 * k + AHEAD);
        __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * k)));
        __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * k + 16)));
        STET_UNROLL for (int m = 0; m < M; ++m) {
            int32_t two;
            std::memcpy(&two, x + m * ldx + k, 4);
            __m256i each = _mm256_set1_epi32(two);
            sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(each, low));
            sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(each, high));
        }
    }
    STET_UNROLL for (int m = 0; m < M; ++m) {
        _mm256_storeu_si256((__m256i*)(out + 16 * m), sum[m][0]);
        _mm256_storeu_si256((__m256i*)(out + 16 * m + 8), sum[m][1]);
    }
#else
    std::memset(out, 0, sizeof(int32_t) * 16 * M);
    for (int64_t k = 0; k < K; k += GROUP_OF) {
        for (int m = 0; m < M; ++m) {
            for (int lane = 0; lane < 16; ++lane) {
                for (int i = 0; i < GROUP_OF; ++i) {
                    out[16 * m + lane] += (int32_t)x[m * ldx + k + i] * (int32_t)w[16 * k + GROUP_OF * lane + i];
                }
            }
        }
    }
#endif
}

inline void dot_block(int rows, const RowInteger* x, int64_t ldx, const int8_t* w, int64_t K, int32_t* out) {
    switch (rows) {
        case 1: return dot_tile<1>(x, ldx, w, K, out);
        case 2: return dot_tile<2>(x, ldx, w, K, out);
        case 3: return dot_tile<3>(x, ldx, w, K, out);
        case 4: return dot_tile<4>(x, ldx, w, K, out);
        case 5: return dot_tile<5>(x, ldx, w, K, out);
        case 6: return dot_tile<6>(x, ldx, w, K, out);
#if defined(STET_AVX512)
        case 7: return dot_tile<7>(x, ldx, w, K, out);
        case 8: return dot_tile<8>(x, ldx, w, K, out);
#endif
    }
}

// How many rows the next block takes so that `rows` are shared out evenly, `most` at once.
inline int next_block(int64_t rows, int most) {
    int64_t blocks = (rows + most - 1) / most;
    return (int)((rows + blocks - 1) / blocks);
}
