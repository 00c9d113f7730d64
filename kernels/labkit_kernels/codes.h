// Keys and values in 8 bits: codes of three kinds, and a float32 scale for each vector. See cache/codes.py.
#pragma once

#include <type_traits>

#include "simd.h"

namespace labkit {

struct int8 {
    uint8_t bits;
    static constexpr float LARGEST = 127.f;
};
struct e4m3 {
    uint8_t bits;
    static constexpr float LARGEST = 448.f;
};
struct e5m2 {
    uint8_t bits;
    static constexpr float LARGEST = 57344.f;
};

template <class C>
constexpr bool is_code = std::is_same_v<C, int8> || std::is_same_v<C, e4m3> || std::is_same_v<C, e5m2>;

typedef uint8_t vb __attribute__((vector_size(W)));

// Rounds to nearest, ties to even, as torch does. Adding a power of two whose last place is the least code rounds the
// small magnitudes; the others are rounded in their bits. The magnitude is taken in between, so that no compiler fuses
// product and sum, which would round once instead of twice.
template <class C>
inline vu encode(vf x) {
    const vu sign = (vu)x >> 31, size = (vu)x & 0x7fffffff;
    if constexpr (std::is_same_v<C, int8>) {
        const vu code = (vu)((vf)size + 8388608.f) - 0x4b000000u;
        return sign == 1 ? 0u - code : code;
    } else {
        constexpr int shift = std::is_same_v<C, e4m3> ? 20 : 21;  // mantissa bits that are dropped
        constexpr uint32_t bias = std::is_same_v<C, e4m3> ? 120 << 3 : 112 << 2;
        constexpr float power = std::is_same_v<C, e4m3> ? 16384.f : 128.f;
        constexpr uint32_t least = std::is_same_v<C, e4m3> ? 121u << 23 : 113u << 23;  // normal
        constexpr uint32_t half = (1u << (shift - 1)) - 1;
        const vu normal = ((size + half + ((size >> shift) & 1)) >> shift) - bias;
        const vu small = (vu)((vf)size + power) - (vu)splat(power);
        return (size < least ? small : normal) | (sign << 7);
    }
}

// Codes as floats, exactly.
inline vf decode(vu code, int8) { return __builtin_convertvector((vi)(code << 24) >> 24, vf); }
inline vf decode(vu code, e4m3) {
    const vu sign = (code & 0x80) << 24, rest = code & 0x7f;
    const vf small = __builtin_convertvector((vi)rest, vf) * 0.001953125f;
    return (vf)((rest < 8 ? (vu)small : (rest << 20) + (120u << 23)) | sign);
}
inline vf decode(vu code, e5m2) {
    const vu sign = (code & 0x80) << 24, rest = code & 0x7f;
    const vf small = __builtin_convertvector((vi)rest, vf) * 1.52587890625e-5f;
    return (vf)((rest < 4 ? (vu)small : (rest << 21) + (112u << 23)) | sign);
}

template <class C, std::enable_if_t<is_code<C>, int> = 0>
inline vf load(const C* at) {
    return decode(__builtin_convertvector(load_bits<vb>(at), vu), C{});
}
template <class C, std::enable_if_t<is_code<C>, int> = 0>
inline float to_float(C x) {
    return decode(vu{} + uint32_t{x.bits}, C{})[0];
}

// Stores the codes of a vector and returns its scale. Magnitudes are compared as integers, so that a nan counts as the
// largest and becomes the scale.
template <class C, class T>
inline float store_codes(const T* from, int64_t size, uint8_t* to) {
    constexpr uint32_t least = 27u << 23;  // 2^-100
    vu most = vu{} + least;
    const int64_t whole = size / W * W;
    vf rest{};
    for (int64_t d = whole; d < size; d++) rest[d - whole] = to_float(from[d]);
    auto at = [&](int64_t d) { return d < whole ? load(from + d) : rest; };
    for (int64_t d = 0; d < size; d += W) {
        const vu magnitude = (vu)at(d) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    uint32_t largest = least;
    for (int i = 0; i < W; i++) largest = most[i] > largest ? most[i] : largest;
    float scale;
    std::memcpy(&scale, &largest, 4);
    scale *= static_cast<float>(1.0 / C::LARGEST);
    const float by = 1.f / scale;
    for (int64_t d = 0; d < size; d += W) {
        const vb codes = __builtin_convertvector(encode<C>(at(d) * by), vb);
        std::memcpy(to + d, &codes, d < whole ? W : size - whole);
    }
    return scale;
}

}  // namespace labkit
