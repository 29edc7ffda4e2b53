// All kernels for one instruction set. Compiled once for each: -DSTET_ISA=avx512 and so on (kernels/cpu/build.py).

#include <algorithm>
#include <functional>

#include "step.h"

#if defined(STET_AVX2) || defined(STET_AVX512)
#include <immintrin.h>
#endif

namespace STET_ISA {
namespace {

#include "simd.h"
#include "tile.h"
#include "linear.h"
#include "rows.h"
#include "cache.h"
#include "attention.h"
#include "sampling.h"
#include "layer_norm.h"
#include "experts.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    STET_NAME,
    GROUP_OF,
    {embedding, norm, linear, gated, write_kv, attention, quantize, sample, layer_norm, ungated, add, add_positions,
     softcap, route, group, expert_linear, combine, weights}};

}  // namespace STET_ISA
