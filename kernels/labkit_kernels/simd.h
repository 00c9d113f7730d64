// Vectors of floats as wide as the machine has them, and the few functions that kernels need on them. Written with the
// compiler's vector extensions, so one source serves AVX-512, AVX2, SSE and NEON. Compile with -ffp-contract=fast
// (sums of products become fused multiply-adds) and without -ffast-math (minus infinity means something here).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace labkit {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

template <class V, class P>
inline V load_bits(const P* at) {
    V x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline vf load(const float* at) { return load_bits<vf>(at); }
inline vf load(const bf16* at) { return (vf)(__builtin_convertvector(load_bits<vh>(at), vu) << 16); }
inline void store(float* at, vf x) { std::memcpy(at, &x, sizeof x); }

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline void store(bf16* at, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vh out = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, vh);
    std::memcpy(at, &out, sizeof out);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void from_float(float* at, float x) { *at = x; }
inline void from_float(bf16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

inline vf iota() {
    vf x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}

template <class Fold>
inline float reduce(vf x, Fold fold) {
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = fold(lanes[i], lanes[i + half]);
    return lanes[0];
}
inline float reduce_max(vf x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
inline float reduce_sum(vf x) {
    return reduce(x, [](float a, float b) { return a + b; });
}

// 2^x for x < 128, relative error about 1e-7; 0 below -126.
inline vf exp2v(vf x) {
    vf bounded = max(x, splat(-126.f));
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    vf whole = bounded + magic;
    vf rest = bounded - (whole - magic);
    vf p = rest * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * rest + 9.618437357674640e-3f;
    p = p * rest + 5.550332471162809e-2f;
    p = p * rest + 2.402264791363012e-1f;
    p = p * rest + 6.931472028550421e-1f;
    p = p * rest + 1.f;
    vf power = (vf)(((vi)whole << 23) + 0x3f800000);  // the integer sits in the low bits of `whole`
    return x < -126.f ? vf{} : p * power;
}

// Relative error about 2e-7, near zero too.
inline vf tanhv(vf x) {
    vf size = abs(x), square = x * x;
    vf p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    vf small = x + x * square * p;
    vf big = 1.f - 2.f / (exp2v(min(size, splat(40.f)) * 2.8853900817779268f) + 1.f);
    vf signed_big = x < 0.f ? -big : big;
    return size < 0.625f ? small : signed_big;
}

// Natural logarithm of normal positive numbers, relative error about 2e-7, near 1 too.
inline vf logv(vf x) {
    vi bits = (vi)x;
    vi power = (bits - 0x3f3504f3) >> 23;  // so that the rest lies in sqrt(1/2) .. sqrt(2)
    vf rest = (vf)(bits - (power << 23)) - 1.f;
    vf whole = __builtin_convertvector(power, vf);
    vf square = rest * rest;
    vf p = rest * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * rest + 1.1676998740e-1f;
    p = p * rest - 1.2420140846e-1f;
    p = p * rest + 1.4249322787e-1f;
    p = p * rest - 1.6668057665e-1f;
    p = p * rest + 2.0000714765e-1f;
    p = p * rest - 2.4999993993e-1f;
    p = p * rest + 3.3333331174e-1f;
    vf y = p * rest * square + whole * -2.12194440e-4f - 0.5f * square;
    return rest + y + whole * 0.693359375f;
}

#if defined(__clang__) || __GNUC__ >= 12
#define LABKIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LABKIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// The first (High = 0) or second half of a and b, lane by lane in turn.
#if defined(__AVX512F__)
template <int High>
inline vf interleave(vf a, vf b) {
    constexpr int s = High * 8;
    return LABKIT_SHUFFLE(a, b, s, s + 16, s + 1, s + 17, s + 2, s + 18, s + 3, s + 19, s + 4, s + 20, s + 5, s + 21,
                          s + 6, s + 22, s + 7, s + 23);
}
#elif defined(__AVX2__)
template <int High>
inline vf interleave(vf a, vf b) {
    constexpr int s = High * 4;
    return LABKIT_SHUFFLE(a, b, s, s + 8, s + 1, s + 9, s + 2, s + 10, s + 3, s + 11);
}
#else
template <int High>
inline vf interleave(vf a, vf b) {
    constexpr int s = High * 2;
    return LABKIT_SHUFFLE(a, b, s, s + 4, s + 1, s + 5);
}
#endif

// W x W in registers: a perfect shuffle of the rows, log2(W) times.
inline void transpose(vf (&rows)[W]) {
    for (int step = 1; step < W; step *= 2) {
        vf next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = interleave<0>(rows[i], rows[i + W / 2]);
            next[2 * i + 1] = interleave<1>(rows[i], rows[i + W / 2]);
        }
        for (int i = 0; i < W; i++) rows[i] = next[i];
    }
}

}  // namespace labkit
