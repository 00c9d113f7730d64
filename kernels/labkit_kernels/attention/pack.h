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

// Sign, exponent and mantissa move to their places in bfloat16, and the exponent's upper bits are set: the value is
// the code's, divided by FACTOR. Subnormal codes, below 1/28,000 of the largest, count as zero.
template <int SHIFT>
inline __m512i move_bits(__m256i codes, int exponent, short kept, short upper) {
    const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), SHIFT);
    const __mmask32 normal = _mm256_test_epi8_mask(codes, _mm256_set1_epi8(exponent));
    return _mm512_maskz_mov_epi16(
        normal, _mm512_ternarylogic_epi32(wide, _mm512_set1_epi16(kept), _mm512_set1_epi16(upper), 0xea));  // a & b | c
}

inline __m512i load_row(const labkit::e4m3* at, int64_t left) {
    return move_bits<4>(load_codes(at, left), 0x78, static_cast<short>(0x87f0), 0x3800);
}

inline __m512i load_row(const labkit::e5m2* at, int64_t left) {
    return move_bits<5>(load_codes(at, left), 0x7c, static_cast<short>(0x8fe0), 0x3000);
}

// What the loaded values must be multiplied with.
template <class C>
constexpr float FACTOR = std::is_same_v<C, labkit::e4m3> ? 256.f : std::is_same_v<C, labkit::e5m2> ? 65536.f : 1.f;

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

// CHUNKS: of DEPTH values in a row, when known at compile time: loops over few chunks cost more than the chunks.
template <class C, int CHUNKS>
inline void copy_rows(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    if (CHUNKS) size = CHUNKS * DEPTH;
    const int64_t wide = whole(size, DEPTH);
    for (int k = 0; k < whole(count, TILE); k++, to += wide) {
        const C* from = static_cast<const C*>(rows.at[k]);
        for (int64_t d = 0; d < size; d += 64 / sizeof(C)) prefetch(next.at[k], d * sizeof(C));
        for (int64_t d = 0; d < size; d += DEPTH)
            _mm512_store_si512(to + d, load_row(from + d, CHUNKS ? DEPTH : size - d));
    }
}

// Tile (k, d) of the values is [16 pairs of keys][16 columns][2], at [k][d] of [KEYS / 32][wide / 16].
template <class C, int CHUNKS>
inline void pack_pairs(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    if (CHUNKS) size = CHUNKS * DEPTH;
    const int64_t wide = whole(size, DEPTH);
    for (int k = 0; k < whole(count, DEPTH); k += 2) {
        const C *a = static_cast<const C*>(rows.at[k]), *b = static_cast<const C*>(rows.at[k + 1]);
        bf16* tile = to + k / DEPTH * DEPTH * wide + k % DEPTH / 2 * DEPTH;
        for (int64_t d = 0; d < size; d += 64 / sizeof(C)) {
            prefetch(next.at[k], d * sizeof(C));
            prefetch(next.at[k + 1], d * sizeof(C));
        }
        for (int64_t d = 0; d < size; d += DEPTH) {
            const int64_t left = CHUNKS ? DEPTH : size - d;
            const __m512i x = load_row(a + d, left), y = load_row(b + d, left);
            _mm512_store_si512(tile + d / TILE * 512, _mm512_unpacklo_epi16(x, y));
            _mm512_store_si512(tile + d / TILE * 512 + 512, _mm512_unpackhi_epi16(x, y));
        }
    }
}

template <class C>
inline void copy_keys(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    if (size == 64) copy_rows<C, 2>(rows, count, size, to, next);
    else if (size == 128) copy_rows<C, 4>(rows, count, size, to, next);
    else copy_rows<C, 0>(rows, count, size, to, next);
}

template <class C>
inline void pack_values(const Rows& rows, int count, int64_t size, bf16* to, const Rows& next) {
    if (size == 64) pack_pairs<C, 2>(rows, count, size, to, next);
    else if (size == 128) pack_pairs<C, 4>(rows, count, size, to, next);
    else pack_pairs<C, 0>(rows, count, size, to, next);
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
