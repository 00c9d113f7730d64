// Gated activations on a CPU: two values read, one written, an exponential between them. Written out with vectors so that
// the exponential is a polynomial in registers, not a call.

#include <cmath>
#include <cstdint>

#include "../simd.h"

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 15;  // elements below which one thread is faster than waking another
constexpr float LOG2E = 1.4426950408889634f;

// x / (1 + e^-y). The bound keeps 2^z finite: beyond it the quotient is smaller than any float that matters.
inline vf times_sigmoid(vf x, vf y) { return x / (exp2v(min(y * -LOG2E, splat(126.f))) + 1.f); }

struct Silu {
    static vf of(vf x) { return times_sigmoid(x, x); }
};

struct GeluTanh {  // x/2 (1 + tanh u) = x sigmoid(2u)
    static vf of(vf x) { return times_sigmoid(x, x * (x * x * 0.0713548162726f + 1.59576912160573f)); }
};

struct Gelu {  // erfc by a Chebyshev fit (Numerical Recipes), relative error 1.2e-7 also where it is tiny
    static vf of(vf x) {
        vf z = abs(x) * 0.70710678118654752f;
        vf t = 2.f / (z + 2.f);
        vf p = t * 0.17087277f - 0.82215223f;
        p = p * t + 1.48851587f;
        p = p * t - 1.13520398f;
        p = p * t + 0.27886807f;
        p = p * t - 0.18628806f;
        p = p * t + 0.09678418f;
        p = p * t + 0.37409196f;
        p = p * t + 1.00002368f;
        p = p * t - 1.26551223f;
        vf rest = t * exp2v((p - z * z) * LOG2E);
        return x * 0.5f * (x < 0.f ? rest : 2.f - rest);
    }
};

template <class Act, class T>
void row(const T* x, T* out, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, Act::of(load(x + i)) * load(x + size + i));
    for (; i < size; i++) from_float(out + i, Act::of(splat(to_float(x[i])))[0] * to_float(x[size + i]));
}

template <class Act, class T>
void gated(const T* x, T* out, int64_t outer, int64_t inner, int64_t size, int64_t x_outer, int64_t x_inner,
           int threads) {
    int64_t count = outer * inner;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count * size >= LEAST_WORK)
    for (int64_t n = 0; n < count; n++)
        row<Act>(x + n / inner * x_outer + n % inner * x_inner, out + n * size, size);
}

}  // namespace

// act: 0 silu, 1 gelu by tanh, 2 gelu by erf; dtype: 0 float32, 1 bfloat16; size: of the output
extern "C" void gated_act(const void* x, void* out, int64_t outer, int64_t inner, int64_t size, int64_t x_outer,
                          int64_t x_inner, int act, int dtype, int threads) {
    auto run = [&](auto a, auto t) {
        using T = decltype(t);
        gated<decltype(a)>((const T*)x, (T*)out, outer, inner, size, x_outer, x_inner, threads);
    };
    auto typed = [&](auto a) { dtype == 0 ? run(a, float{}) : run(a, bf16{}); };
    act == 0 ? typed(Silu{}) : act == 1 ? typed(GeluTanh{}) : typed(Gelu{});
}
