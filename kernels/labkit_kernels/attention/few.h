// Attention of up to eight rows on vectors, with keys in the lanes: part of paired.h. Sixteen keys are transposed in
// pairs of dimensions, which costs as much as the products of four rows; the softmax of a row is then four exponentials
// for 64 keys, where rows in the lanes take 64. Each sum is taken in the same order as there, so that a row's bits do
// not depend on how many rows there are.

constexpr int64_t FEW = 8;

// Sixteen keys' dimensions [0, 32) in pairs: pairs[i] has dimensions 2i and 2i + 1 of each key.
template <class C>
inline void load_pairs(const void* const* keys, int64_t d, int64_t size, vf (&pairs)[TILE]) {
    if (std::is_same_v<C, bf16> && size - d >= DEPTH) {
        // Four keys' 16 bytes are put side by side by loads, so half of the shuffles of a transposition remain.
        for (int c = 0; c < 4; c++) {
            __m512 x[4];
            for (int j = 0; j < 4; j++) {
                auto at = [&](int k) { return _mm_loadu_ps(static_cast<const float*>(keys[k]) + d / 2 + 4 * c); };
                x[j] = _mm512_castps128_ps512(at(j));
                x[j] = _mm512_insertf32x4(x[j], at(j + 4), 1);
                x[j] = _mm512_insertf32x4(x[j], at(j + 8), 2);
                x[j] = _mm512_insertf32x4(x[j], at(j + 12), 3);
            }
            const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpacklo_ps(x[2], x[3]);
            const __m512d e = (__m512d)_mm512_unpackhi_ps(x[0], x[1]), f = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
            pairs[4 * c] = (vf)_mm512_unpacklo_pd(a, b);
            pairs[4 * c + 1] = (vf)_mm512_unpackhi_pd(a, b);
            pairs[4 * c + 2] = (vf)_mm512_unpacklo_pd(e, f);
            pairs[4 * c + 3] = (vf)_mm512_unpackhi_pd(e, f);
        }
    } else {
        for (int k = 0; k < TILE; k++) pairs[k] = (vf)load_row(static_cast<const C*>(keys[k]) + d, size - d);
        labkit::transpose(pairs);
    }
}

// scores[rows][KEYS] of `tiles` times sixteen keys.
template <class C, int ROWS_NOW>
void score_few(const Rows& keys, const bf16* q, int64_t size, int tiles, float* scores, const Rows& next) {
    const int64_t deep = whole(size, DEPTH);
    for (int i = 0; i < tiles; i++) {
        const void* const* at = keys.at + i * TILE;
        __m512 sums[ROWS_NOW];
        for (int r = 0; r < ROWS_NOW; r++) sums[r] = _mm512_setzero_ps();
        for (int64_t d = 0; d < size; d += DEPTH) {
            vf pairs[TILE];
            load_pairs<C>(at, d, size, pairs);
            if (d * sizeof(C) % 64 == 0)
                for (int k = 0; k < TILE; k++) prefetch(next.at[i * TILE + k], d * sizeof(C));
#pragma GCC unroll 16
            for (int pair = 0; pair < TILE; pair++)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS_NOW; r++) {
                    const __m512bh query = (__m512bh)VectorUnit::spread(q + r * deep + d + 2 * pair);
                    sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)pairs[pair], query);
                }
        }
        for (int r = 0; r < ROWS_NOW; r++) _mm512_store_ps(scores + r * KEYS + i * TILE, sums[r]);
    }
}

// The keys that a row sees: those of [first, stop), counted from the tile's first.
struct Seen {
    int first, stop;
};

// A row of scores to weights, and the row's running maximum and its four sums; rescales `out` where the maximum grew.
template <class ScalesOrNull>
void softmax_few(const float* scores, int count, Seen seen, float factor_of, float& most, float* sum_at, float* out,
                 int64_t wide, bf16* weights, ScalesOrNull scales) {
    constexpr bool scaled = !std::is_same_v<ScalesOrNull, std::nullptr_t>;
    const __m512 factor = _mm512_set1_ps(factor_of), lowest = _mm512_set1_ps(-INFINITY);
    const int vectors = static_cast<int>(whole(count, DEPTH)) / TILE;
    const uint64_t below = seen.stop < KEYS ? (uint64_t{1} << seen.stop) - 1 : ~uint64_t{0};
    const uint64_t mask = seen.first < KEYS ? below >> seen.first << seen.first : 0;
    __m512 x[KEYS / TILE], largest = lowest;
    for (int i = 0; i < vectors; i++) {
        x[i] = _mm512_load_ps(scores + i * TILE);
        if constexpr (scaled) x[i] = _mm512_mul_ps(x[i], _mm512_loadu_ps(scales->key + i * TILE));
        x[i] = _mm512_mask_mov_ps(lowest, static_cast<__mmask16>(mask >> i * TILE), x[i]);
        largest = _mm512_max_ps(largest, x[i]);
    }
    const float top = _mm512_reduce_max_ps(largest) * factor_of;
    __m128 sums = _mm_load_ps(sum_at);
    if (top > most + SLACK) {
        const float grown = std::max(most, top);
        const __m512 rescale = exp2_coarse(_mm512_sub_ps(_mm512_set1_ps(most), _mm512_set1_ps(grown)));
        sums = _mm_mul_ps(sums, _mm512_castps512_ps128(rescale));
        for (int64_t d = 0; d < wide; d += TILE)
            _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), rescale));
        most = grown;
    }
    const __m512 shift = _mm512_set1_ps(most == -INFINITY ? 0.f : most);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    for (int i = 0; i < vectors; i += 2) {
        __m512 a = exp2_coarse(_mm512_fmsub_ps(x[i], factor, shift));
        __m512 b = exp2_coarse(_mm512_fmsub_ps(x[i + 1], factor, shift));
        const __m512 pairs = _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
        sums = _mm_add_ps(sums, _mm512_castps512_ps128(pairs));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps(pairs, 1));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps(pairs, 2));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps(pairs, 3));
        if constexpr (scaled) {
            a = _mm512_mul_ps(a, _mm512_loadu_ps(scales->value + i * TILE));
            b = _mm512_mul_ps(b, _mm512_loadu_ps(scales->value + i * TILE + TILE));
        }
        _mm512_store_si512(weights + i * TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    _mm_store_ps(sum_at, sums);
}

template <class C>
void attend_few(const Call& call, const Item& item, Scratch& s, Parts& parts) {
    const int64_t group = call.num_heads / call.num_kv_heads, rows = item.num_queries * group;
    const int64_t deep = whole(call.head_size, DEPTH), wide = whole(call.value_size, DEPTH);
    const int position = first_position(call, item);
    s.fit(TILE, deep, wide);
    std::memset(s.out, 0, FEW * wide * sizeof(float));
    std::memset(s.sum, 0, FEW * VectorUnit::SUMS * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        const bf16* from = query_row<bf16>(call, item, r);
        for (int64_t d = 0; d < deep; d += DEPTH)
            _mm512_store_si512(s.q + r * deep + d, load_row(from + d, call.head_size - d));
        const float* sink = call.sinks && item.part == 0 ? call.sinks + item.head * group + r % group : nullptr;
        s.most[r] = sink ? *sink * LOG2E : -INFINITY;
        if (sink) s.sum[r * VectorUnit::SUMS] = 1.f;
    }
    const float factor = static_cast<float>(call.scale) * LOG2E;

    Walk<C> walk(call, item);
    while (walk.next()) {
        const int begin = walk.begin, count = walk.count, tiles = (count + TILE - 1) / TILE;
        VectorUnit::with_rows(static_cast<int>(rows), [&](auto number) {
            score_few<C, number>(walk.keys, s.q, call.head_size, tiles, s.scores, walk.next_keys);
        });
        [[maybe_unused]] Scales scales;
        if constexpr (is_code<C>)
            for (int k = 0; k < KEYS; k++) {
                scales.key[k] = walk.scales.key[k] * FACTOR<C>;
                scales.value[k] = walk.scales.value[k] * FACTOR<C>;
            }
        for (int64_t r = 0; r < rows; r++) {
            const int at = position + static_cast<int>(r / group);
            const Seen seen{call.window ? std::clamp<int>(at - call.window + 1 - begin, 0, KEYS) : 0,
                            std::clamp(at + 1 - begin, 0, count)};
            auto weigh = [&](auto scales) {
                softmax_few(s.scores + r * KEYS, count, seen, factor, s.most[r], s.sum + r * VectorUnit::SUMS,
                            s.out + r * wide, wide, s.weights + r * KEYS, scales);
            };
            if constexpr (is_code<C>) weigh(&scales);
            else weigh(nullptr);
        }
        pack_values<C>(walk.values, count, call.value_size, s.values, walk.next_values);
        VectorUnit::multiply_values(s.weights, s.values, static_cast<int>(rows), wide, (count + DEPTH - 1) / DEPTH,
                                    s.out);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float* sums = s.sum + r * VectorUnit::SUMS;
        unpack_columns(s.out + r * wide, wide, s.row);
        finish<bf16>(call, item, r, s.most[r], (sums[0] + sums[1]) + (sums[2] + sums[3]), s.row, parts);
    }
}
