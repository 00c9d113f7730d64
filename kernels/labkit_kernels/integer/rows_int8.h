// Rows of inputs rounded to int8, with a scale for each group of the weight that they are multiplied by. Part of cpu.cpp.
#pragma once

// Rows of int8 with a scale a group: row by row, or as [tiles of rows][chunks][16 rows][chunk].
struct Rows {
    int64_t deep, groups, group, chunk;  // `deep`: groups * group
    bool tiled;
    int8_t* values;
    float *scales, *sums;  // [tiles of rows][groups][16]: a group's scale, and scale times the sum of its values
    int32_t* counts;       // 128 times the sum of its values

    int8_t* at(int64_t row, int64_t k) const {
        if (!tiled) return values + row * deep + k;
        return values + (row / TILE * deep + k / chunk * chunk) * TILE + row % TILE * chunk + k % chunk;
    }
    int64_t place(int64_t row, int64_t g) const { return (row / TILE * groups + g) * TILE + row % TILE; }
};

struct Room {
    Buffer values, scales, sums, counts, floats, inner, most, unpacked, products;
};
thread_local Room room;

Rows rows_for(const Weight& w, int64_t rows, bool tiled) {
    const int64_t all = parts(rows, TILE) * TILE, deep = w.groups * w.group;
    return {deep, w.groups, w.group, chunk_of(w.group), tiled, room.values.fit<int8_t>(all * deep),
            room.scales.fit<float>(all * w.groups), room.sums.fit<float>(all * w.groups),
            room.counts.fit<int32_t>(all * w.groups)};
}

inline vf largest_bits(vf a, vf b) {  // of absolute values; a NaN is larger than any number
    return (vf)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

// One row: norm, order, scales, rounding to nearest even.
void quantize(const bf16* x, const Norm& norm, const Weight& w, const Rows& to, int64_t row, float* floats) {
    const int64_t depth = w.depth;
    const float root = norm.weight ? inverse_root(x, depth, norm.eps) : 1.f;
    float* plain = w.order ? floats + to.deep : floats;
    for (int64_t d = 0; d < depth; d += W) {
        const __mmask16 mask = first(depth - d);
        vf v = load_first(x + d, mask);
        if (norm.weight) v = v * root * norm.scales(d, mask);
        store(plain + d, v);
    }
    if (w.order)
        for (int64_t d = 0; d < depth; d++) floats[d] = plain[w.order[d]];
    for (int64_t d = depth; d < to.deep; d++) floats[d] = 0;

    for (int64_t g = 0; g < to.groups; g++) {
        const float* from = floats + g * to.group;
        vf most = {};
        for (int64_t d = 0; d < to.group; d += W) most = largest_bits(most, labkit::abs(load(from + d)));
        const int32_t bits = _mm512_reduce_max_epi32((__m512i)most);
        float amax;
        std::memcpy(&amax, &bits, 4);
        const vf inverse = splat(amax > 0 ? 127.f / amax : 0.f);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t d = 0; d < to.group; d += W) {
            const __m512i q = _mm512_cvtps_epi32((__m512)(load(from + d) * inverse));
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128((__m128i*)to.at(row, g * to.group + d), _mm512_cvtsepi32_epi8(q));
        }
        const int64_t place = to.place(row, g);
        const int32_t total = _mm512_reduce_add_epi32(sum);
        const float scale = amax * (1.f / 127.f);
        to.scales[place] = scale;
        to.sums[place] = scale * total;
        to.counts[place] = total * 128;
    }
}

void quantize_all(const bf16* x, int64_t stride, int64_t rows, const Norm& norm, const Weight& w, const Rows& to) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        quantize(x + r * stride, norm, w, to, r, room.floats.fit<float>(2 * to.deep));
}
