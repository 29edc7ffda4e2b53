// Sixteen floats at a time, with one arithmetic on every processor.
//
// F16 is one 512-bit register (AVX-512), two 256-bit registers (AVX2) or an array that the compiler may do with as it
// likes (any processor). Each operation rounds once, as IEEE 754 says, and sums over lanes have one order; so the three
// give the same bits. Compile with -ffp-contract=off: where a multiply-add is to be fused, `fma` says so.
//
// Included inside a namespace of its own for each instruction set (isa.cpp).

#if defined(STET_AVX512)

struct F16 {
    __m512 v;
};
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const bfloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F16 load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
// Whole numbers that fit.
inline void store(int8_t* p, F16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v))); }
inline void store(int16_t* p, F16 a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v))); }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// The second one where either is NaN, as the instruction has it.
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round_to_even(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n from -126 to 127.
inline F16 scale_by_power(F16 a, F16 n) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(bits))};
}
// a where x >= bound or x is NaN, else 0.
inline F16 unless_below(F16 x, F16 bound, F16 a) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), a.v, _mm512_setzero_ps())};
}
// a where first <= lane < last, else b.
inline F16 where_between(int first, int last, F16 a, F16 b) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 inside = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                       _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(last));
    return {_mm512_mask_blend_ps(inside, b.v, a.v)};
}

#elif defined(STET_AVX2)

struct F16 {
    __m256 a, b;
};
inline F16 splat(float x) {
    __m256 v = _mm256_set1_ps(x);
    return {v, v};
}
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 from_bfloat16(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F16 load(const bfloat16* p) { return {from_bfloat16(p), from_bfloat16(p + 8)}; }
inline F16 load(const float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 from_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline F16 load(const int8_t* p) { return {from_int8(p), from_int8(p + 8)}; }
inline void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline __m256i to_int16(F16 x) {
    // The instruction packs within halves of 128 bits: x.a's first four, x.b's first four, and so on.
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
}
inline void store(int16_t* p, F16 x) { _mm256_storeu_si256((__m256i*)p, to_int16(x)); }
inline void store(int8_t* p, F16 x) {
    const __m256i wide = to_int16(x);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
}
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 abs(F16 x) {
    __m256 rest = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, rest), _mm256_and_ps(x.b, rest)};
}
inline F16 round_to_even(F16 x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F16 scale_by_power(F16 x, F16 n) {
    return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline F16 unless_below(F16 x, F16 bound, F16 y) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, bound.a, _CMP_LT_OQ), y.a),
            _mm256_andnot_ps(_mm256_cmp_ps(x.b, bound.b, _CMP_LT_OQ), y.b)};
}
inline __m256 inside_lanes(int first, int last, __m256i lane) {
    __m256i from = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1));
    __m256i to = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
    return _mm256_castsi256_ps(_mm256_and_si256(from, to));
}
inline F16 where_between(int first, int last, F16 x, F16 y) {
    __m256 low = inside_lanes(first, last, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 high = inside_lanes(first, last, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    return {_mm256_blendv_ps(y.a, x.a, low), _mm256_blendv_ps(y.b, x.b, high)};
}

#else

struct F16 {
    float v[16];
};
#define STET_LANES(expression)      \
    F16 r;                          \
    for (int i = 0; i < 16; ++i) {  \
        r.v[i] = (expression);      \
    }                               \
    return r
inline F16 splat(float x) { STET_LANES(x); }
inline F16 load(const float* p) { STET_LANES(p[i]); }
inline F16 load(const bfloat16* p) { STET_LANES(to_float(p[i])); }
inline F16 load(const float16* p) { STET_LANES(to_float(p[i])); }
inline F16 load(const int8_t* p) { STET_LANES((float)p[i]); }
inline void store(float* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(int8_t* p, F16 a) { for (int i = 0; i < 16; ++i) p[i] = (int8_t)a.v[i]; }
inline void store(int16_t* p, F16 a) { for (int i = 0; i < 16; ++i) p[i] = (int16_t)a.v[i]; }
inline F16 fma(F16 a, F16 b, F16 c) { STET_LANES(std::fma(a.v[i], b.v[i], c.v[i])); }
inline F16 operator+(F16 a, F16 b) { STET_LANES(a.v[i] + b.v[i]); }
inline F16 operator-(F16 a, F16 b) { STET_LANES(a.v[i] - b.v[i]); }
inline F16 operator*(F16 a, F16 b) { STET_LANES(a.v[i] * b.v[i]); }
inline F16 operator/(F16 a, F16 b) { STET_LANES(a.v[i] / b.v[i]); }
inline F16 max(F16 a, F16 b) { STET_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 min(F16 a, F16 b) { STET_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F16 abs(F16 a) { STET_LANES(std::fabs(a.v[i])); }
inline F16 round_to_even(F16 a) { STET_LANES(std::nearbyint(a.v[i])); }
inline F16 scale_by_power(F16 a, F16 n) {
    // n is NaN where the argument of an exponential was: what comes of it does not matter then, but must be defined.
    STET_LANES(a.v[i] * std::ldexp(1.0f, n.v[i] == n.v[i] ? (int)n.v[i] : 0));
}
inline F16 unless_below(F16 x, F16 bound, F16 a) { STET_LANES(x.v[i] < bound.v[i] ? 0.0f : a.v[i]); }
inline F16 where_between(int first, int last, F16 a, F16 b) { STET_LANES(first <= i && i < last ? a.v[i] : b.v[i]); }
#undef STET_LANES

#endif

// The sum and the largest of the lanes, of which none is NaN for the latter. One order: those at distance 8 first, then
// at 4, 2 and 1.
#if defined(STET_AVX512) || defined(STET_AVX2)
#if defined(STET_AVX512)
inline __m256 low_half(F16 x) { return _mm512_castps512_ps256(x.v); }
inline __m256 high_half(F16 x) { return _mm512_extractf32x8_ps(x.v, 1); }
#else
inline __m256 low_half(F16 x) { return x.a; }
inline __m256 high_half(F16 x) { return x.b; }
#endif
inline float sum(F16 x) {
    __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(F16 x) {
    __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(F16 a) {
    for (int step = 8; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) {
            a.v[i] = a.v[i] + a.v[i + step];
        }
    }
    return a.v[0];
}
inline float largest(F16 a) {
    for (int i = 1; i < 16; ++i) {
        a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    }
    return a.v[0];
}
#endif

// e^x in float32, within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 6 for
// e^r. 0 below -87, e^88 above 88. NaN stays NaN.
inline F16 exp(F16 x) {
    const F16 low = splat(-87.0f);
    F16 clamped = max(low, min(splat(88.0f), x));  // these return their second argument where one is NaN
    F16 n = round_to_even(clamped * splat(1.44269504088896341f));
    F16 r = fma(n, splat(-0.693145751953125f), clamped);
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    F16 p = splat(1.0f / 720);
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return unless_below(x, low, scale_by_power(p, n));  // what is masked has exactly no weight
}
