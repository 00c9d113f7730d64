// Gated activations on a CPU: two values read, one written, an exponential between them. Written out with vectors so that
// the exponential is a polynomial in registers, not a call.

#include <cmath>
#include <cstdint>

#include "../gates.h"
#include "../repeat.h"
#include "../simd.h"

namespace {

using namespace labkit;
using namespace labkit::gates;

constexpr int64_t LEAST_WORK = 1 << 15;  // elements below which one thread is faster than waking another
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

LABKIT_REPEATABLE(gated_act)
