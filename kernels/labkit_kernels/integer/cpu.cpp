// Linear layers whose weights are integers of 4 or 8 bits: wide.h is for AVX-512 VNNI and AMX, bytes.h for AVX2 and ARM.
// Rows of x are quantized to int8 with a scale for each group of inputs, the same groups that the weights have
// scales for; products within a group are integer sums, and each group adds scale * scale * sum to a float32 sum.
//
// Integer sums are exact, and the float32 additions happen in the order of the groups. So a row's result does not
// depend on the unit that multiplies it, or on how many other rows there are.
//
// Weights lie in tiles of 16 columns, four inputs of a column in 32 bits (a unit: 64 bytes), as the units read them.
// Weights of 4 bits are numbers of a table with 16 values: the low halves of 64 bytes are a unit, the high halves
// the next.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../repeat.h"
#include "../threads.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LABKIT_INTEGERS 1
#define LABKIT_INTEGERS_WIDE 1
#include "../endings.h"
#include "../tiles.h"
#if defined(__AMX_INT8__) && LABKIT_TILES
#define LABKIT_INTEGER_TILES 1
#else
#define LABKIT_INTEGER_TILES 0
#endif
#elif (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) || defined(__ARM_FEATURE_DOTPROD)
#define LABKIT_INTEGERS 1
#define LABKIT_INTEGERS_WIDE 0
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#include "../gates.h"
#include "../sums.h"
#else
#define LABKIT_INTEGERS 0
#endif

struct Weight {
    const uint8_t* values;       // [tiles][units][16 columns][4], half as long for 4 bits
    const void *scales, *offsets;  // [tiles][groups][16]; offsets may be null
    const int32_t* order;        // [depth]: which input is multiplied at each place; null: in order
    int64_t columns, depth, groups, group;  // a group's size: a multiple of 16
    int32_t bits, half;          // half: scales and offsets are float16, else float32
    int8_t table[16];            // what 4 bits stand for
};

struct Linear {
    const void *x, *norm, *bias, *residual;
    void* out;
    const Weight* weight;
    int64_t rows, x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, out_dtype;  // 0 float32, 1 bfloat16
    int64_t num_threads;
};

struct Mlp {
    const void *x, *norm, *residual;
    void* out;
    const Weight *up, *down;  // `up` holds the gate's columns, then those it multiplies
    int64_t rows, x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, gate;  // 0 silu, 1 gelu by tanh, 2 gelu by erf
    int64_t num_threads;
};

namespace {

inline float half_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half >> 15 ? -size : size;
}

// To the nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

#if LABKIT_INTEGERS
namespace {

using namespace labkit;

#if LABKIT_INTEGERS_WIDE
#include "wide.h"
#else
#include "bytes.h"
#endif
#include "layers.h"

}  // namespace
#endif

extern "C" void integers_available(int32_t* answer) { *answer = LABKIT_INTEGERS; }

extern "C" void linear_integers(const Linear* call) {
#if LABKIT_INTEGERS
    linear(*call);
#endif
}

extern "C" void argmax_integers(const Linear* call, int64_t* columns, float* sums) {
#if LABKIT_INTEGERS
    argmax(*call, columns, sums);
#endif
}

extern "C" void mlp_integers(const Mlp* call) {
#if LABKIT_INTEGERS
    if (call->gate == 0) mlp<gates::Silu>(*call);
    else if (call->gate == 1) mlp<gates::GeluTanh>(*call);
    else mlp<gates::Gelu>(*call);
#endif
}

// Bytes [columns, depth] as tiles [tiles][units][16 columns][4]. For 4 bits, whose bytes are 0 to 15, two units to one.
// Columns and inputs beyond the weight are `rest`.
extern "C" void pack_integers(const uint8_t* values, int64_t stride, int64_t columns, int64_t depth, int64_t tiles,
                              int64_t deep, int32_t bits, uint8_t rest, uint8_t* to, int64_t num_threads) {
    const int64_t bytes = deep * 16 * bits / 8;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t unit = 0; unit < deep / 4; unit++) {
            uint8_t one[64];
            std::memset(one, rest, 64);
            const int64_t count = std::min<int64_t>(4, depth - unit * 4);
            for (int64_t n = 0; n < std::min<int64_t>(16, columns - tile * 16) && count > 0; n++)
                std::memcpy(one + n * 4, values + (tile * 16 + n) * stride + unit * 4, count);
            uint8_t* at = to + tile * bytes + unit * 64;
            if (bits == 8) {
                std::memcpy(at, one, 64);
            } else {
                at = to + tile * bytes + unit / 2 * 64;
                for (int i = 0; i < 64; i++) at[i] = unit % 2 ? at[i] | one[i] << 4 : one[i];
            }
        }
}

// Rows `ids` of a weight whose inputs are in order, as bfloat16 [n, depth].
extern "C" void gather_integers(const Weight* weight, const int64_t* ids, int64_t n, uint16_t* out) {
    const Weight& w = *weight;
    const int64_t deep = w.groups * w.group;
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = ids[i] / 16, lane = ids[i] % 16;
        const uint8_t* from = w.values + tile * deep * 2 * w.bits + lane * 4;
        auto number = [&](const void* of, int64_t g) {
            const int64_t at = (tile * w.groups + g) * 16 + lane;
            return w.half ? half_to_float(static_cast<const uint16_t*>(of)[at]) : static_cast<const float*>(of)[at];
        };
        auto integer = [&](int64_t d) -> int {
            if (w.bits == 8) return static_cast<int8_t>(from[d / 4 * 64 + d % 4]);
            const uint8_t both = from[d / 8 * 64 + d % 4];
            return w.table[d / 4 % 2 ? both >> 4 : both & 15];
        };
        for (int64_t g = 0; g * w.group < w.depth; g++) {
            const float scale = number(w.scales, g), offset = w.offsets ? number(w.offsets, g) : 0.f;
            const int64_t end = std::min(w.depth, (g + 1) * w.group);
            for (int64_t d = g * w.group; d < end; d++) out[i * w.depth + d] = to_bfloat16(integer(d) * scale + offset);
        }
    }
}

LABKIT_REPEATABLE(linear_integers)
LABKIT_REPEATABLE(mlp_integers)
