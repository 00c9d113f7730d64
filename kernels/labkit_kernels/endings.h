// What is done with the finished sums of a product, 32 columns of a row at a time: bias and residual, a gate, or the
// maximum. For AVX-512.
#pragma once

#include "gates.h"
#include "operands.h"

namespace labkit {

// Sums of 32 columns beside each other, plus bias and residual, to `out`.
template <class Out>
struct Plain {
    const bf16 *bias, *residual;
    Out* out;
    int64_t columns, residual_row, out_row;

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        const int64_t at = panel * PANEL;
        const __mmask16 low = first(columns - at), high = first(columns - at - W);
        vf x = load(a), y = load(b);
        if (bias) {
            x += load_first(bias + at, low);
            y += load_first(bias + at + W, high);
        }
        if (residual) {
            const bf16* from = residual + row * residual_row + at;
            x += load_first(from, low);
            y += load_first(from + W, high);
        }
        write(out + row * out_row + at, x, y, low, high);
    }

    static void write(bf16* to, vf x, vf y, __mmask16 low, __mmask16 high) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
        _mm512_mask_storeu_epi16(to, low | static_cast<__mmask32>(high) << 16, both);
    }
    static void write(float* to, vf x, vf y, __mmask16 low, __mmask16 high) {
        _mm512_mask_storeu_ps(to, low, (__m512)x);
        _mm512_mask_storeu_ps(to + W, high, (__m512)y);
    }
};

// Nothing is written: each row keeps its largest sum and its column. Lane i holds columns i, i + 16, ...
struct Best {
    vf* most;    // [rows]
    vi* where;   // [rows]
    const bf16* bias;
    int64_t columns;

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        const int64_t at = panel * PANEL;
        look(load(a), row, at);
        if (at + W < columns) look(load(b), row, at + W);
    }
    void look(vf x, int64_t row, int64_t at) const {
        const __mmask16 there = first(columns - at);
        if (bias) x += load_first(bias + at, there);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at)), (__m512i)LANES);
        const __mmask16 more = _mm512_mask_cmp_ps_mask(there, (__m512)x, (__m512)most[row], _CMP_GT_OQ);
        most[row] = (vf)_mm512_mask_mov_ps((__m512)most[row], more, (__m512)x);
        where[row] = (vi)_mm512_mask_mov_epi32((__m512i)where[row], more, index);
    }
    static constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

struct Largest {
    int64_t column;
    float sum;
};

// One row's largest of what `count` threads found, `stride` apart; the first column of equals. If every sum was NaN:
// column 0, NaN.
inline Largest largest_of(const vf* most, const vi* where, int64_t count, int64_t stride, int64_t columns) {
    Largest found{columns, -INFINITY};
    for (int64_t i = 0; i < count * stride; i += stride)
        for (int lane = 0; lane < W; lane++)
            if (most[i][lane] > found.sum || (most[i][lane] == found.sum && where[i][lane] < found.column))
                found = {where[i][lane], most[i][lane]};
    return found.column < columns ? found : Largest{0, NAN};
}

}  // namespace labkit
