// Linear layers on packed weights, for bfloat16: one call per layer, or one for a whole gated MLP. pairs.h is for
// processors that multiply pairs of bfloat16, floats.h for those that multiply floats only.
//
// Weights are stored as tiles of 16 columns x 32 deep, in the order in which they are read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../gates.h"
#include "../memory.h"
#include "../repeat.h"
#include "../simd.h"
#include "../threads.h"

#if defined(__AVX512BF16__)
#define LABKIT_PACKED 1
#define LABKIT_PAIRS 1
#include "../endings.h"
#include "../tiles.h"
#elif defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || \
    (defined(__aarch64__) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))  // there torch's library has products
#define LABKIT_PACKED 1
#define LABKIT_PAIRS 0
#include "../sums.h"
#else
#define LABKIT_PACKED 0
#endif

// A linear layer: out = norm(x) W^T + bias + residual. Strides are in elements.
struct Linear {
    const void *x, *norm, *weight, *bias, *residual;
    void* out;
    int64_t rows, depth, columns;
    int64_t x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, out_dtype;  // 0 float32, 1 bfloat16
    int64_t num_threads;
};

// A gated MLP: out = (gate(norm(x) A^T) * (norm(x) B^T)) C^T + residual; `up` holds A's columns, then B's.
struct Mlp {
    const void *x, *norm, *up, *down, *residual;
    void* out;
    int64_t rows, size, inner;
    int64_t x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, gate;  // 0 silu, 1 gelu by tanh, 2 gelu by erf
    int64_t num_threads;
};

#if LABKIT_PACKED
namespace {

using namespace labkit;

#if LABKIT_PAIRS
#include "pairs.h"
#else
#include "floats.h"
#endif

}  // namespace
#endif

extern "C" void linear_available(int32_t* answer) { *answer = LABKIT_PACKED; }

extern "C" void linear_bfloat16(const Linear* call) {
#if LABKIT_PACKED
    on_best_unit([&](auto unit) { linear<decltype(unit)>(*call); });
#endif
}

extern "C" void argmax_bfloat16(const Linear* call, int64_t* columns, float* sums) {
#if LABKIT_PACKED
    on_best_unit([&](auto unit) { argmax<decltype(unit)>(*call, columns, sums); });
#endif
}

extern "C" void mlp_bfloat16(const Mlp* call) {
#if LABKIT_PACKED
    on_best_unit([&](auto unit) {
        using Unit = decltype(unit);
        if (call->gate == 0) mlp<Unit, gates::Silu>(*call);
        else if (call->gate == 1) mlp<Unit, gates::GeluTanh>(*call);
        else mlp<Unit, gates::Gelu>(*call);
    });
#endif
}

// Weights [columns, depth] as tiles [columns / 16][depth / 32][16 pairs of depths][16 columns][2], zeros around them.
extern "C" void pack_weight(const uint16_t* weight, int64_t stride, int64_t columns, int64_t depth, int64_t all_columns,
                            uint16_t* to, int64_t num_threads) {
    const int64_t deep = (depth + 31) / 32;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t tile = 0; tile < all_columns / 16; tile++)
        for (int64_t k = 0; k < deep; k++) {
            uint16_t* at = to + (tile * deep + k) * 512;
            const int64_t count = std::min<int64_t>(32, depth - k * 32);
            uint16_t rows[16][32] = {};
            const uint16_t* from = weight + tile * 16 * stride + k * 32;
            for (int64_t n = 0; n < std::min<int64_t>(16, columns - tile * 16); n++) {
                __builtin_prefetch(from + (16 + n) * stride);  // of the next tile: 16 streams are too many for the CPU
                if (count == 32)
                    std::memcpy(rows[n], from + n * stride, 64);
                else
                    std::memcpy(rows[n], from + n * stride, count * 2);
            }
#if defined(__AVX512F__)
            labkit::vf block[16];
            std::memcpy(block, rows, sizeof rows);
            labkit::transpose(block);
            std::memcpy(at, block, sizeof rows);
#else
            for (int64_t n = 0; n < 16; n++)
                for (int64_t pair = 0; pair < 16; pair++) std::memcpy(at + pair * 32 + n * 2, rows[n] + pair * 2, 4);
#endif
        }
}

LABKIT_REPEATABLE(linear_bfloat16)
LABKIT_REPEATABLE(mlp_bfloat16)
