// What the kernels of linear layers share on processors without AVX-512's masks or bfloat16: the norm of rows, and
// what is done with the finished sums of 32 columns of a row. See endings.h for the others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "memory.h"
#include "simd.h"

namespace labkit {

inline float rounded(float x) {
    bf16 y;
    from_float(&y, x);
    return to_float(y);
}

inline float number(const void* from, int dtype, int64_t at) {
    return dtype == 0 ? static_cast<const float*>(from)[at] : to_float(static_cast<const bf16*>(from)[at]);
}

struct Norm {
    const void* weight;
    int dtype;
    float eps;
};

// A row as floats, after the norm if there is one, rounded as in bfloat16 if asked, and zeros up to `deep`.
inline void widen(const bf16* x, int64_t depth, int64_t deep, const Norm& norm, bool round, float* to) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) store(to + d, load(x + d));
    for (; d < depth; d++) to[d] = to_float(x[d]);
    for (; d < deep; d++) to[d] = 0.f;
    if (norm.weight == nullptr) return;
    vf sum{};
    for (d = 0; d < deep; d += W) sum += load(to + d) * load(to + d);
    const float root = 1.f / std::sqrt(reduce_sum(sum) / depth + norm.eps);
    for (d = 0; d < depth; d++) {
        const float y = to[d] * root * number(norm.weight, norm.dtype, d);
        to[d] = round ? rounded(y) : y;
    }
}

// Sums plus bias and residual to `out`.
template <class Out>
struct Plain {
    const bf16 *bias, *residual;
    Out* out;
    int64_t columns, residual_row, out_row;

    void operator()(const float* sums, int64_t row, int64_t panel) const {
        const int64_t begin = panel * PANEL, count = std::min<int64_t>(PANEL, columns - begin);
        const bf16* add = residual ? residual + row * residual_row + begin : nullptr;
        Out* to = out + row * out_row + begin;
        int64_t c = 0;
        for (; c + W <= count; c += W) {
            vf x = load(sums + c);
            if (bias) x += load(bias + begin + c);
            if (add) x += load(add + c);
            store(to + c, x);
        }
        for (; c < count; c++) {
            float x = sums[c];
            if (bias) x += to_float(bias[begin + c]);
            if (add) x += to_float(add[c]);
            from_float(to + c, x);
        }
    }
};

struct Largest {
    int64_t column;
    float sum;

    void see(float x, int64_t at) {
        if (x > sum || (x == sum && at < column)) *this = {at, x};
    }
};

// Each row's largest sum and its column; the first of equals.
struct Best {
    Largest* found;  // [rows]
    const bf16* bias;
    int64_t columns;

    void operator()(const float* sums, int64_t row, int64_t panel) const {
        const int64_t begin = panel * PANEL, count = std::min<int64_t>(PANEL, columns - begin);
        float x[PANEL];
        vf most = splat(-INFINITY);
        for (int c = 0; c < PANEL; c += W) {
            vf y = load(sums + c);
            if (bias && c + W <= count) y += load(bias + begin + c);
            store(x + c, y);
            if (c + W <= count) most = max(y, most);
        }
        for (int64_t c = count / W * W; c < count; c++) {
            if (bias) x[c] += to_float(bias[begin + c]);
            found[row].see(x[c], begin + c);
        }
        if (reduce_max(most) >= found[row].sum)
            for (int64_t c = 0; c < count / W * W; c++) found[row].see(x[c], begin + c);
    }
};

// One row's largest of what `count` threads found, `stride` apart; column 0 and NaN if every sum was NaN.
inline Largest largest_of(const Largest* found, int64_t count, int64_t stride, int64_t columns) {
    Largest best{columns, -INFINITY};
    for (int64_t i = 0; i < count * stride; i += stride) best.see(found[i].sum, found[i].column);
    return best.column < columns ? best : Largest{0, NAN};
}

}  // namespace labkit
