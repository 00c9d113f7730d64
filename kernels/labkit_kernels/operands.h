// What the kernels of linear layers share: vectors of which only the first lanes exist, and the RMS norm that is
// applied to rows before they are multiplied. For AVX-512.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "memory.h"
#include "simd.h"

namespace labkit {

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

inline vf load_first(const bf16* at, __mmask16 mask) { return (vf)widen(_mm256_maskz_loadu_epi16(mask, at)); }
inline vf load_first(const float* at, __mmask16 mask) { return (vf)_mm512_maskz_loadu_ps(mask, at); }

struct Norm {
    const void* weight;
    int dtype;
    float eps;

    vf scales(int64_t at, __mmask16 mask) const {
        return dtype == 0 ? load_first(static_cast<const float*>(weight) + at, mask)
                          : load_first(static_cast<const bf16*>(weight) + at, mask);
    }
};

inline float inverse_root(const bf16* x, int64_t depth, float eps) {
    vf sum = {}, other = {};
    for (int64_t d = 0; d < depth; d += 2 * W) {
        vf a = load_first(x + d, first(depth - d)), b = load_first(x + d + W, first(depth - d - W));
        sum += a * a;
        other += b * b;
    }
    return 1.f / std::sqrt(_mm512_reduce_add_ps((__m512)(sum + other)) / depth + eps);
}

}  // namespace labkit
