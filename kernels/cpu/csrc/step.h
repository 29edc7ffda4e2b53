// What crosses from Python: a step, and commands to carry out in it. `kernels/cpu/native.py` mirrors these structures.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float to_float(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline float to_float(float16 x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    if (exponent == 0) {  // zero and the subnormal numbers: fraction * 2^-24
        float f = (float)fraction * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(float x) { return x; }

// Rounded to nearest even; NaN stays NaN.
inline bfloat16 to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Both are computed, so that a loop over elements needs no branch.
    const uint32_t nan = (bits >> 16) | 64, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {(uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT8_DOT = 4 };

enum Op : int32_t {
    EMBEDDING = 0,
    NORM = 1,
    LINEAR = 2,
    GATED = 3,
    WRITE_KV = 4,
    ATTENTION = 5,
    QUANTIZE = 6,
    SAMPLE = 7,
    LAYER_NORM = 8,
    UNGATED = 9,
    ADD = 10,
    ADD_POSITIONS = 11,
    SOFTCAP = 12,
    ROUTE = 13,
    GROUP = 14,
    EXPERT_LINEAR = 15,
    COMBINE = 16,
    WEIGHTS = 17,
    NUM_OPS = 18,
};

// One layer's K and V for `num_blocks` blocks.
//
//   keys    [num_blocks][Hkv][block_size / 16][D][16]   16 tokens side by side: a score is a sum over D in every lane
//   values  [num_blocks][Hkv][block_size][D]            an output element is a sum over tokens in every lane
//   scales  float32 [num_blocks][Hkv][block_size], of keys and of values, where they are int8
struct Cache {
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
    int64_t num_heads, head_dim, block_size;
    int64_t window;  // 0: none
    int32_t type, unused;
};

// Where each token of a step stands. Sequence s owns tokens query_starts[s] to query_starts[s + 1] - 1.
struct Step {
    int64_t num_tokens, num_sequences;
    const int32_t* query_starts;  // [S + 1]
    const int32_t* positions;     // [T]
    const int32_t* sequences;     // [T]
    const int32_t* block_tables;  // [S, table_stride]
    int64_t table_stride;
};

// rows: how many to compute; -n: n * step->num_tokens (where an operation takes n other than 1, it says so). What p, n and f mean is said where each operation is defined.
struct Command {
    int32_t op, flags;
    int64_t rows;
    void* p[10];
    int64_t n[6];
    float f[2];
};

// Shares out the parts of an operation among the threads: whoever is free takes the next. Which thread computes a part
// changes nothing in it.
struct Work {
    std::atomic<int64_t>* next;
    int thread, num_threads;
    float* scratch;  // of this thread, SCRATCH_FLOATS
    int64_t take() { return next->fetch_add(1, std::memory_order_relaxed); }
};
constexpr int64_t SCRATCH_FLOATS = 1 << 18;
constexpr int64_t MAX_HEAD_DIM = 1024;  // of a cache

using Kernel = void (*)(const Command&, const Step*, Work&);

struct Kernels {
    const char* name;
    int32_t group_of;  // how many integers of a quantized row take four bytes: 4 or 2
    Kernel ops[NUM_OPS];
};
