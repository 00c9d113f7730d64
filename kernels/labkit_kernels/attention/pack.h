// Puts queries, keys and values in the order in which units multiply pairs; codes of 8 bits become bfloat16, exactly.
// Part of paired.h.

using amx::load_row;  // of bfloat16

inline __m256i load_codes(const void* at, int64_t left) {
    if (left >= DEPTH) return _mm256_loadu_si256(static_cast<const __m256i*>(at));
    return _mm256_maskz_loadu_epi8((1u << left) - 1, at);
}

inline __m512i load_row(const labkit::int8* at, int64_t left) {
    const __m256i codes = load_codes(at, left);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Exponent and mantissa move to their places in bfloat16 and the exponent gets its bias. Subnormal codes, below 1 <<
// MANTISSA, are looked up.
template <int MANTISSA>
inline __m512i spread_codes(__m256i codes, int bias, __m512i subnormal) {
    const __m512i wide = _mm512_cvtepu8_epi16(codes), size = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    const __m512i normal =
        _mm512_add_epi16(_mm512_slli_epi16(size, 7 - MANTISSA), _mm512_set1_epi16(static_cast<short>(bias << 7)));
    const __mmask32 small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x80 - (1 << MANTISSA)));
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, small, size, subnormal);
    return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-0x8000), 0xf8);  // a | b & c
}

inline __m512i load_row(const labkit::e4m3* at, int64_t left) {  // multiples of 2^-9
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    return spread_codes<3>(load_codes(at, left), 120, subnormal);
}

inline __m512i load_row(const labkit::e5m2* at, int64_t left) {  // multiples of 2^-16
    const __m512i subnormal = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3780, 0x3800, 0x3840, 0, 0, 0, 0));
    return spread_codes<2>(load_codes(at, left), 112, subnormal);
}

// Sixteen queries, transposed in pairs: tile d of q is [16 pairs of dimensions][16 rows][2].
inline void pack_queries(const bf16* const* rows, int count, int64_t size, bf16* to) {
    for (int64_t d = 0; d < size; d += DEPTH) {
        vf tile[TILE];
        for (int r = 0; r < TILE; r++)
            tile[r] = r < count ? (vf)load_row(rows[r] + d, size - d) : vf{};
        labkit::transpose(tile);
        for (int i = 0; i < TILE; i++) std::memcpy(to + d * TILE + i * DEPTH, &tile[i], 64);
    }
}

template <class C>
inline void copy_keys(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    const int64_t wide = whole(size, DEPTH);
    for (int k = 0; k < whole(count, TILE); k++)
        for (int64_t d = 0; d < size; d += DEPTH) {
            if (d * sizeof(C) % 64 == 0) prefetch(next.at[k], d * sizeof(C));
            _mm512_store_si512(to + k * wide + d, load_row(static_cast<const C*>(rows.at[k]) + d, size - d));
        }
}

// Tile (k, d) of the values is [16 pairs of keys][16 columns][2], at [k][d] of [KEYS / 32][wide / 16].
template <class C>
inline void pack_values(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    const int64_t wide = whole(size, DEPTH);
    for (int k = 0; k < whole(count, DEPTH); k += 2) {
        const C *a = static_cast<const C*>(rows.at[k]), *b = static_cast<const C*>(rows.at[k + 1]);
        bf16* tile = to + k / DEPTH * DEPTH * wide + k % DEPTH / 2 * DEPTH;
        for (int64_t d = 0; d < size; d += DEPTH) {
            if (d * sizeof(C) % 64 == 0) {
                prefetch(next.at[k], d * sizeof(C));
                prefetch(next.at[k + 1], d * sizeof(C));
            }
            __m512i x = load_row(a + d, size - d), y = load_row(b + d, size - d);
            _mm512_store_si512(tile + d / TILE * 512, _mm512_unpacklo_epi16(x, y));
            _mm512_store_si512(tile + d / TILE * 512 + 512, _mm512_unpackhi_epi16(x, y));
        }
    }
}

// Reorders the columns of the result from the order of `pack_values`.
inline void unpack_columns(const float* from, int64_t wide, float* to) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t d = 0; d < wide; d += DEPTH) {
        __m512 a = _mm512_load_ps(from + d), b = _mm512_load_ps(from + d + TILE);
        _mm512_store_ps(to + d, _mm512_permutex2var_ps(a, low, b));
        _mm512_store_ps(to + d + TILE, _mm512_permutex2var_ps(a, high, b));
    }
}
