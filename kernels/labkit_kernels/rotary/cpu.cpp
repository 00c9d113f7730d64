// Rotary positions on a CPU. Plain torch gathers cosines, splits heads, multiplies and concatenates: a dozen passes over
// queries and keys. Here each head is read once, normalized if there is a norm, rotated, and written once.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../repeat.h"
#include "../simd.h"

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 15;  // elements below which one thread is faster than waking another

struct Heads {
    const void* in;
    void* out;         // [tokens, heads, size], dense
    const void* norm;  // [size] or null
    int64_t heads, token, head;  // strides in elements; the last dimension is dense
};

template <class T>
void widen(float* out, const T* in, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, load(in + i));
    for (; i < size; i++) out[i] = to_float(in[i]);
}

template <class T>
void narrow(T* out, const float* in, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, load(in + i));
    for (; i < size; i++) from_float(out + i, in[i]);
}

// In place; the result is rounded to T, as after a separate norm.
template <class T, class Weight>
void rms_norm(float* x, const Weight* weight, int64_t size, float eps) {
    vf total = splat(0.f);
    float squares = 0.f;
    int64_t i = 0;
    for (; i + W <= size; i += W) total += load(x + i) * load(x + i);
    for (; i < size; i++) squares += x[i] * x[i];
    float scale = 1.f / std::sqrt((squares + reduce_sum(total)) / size + eps);
    for (i = 0; i < size; i++) {
        T rounded;
        from_float(&rounded, x[i] * scale * to_float(weight[i]));
        x[i] = to_float(rounded);
    }
}

void turn_halves(float* __restrict x, float* __restrict y, const float* c, const float* s, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf a = load(x + i), b = load(y + i), cos = load(c + i), sin = load(s + i);
        store(x + i, a * cos - b * sin);
        store(y + i, b * cos + a * sin);
    }
    for (; i < half; i++) {
        float a = x[i], b = y[i];
        x[i] = a * c[i] - b * s[i];
        y[i] = b * c[i] + a * s[i];
    }
}

void turn_pairs(float* x, const float* c, const float* s, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * c[i] - b * s[i];
        x[2 * i + 1] = b * c[i] + a * s[i];
    }
}

template <class T>
void turn(const Heads& h, int64_t token, const float* c, const float* s, int64_t half, int64_t size, bool interleaved,
          int norm_dtype, float eps, float* wide) {
    for (int64_t j = 0; j < h.heads; j++) {
        widen(wide, (const T*)h.in + token * h.token + j * h.head, size);
        if (h.norm && norm_dtype == 0) rms_norm<T>(wide, (const float*)h.norm, size, eps);
        if (h.norm && norm_dtype == 1) rms_norm<T>(wide, (const bf16*)h.norm, size, eps);
        if (interleaved)
            turn_pairs(wide, c, s, half);
        else
            turn_halves(wide, wide + half, c, s, half);
        narrow((T*)h.out + (token * h.heads + j) * size, wide, size);
    }
}

template <class T>
void rotate(const Heads& q, const Heads& k, const float* table, int64_t table_row, const int64_t* positions,
          int64_t tokens, int64_t size, int64_t half, bool interleaved, int norm_dtype, float eps, int threads) {
    int64_t work = tokens * size * (q.heads + k.heads);
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens > 1 && work >= LEAST_WORK)
    {
        float near[512];  // heads of up to 512 need no allocation
        std::vector<float> far(size > 512 ? size : 0);
        float* wide = size > 512 ? far.data() : near;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const float* c = table + positions[t] * table_row;
            turn<T>(q, t, c, c + half, half, size, interleaved, norm_dtype, eps, wide);
            turn<T>(k, t, c, c + half, half, size, interleaved, norm_dtype, eps, wide);
        }
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16
extern "C" void rope(const void* q, const void* k, void* q_out, void* k_out, const void* q_norm, const void* k_norm,
                     const float* table, const int64_t* positions, int64_t tokens, int64_t q_heads, int64_t k_heads,
                     int64_t size, int64_t half, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head,
                     int64_t table_row, double eps, int interleaved, int dtype, int norm_dtype, int threads) {
    Heads queries{q, q_out, q_norm, q_heads, q_token, q_head}, keys{k, k_out, k_norm, k_heads, k_token, k_head};
    if (dtype == 0)
        rotate<float>(queries, keys, table, table_row, positions, tokens, size, half, interleaved, norm_dtype, eps, threads);
    else
        rotate<bf16>(queries, keys, table, table_row, positions, tokens, size, half, interleaved, norm_dtype, eps, threads);
}

LABKIT_REPEATABLE(rope)
