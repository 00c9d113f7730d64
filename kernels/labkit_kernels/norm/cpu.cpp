// RMS norm on a CPU. Plain torch makes eight passes over a vector, each its own call. Here a vector is read once from
// memory, and the second pass (times scale and weight) finds it in L1. In decode there are few vectors, and the call
// itself dominates.

#include <cmath>
#include <cstdint>

#include "../repeat.h"
#include "../simd.h"

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 16;  // elements below which one thread is faster than waking another

template <class T>
float add_and_square(T* sum, const T* x, int64_t size) {
    vf total = splat(0.f);
    float rest = 0.f;
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        store(sum + i, load(sum + i) + load(x + i));
        vf rounded = load(sum + i);  // the norm is of the rounded sum, because the next layer reads that
        total += rounded * rounded;
    }
    for (; i < size; i++) {
        from_float(sum + i, to_float(sum[i]) + to_float(x[i]));
        rest += to_float(sum[i]) * to_float(sum[i]);
    }
    return reduce_sum(total) + rest;
}

template <class T>
float square(const T* x, int64_t size) {
    vf total = splat(0.f), other = splat(0.f);
    float rest = 0.f;
    int64_t i = 0;
    for (; i + 2 * W <= size; i += 2 * W) {
        vf a = load(x + i), b = load(x + i + W);
        total += a * a;
        other += b * b;
    }
    for (; i < size; i++) rest += to_float(x[i]) * to_float(x[i]);
    return reduce_sum(total + other) + rest;
}

template <class T, class Weight>
void scaled(T* out, const T* x, const Weight* weight, float scale, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) from_float(out + i, to_float(x[i]) * scale * to_float(weight[i]));
}

// Vector (i, j) of x lies at i * x_outer + j * x_inner; the output is dense.
template <class T, class Weight>
void normalize(const T* x, const Weight* weight, T* residual, T* out, int64_t outer, int64_t inner, int64_t size,
              int64_t x_outer, int64_t x_inner, int64_t r_outer, int64_t r_inner, float eps, int threads) {
    int64_t count = outer * inner;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count * size >= LEAST_WORK)
    for (int64_t n = 0; n < count; n++) {
        int64_t i = n / inner, j = n % inner;
        const T* from = x + i * x_outer + j * x_inner;
        float squares;
        if (residual) {
            T* sum = residual + i * r_outer + j * r_inner;
            squares = add_and_square(sum, from, size);
            from = sum;
        } else {
            squares = square(from, size);
        }
        scaled(out + n * size, from, weight, 1.f / std::sqrt(squares / size + eps), size);
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16
extern "C" void rms_norm(const void* x, const void* weight, void* residual, void* out, int64_t outer, int64_t inner,
                         int64_t size, int64_t x_outer, int64_t x_inner, int64_t r_outer, int64_t r_inner, double eps,
                         int dtype, int weight_dtype, int threads) {
    auto run = [&](auto t, auto w) {
        using T = decltype(t);
        using Weight = decltype(w);
        normalize((const T*)x, (const Weight*)weight, (T*)residual, (T*)out, outer, inner, size, x_outer, x_inner, r_outer,
                 r_inner, (float)eps, threads);
    };
    if (dtype == 0)
        weight_dtype == 0 ? run(float{}, float{}) : run(float{}, bf16{});
    else
        weight_dtype == 0 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

LABKIT_REPEATABLE(rms_norm)
