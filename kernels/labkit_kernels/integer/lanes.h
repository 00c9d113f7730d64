// The instructions of bytes.h: four inputs of LANES columns at a time. Part of cpu.cpp.

#if defined(__AVX2__)

constexpr int LANES = 8;   // columns of a vector
typedef __m256i Bytes;     // four inputs of each
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

inline Bytes load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Bytes load_table(const int8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Bytes low_halves(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm256_srli_epi16(x, 4)); }
inline Bytes look_up(Bytes table, Bytes places) { return _mm256_shuffle_epi8(table, places); }

inline Bytes spread(const int8_t* four) {
    int32_t inputs;
    std::memcpy(&inputs, four, 4);
    return _mm256_set1_epi32(inputs);
}

// The instruction multiplies an unsigned and a signed byte, so a weight's sign moves to the input.
struct Weights {
    Bytes values, sizes;
};
inline Weights weights_of(Bytes x) { return {x, _mm256_abs_epi8(x)}; }

inline Ints add_dots(Ints sums, const Weights& w, const int8_t* four) {
    const __m256i given = _mm256_sign_epi8(spread(four), w.values);
#if defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, w.sizes, given);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpbusd_epi32((__m256i)sums, w.sizes, given);
#else
    const __m256i pairs = _mm256_maddubs_epi16(w.sizes, given);  // at most 2 x 128 x 127, which 16 bits hold
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// Weights of 4 bits that stand for -8 to 7 have no sign if they are taken as 0 to 15 (8 times the inputs are taken off
// elsewhere), and their products can be added up in 16 bits.
#define LABKIT_SUMS_OF_PAIRS 1
inline Bytes add_pairs(Bytes pairs, Bytes weights, const int8_t* four) {
    return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights, spread(four)));
}
inline Ints sums_of_pairs(Bytes pairs) { return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Scales or offsets of a tile's columns.
inline Floats numbers(const Weight& w, const void* from, int64_t at) {
    if (!w.half) return load_bits<Floats>(static_cast<const float*>(from) + at);
    const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at);
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(halves));
}

// To the nearest integer, ties to even. The product before it is rounded by itself, not fused with a sum.
inline vi nearest(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#else
    return (vi)_mm256_cvtps_epi32((__m256)x);
#endif
}

#else  // ARM

constexpr int LANES = 4;
typedef int8x16_t Bytes;
typedef int32x4_t Ints;
typedef float32x4_t Floats;
#define LABKIT_SUMS_OF_PAIRS 0

inline Bytes load_bytes(const uint8_t* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }
inline Bytes load_table(const int8_t* from) { return vld1q_s8(from); }
inline Bytes low_halves(Bytes x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline Bytes high_halves(Bytes x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
inline Bytes look_up(Bytes table, Bytes places) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(places)); }

typedef Bytes Weights;
inline Weights weights_of(Bytes x) { return x; }

inline Ints add_dots(Ints sums, Weights weights, const int8_t* four) {
    int32_t inputs;
    std::memcpy(&inputs, four, 4);
    return vdotq_s32(sums, weights, vreinterpretq_s8_s32(vdupq_n_s32(inputs)));
}

inline Floats numbers(const Weight& w, const void* from, int64_t at) {
    if (!w.half) return vld1q_f32(static_cast<const float*>(from) + at);
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(from) + at)));
}

inline vi nearest(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }

#endif

constexpr int PARTS = TILE / LANES;
