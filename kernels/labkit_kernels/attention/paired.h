// The same attention for bfloat16, on units that multiply pairs: AMX tiles, or vectors (AVX-512 BF16). Included by
// attend.h; it uses the items, rows and parts defined there.
//
// Scores are computed transposed, keys x rows. So the keys are the left operand and need no packing; only the queries
// are packed, once per item. Sixteen rows are in the sixteen lanes of a register, so the softmax has no horizontal
// sums. Weights are transposed back (64 shuffles for 16 rows x 32 keys) and multiplied with the values, whose rows
// were interleaved in pairs within 128-bit lanes. The columns of the result come out in that order, and are reordered
// once at the end.
//
// Without tiles, up to eight rows, as a decode step has, would leave most of sixteen lanes idle: few.h has keys in the
// lanes there, and gives the same bits.
#pragma once

#include "../tiles.h"

namespace paired {

using amx::DEPTH;
using amx::TILE;
using amx::whole;

constexpr float SLACK = 8.f;  // weights may reach 2^8 before a row is rescaled, which float32 can hold

struct Scratch {
    std::vector<float> store;
    float *scores, *out, *most, *sum, *row;
    bf16 *q, *keys, *values, *weights;

    void fit(int64_t rows, int64_t size, int64_t value_size) {
        int64_t need[] = {KEYS * TILE,     rows * value_size, rows, 4 * rows, value_size, rows * size / 2,
                          KEYS * size / 2, KEYS * value_size / 2, KEYS * TILE / 2};
        float** to[] = {&scores, &out, &most, &sum, &row};
        bf16** halves[] = {&q, &keys, &values, &weights};
        int64_t total = 16;
        for (int64_t n : need) total += whole(n, 16);
        if (static_cast<int64_t>(store.size()) < total) store.resize(total);
        auto at = (reinterpret_cast<uintptr_t>(store.data()) + 63) / 64 * 64;
        for (int i = 0; i < 9; i++) {
            if (i < 5) *to[i] = reinterpret_cast<float*>(at);
            else *halves[i - 5] = reinterpret_cast<bf16*>(at);
            at += whole(need[i], 16) * sizeof(float);
        }
    }
};

#include "pack.h"

// 2^x to about 4e-6: the weights are rounded to bfloat16 (4e-3) anyway.
inline __m512 exp2_coarse(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x); of -inf, 0
    __m512 p = _mm512_set1_ps(1.353417e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144276e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);
}

// The address of each 16 keys of a tile; keys are `stride` bytes apart.
struct KeyTiles {
    const bf16* at[KEYS / TILE];
    int64_t stride;
};

// The cache lines of the next tile's keys, prefetched one by one while this tile's keys are multiplied.
struct Lines {
    const void* const* row;  // null: nothing to prefetch
    int64_t bytes;           // of a row
    int64_t byte = 0;
    int left = KEYS;

    void one() {
        if (row == nullptr || left == 0) return;
        _mm_prefetch(static_cast<const char*>(*row) + byte, _MM_HINT_T0);
        if ((byte += 64) < bytes) return;
        byte = 0;
        left--;
        row++;
    }
};

#if LABKIT_TILES
struct TileUnit {
    using Scope = amx::Tiles;
    static constexpr bool FETCHES_AT_ONCE = true;
    static constexpr int SUMS = 1;  // of weights, kept for each row

    // scores[KEYS][16] = keys x queries.
    static void multiply_keys(const KeyTiles& keys, const bf16* q, int64_t wide, int tiles, float* scores, Lines) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < wide; d += DEPTH) {
            _tile_loadd(7, q + d * TILE, 64);
            _tile_loadd(4, keys.at[0] + d, keys.stride);
            _tile_dpbf16ps(0, 4, 7);
            if (tiles > 1) {
                _tile_loadd(5, keys.at[1] + d, keys.stride);
                _tile_dpbf16ps(1, 5, 7);
            }
            if (tiles > 2) {
                _tile_loadd(6, keys.at[2] + d, keys.stride);
                _tile_dpbf16ps(2, 6, 7);
            }
            if (tiles > 3) {
                _tile_loadd(4, keys.at[3] + d, keys.stride);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, scores, 64);
        if (tiles > 1) _tile_stored(1, scores + 256, 64);
        if (tiles > 2) _tile_stored(2, scores + 512, 64);
        if (tiles > 3) _tile_stored(3, scores + 768, 64);
    }

    // out[16][wide] += weights[16][KEYS] x values.
    static void multiply_values(const bf16* weights, const bf16* values, int, int64_t wide, int tiles, float* out) {
        const int64_t stride = wide * sizeof(float);
        _tile_loadd(4, weights, KEYS * sizeof(bf16));
        if (tiles > 1) _tile_loadd(5, weights + DEPTH, KEYS * sizeof(bf16));
        for (int64_t d = 0; d < wide; d += 2 * TILE) {
            _tile_loadd(0, out + d, stride);
            _tile_loadd(1, out + d + TILE, stride);
            const bf16* v = values + d * DEPTH;
            _tile_loadd(6, v, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, v + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (tiles > 1) {
                v += DEPTH * wide;
                _tile_loadd(6, v, 64);
                _tile_dpbf16ps(0, 5, 6);
                _tile_loadd(7, v + 512, 64);
                _tile_dpbf16ps(1, 5, 7);
            }
            _tile_stored(0, out + d, stride);
            _tile_stored(1, out + d + TILE, stride);
        }
    }
};
#endif

// A pair of a key, or of weights, is broadcast over a vector and multiplied with sixteen pairs of the other operand.
struct VectorUnit {
    struct Scope {};
    static constexpr bool FETCHES_AT_ONCE = false;
    static constexpr int SUMS = 4;  // one for each fourth pair of keys, as in few.h

    // scores[KEYS][16] = keys x queries.
    static void multiply_keys(const KeyTiles& keys, const bf16* q, int64_t wide, int tiles, float* scores,
                              Lines ahead) {
        for (int i = 0; i < tiles; i++) {
            const char* at[4];
            for (int j = 0; j < 4; j++) at[j] = reinterpret_cast<const char*>(keys.at[i]) + 4 * j * keys.stride;
            const int64_t one = keys.stride, three = 3 * one;
            __m512 sums[TILE];
            for (int k = 0; k < TILE; k++) sums[k] = _mm512_setzero_ps();
            for (int64_t d = 0; d < wide; d += 2) {
                const __m512bh pairs = (__m512bh)_mm512_load_si512(q + d / DEPTH * DEPTH * TILE + d % DEPTH * TILE);
                ahead.one();
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m512* to = sums + 4 * j;
                    to[0] = _mm512_dpbf16_ps(to[0], pairs, (__m512bh)spread(at[j]));
                    to[1] = _mm512_dpbf16_ps(to[1], pairs, (__m512bh)spread(at[j] + one));
                    to[2] = _mm512_dpbf16_ps(to[2], pairs, (__m512bh)spread(at[j] + 2 * one));
                    to[3] = _mm512_dpbf16_ps(to[3], pairs, (__m512bh)spread(at[j] + three));
                    at[j] += 4;
                }
            }
            for (int k = 0; k < TILE; k++) _mm512_store_ps(scores + (i * TILE + k) * TILE, sums[k]);
        }
    }

    // out[rows][wide] += weights[rows][KEYS] x values.
    __attribute__((always_inline)) static void multiply_values(const bf16* weights, const bf16* values, int rows,
                                                               int64_t wide, int tiles, float* out) {
        for (int64_t d = 0; d < wide; d += DEPTH) {
            const bf16* v = values + d * DEPTH;
            int r = 0;
            for (; r + 8 <= rows; r += 8) some_values<8>(weights + r * KEYS, v, wide, tiles, out + r * wide + d);
            if (r < rows)
                with_rows(rows - r, [&](auto number) {
                    some_values<number>(weights + r * KEYS, v, wide, tiles, out + r * wide + d);
                });
        }
    }

    // f(the fewest rows there is code for that are at least `rows`); further rows have memory, but are never read.
    template <class F>
    static void with_rows(int rows, const F& f) {
        switch (rows) {
            case 1: return f(std::integral_constant<int, 1>{});
            case 2: return f(std::integral_constant<int, 2>{});
            case 3: return f(std::integral_constant<int, 3>{});
            case 4: return f(std::integral_constant<int, 4>{});
            case 5: case 6: return f(std::integral_constant<int, 6>{});
            default: return f(std::integral_constant<int, 8>{});
        }
    }

    static __m512i spread(const void* pair) {
        int32_t two;
        std::memcpy(&two, pair, 4);
        return _mm512_set1_epi32(two);
    }

  private:
    template <int ROWS_NOW>
    static void some_values(const bf16* weights, const bf16* values, int64_t wide, int tiles, float* out) {
        __m512 x[ROWS_NOW], y[ROWS_NOW];
        for (int r = 0; r < ROWS_NOW; r++) {
            x[r] = _mm512_load_ps(out + r * wide);
            y[r] = _mm512_load_ps(out + r * wide + TILE);
        }
        for (int i = 0; i < tiles; i++, weights += DEPTH, values += DEPTH * wide)
            for (int k = 0; k < DEPTH; k += 2) {
                const __m512bh a = (__m512bh)_mm512_load_si512(values + k * TILE);
                const __m512bh b = (__m512bh)_mm512_load_si512(values + 512 + k * TILE);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS_NOW; r++) {
                    const __m512bh weight = (__m512bh)spread(weights + r * KEYS + k);
                    x[r] = _mm512_dpbf16_ps(x[r], weight, a);
                    y[r] = _mm512_dpbf16_ps(y[r], weight, b);
                }
            }
        for (int r = 0; r < ROWS_NOW; r++) {
            _mm512_store_ps(out + r * wide, x[r]);
            _mm512_store_ps(out + r * wide + TILE, y[r]);
        }
    }
};

// f(the best unit of this machine).
template <class F>
void on_best_unit(const F& f) {
#if LABKIT_TILES
    if (amx::available()) return f(TileUnit{});
#endif
    f(VectorUnit{});
}

struct Lanes {
    __m512i position;  // of each row's query
    __m512 slope;
    float scale, softcap;
    int window;
    bool masked, plain;
};

// scores[keys][16] to weights[16][KEYS], and the rows' running maximum and sums [SUMS][16]; rescales `out` where the
// maximum grew. `scales`: of the tile's keys and values, or null.
template <int SUMS, class ScalesOrNull>
void softmax(float* scores, int begin, int count, const Lanes& lanes, float* most_at, float* sum_at, float* out,
             int64_t wide, bf16* weights, ScalesOrNull scales) {
    constexpr bool scaled = !std::is_same_v<ScalesOrNull, std::nullptr_t>;
    if constexpr (scaled)
        for (int k = 0; k < count; k++)
            _mm512_store_ps(scores + k * TILE,
                            _mm512_mul_ps(_mm512_load_ps(scores + k * TILE), _mm512_set1_ps(scales->key[k])));
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    const __m512 scale = _mm512_set1_ps(lanes.scale * (lanes.plain ? LOG2E : 1.f));
    const __m512 factor = lanes.plain ? scale : _mm512_set1_ps(1.f);  // scale still to be applied in the exponent
    __m512 largest = lowest;
    if (lanes.plain && !lanes.masked) {
        __m512 other = lowest;
        for (int k = 0; k < count; k += 2) {
            largest = _mm512_max_ps(largest, _mm512_load_ps(scores + k * TILE));
            other = _mm512_max_ps(other, _mm512_load_ps(scores + k * TILE + TILE));
        }
        largest = _mm512_max_ps(largest, other);
    } else {
        const __m512i oldest = _mm512_sub_epi32(lanes.position, _mm512_set1_epi32(lanes.window));
        for (int k = 0; k < KEYS; k++) {
            const __m512i at = _mm512_set1_epi32(begin + k);
            __m512 x = _mm512_load_ps(scores + k * TILE);
            if (!lanes.plain) {
                x = _mm512_mul_ps(x, scale);
                if (lanes.softcap != 0.f) x = (__m512)(labkit::tanhv((vf)x / lanes.softcap) * lanes.softcap);
                x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(at, lanes.position)), lanes.slope, x);
                x = _mm512_mul_ps(x, _mm512_set1_ps(LOG2E));
            }
            __mmask16 seen = k < count ? _mm512_cmple_epi32_mask(at, lanes.position) : 0;
            if (lanes.window) seen &= _mm512_cmpgt_epi32_mask(at, oldest);
            x = _mm512_mask_mov_ps(lowest, seen, x);
            _mm512_store_ps(scores + k * TILE, x);
            largest = _mm512_max_ps(largest, x);
        }
    }
    largest = _mm512_mul_ps(largest, factor);
    __m512 most = _mm512_load_ps(most_at);
    const __mmask16 beyond = _mm512_cmp_ps_mask(largest, _mm512_add_ps(most, _mm512_set1_ps(SLACK)), _CMP_GT_OQ);
    if (beyond) {  // only those rows, so that no row depends on another
        const __m512 grown = _mm512_mask_max_ps(most, beyond, most, largest);
        alignas(64) float by[TILE];
        __m512 rescale = exp2_coarse(_mm512_sub_ps(most, grown));
        rescale = _mm512_mask_mov_ps(rescale, _mm512_cmp_ps_mask(most, grown, _CMP_EQ_OQ), _mm512_set1_ps(1.f));
        _mm512_store_ps(by, rescale);
        for (int i = 0; i < SUMS; i++)
            _mm512_store_ps(sum_at + i * TILE, _mm512_mul_ps(_mm512_load_ps(sum_at + i * TILE), rescale));
        most = grown;
        _mm512_store_ps(most_at, most);
        for (int r = 0; r < TILE; r++)
            if (by[r] != 1.f)
                for (int64_t d = 0; d < wide; d += TILE)
                    _mm512_store_ps(out + r * wide + d,
                                    _mm512_mul_ps(_mm512_load_ps(out + r * wide + d), _mm512_set1_ps(by[r])));
    }
    // A row without any key so far: its weights are 2^-inf, whatever is subtracted.
    const __m512 shift = _mm512_mask_mov_ps(most, _mm512_cmp_ps_mask(most, lowest, _CMP_EQ_OQ), _mm512_setzero_ps());
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sums[SUMS], other = _mm512_setzero_ps();
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_load_ps(sum_at + i * TILE);
    for (int k = 0; k < count; k += DEPTH) {
        vf tile[TILE];
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            const float* at = scores + (k + 2 * i) * TILE;
            __m512 a = exp2_coarse(_mm512_fmsub_ps(_mm512_load_ps(at), factor, shift));
            __m512 b = exp2_coarse(_mm512_fmsub_ps(_mm512_load_ps(at + TILE), factor, shift));
            if constexpr (SUMS == 1) {
                sums[0] = _mm512_add_ps(sums[0], a);
                other = _mm512_add_ps(other, b);
            } else {
                sums[i % SUMS] = _mm512_add_ps(sums[i % SUMS], _mm512_add_ps(a, b));
            }
            if constexpr (scaled) {
                a = _mm512_mul_ps(a, _mm512_set1_ps(scales->value[k + 2 * i]));
                b = _mm512_mul_ps(b, _mm512_set1_ps(scales->value[k + 2 * i + 1]));
            }
            tile[i] = (vf)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        labkit::transpose(tile);
        for (int r = 0; r < TILE; r++) std::memcpy(weights + r * KEYS + k, &tile[r], 64);
    }
    if constexpr (SUMS == 1) sums[0] = _mm512_add_ps(sums[0], other);
    for (int i = 0; i < SUMS; i++) _mm512_store_ps(sum_at + i * TILE, sums[i]);
}

#include "few.h"

template <class Unit, class C>
void attend(const Call& call, const Item& item, Scratch& s, Parts& parts) {
    const int64_t group = call.num_heads / call.num_kv_heads, rows = item.num_queries * group;
    const int64_t all_rows = whole(rows, TILE), deep = whole(call.head_size, DEPTH);
    const int64_t wide = whole(call.value_size, DEPTH);
    const int position = first_position(call, item);
    const bool plain = call.softcap == 0 && !call.alibi;
    if (Unit::SUMS > 1 && rows <= FEW && plain) return attend_few<C>(call, item, s, parts);

    s.fit(all_rows, deep, wide);
    std::memset(s.out, 0, all_rows * wide * sizeof(float));
    std::memset(s.sum, 0, all_rows * Unit::SUMS * sizeof(float));
    for (int64_t first = 0; first < rows; first += TILE) {
        const bf16* from[TILE];
        const int count = std::min<int64_t>(TILE, rows - first);
        for (int r = 0; r < count; r++) from[r] = query_row<bf16>(call, item, first + r);
        pack_queries(from, count, call.head_size, s.q + first * deep);
    }
    for (int64_t r = 0; r < all_rows; r++) {
        const float* sink = call.sinks && item.part == 0 ? call.sinks + item.head * group + r % group : nullptr;
        s.most[r] = sink ? *sink * LOG2E : -INFINITY;
        if (sink) s.sum[r / TILE * TILE * Unit::SUMS + r % TILE] = 1.f;  // of the first of its sums
    }

    auto lanes_of = [&](int64_t first) {
        Lanes found;
        alignas(64) int at[TILE];
        alignas(64) float slope[TILE];
        for (int r = 0; r < TILE; r++) {
            const int64_t row = std::min(first + r, rows - 1);
            at[r] = position + row / group;
            slope[r] = call.alibi ? call.alibi[item.head * group + row % group] : 0.f;
        }
        found.position = _mm512_load_si512(at);
        found.slope = _mm512_load_ps(slope);
        found.scale = call.scale;
        found.softcap = call.softcap;
        found.window = call.window;
        found.plain = plain;
        return found;
    };
    Lanes lanes = lanes_of(0);

    // Sixteen keys of a block are a tile without packing, unless they are codes. Memory after the last key was written
    // or zeroed, and is masked.
    const bool as_they_lie =
        !is_code<C> && call.block_size % TILE == 0 && item.begin % TILE == 0 && deep == call.head_size;
    Walk<C> walk(call, item);
    while (walk.next()) {
        const int begin = walk.begin, count = walk.count, last = begin + count - 1;
        [[maybe_unused]] Scales scales;
        if constexpr (is_code<C>)
            for (int k = 0; k < KEYS; k++) {
                scales.key[k] = walk.scales.key[k] * FACTOR<C>;
                scales.value[k] = walk.scales.value[k] * FACTOR<C>;
            }
        KeyTiles keys{{}, static_cast<int64_t>((as_they_lie ? call.k_slot : deep) * sizeof(bf16))};
        for (int i = 0; i < KEYS / TILE; i++)
            keys.at[i] = as_they_lie ? static_cast<const bf16*>(walk.keys.at[i * TILE]) : s.keys + i * TILE * deep;
        if (as_they_lie && Unit::FETCHES_AT_ONCE)
            for (int k = 0; k < KEYS; k++)
                for (int64_t d = 0; d < deep; d += DEPTH) prefetch(walk.next_keys.at[k], d * sizeof(bf16));
        if (!as_they_lie)
            copy_keys<C>(walk.keys, count, call.head_size, s.keys, walk.next_keys);
        pack_values<C>(walk.values, count, call.value_size, s.values, walk.next_values);
        for (int64_t first = 0; first < rows; first += TILE) {
            const int64_t stop = std::min(rows, first + TILE);
            const int low = position + first / group, high = position + (stop - 1) / group;
            if (begin > high || (call.window && last <= low - call.window)) continue;
            if (rows > TILE) lanes = lanes_of(first);
            lanes.masked = count < KEYS || last > low || (call.window && begin <= high - call.window);
            const bool fetches = first == 0 && as_they_lie && !Unit::FETCHES_AT_ONCE;
            Unit::multiply_keys(keys, s.q + first * deep, deep, (count + TILE - 1) / TILE, s.scores,
                                Lines{fetches ? walk.next_keys.at : nullptr, deep * int64_t{sizeof(bf16)}});
            auto weigh = [&](auto scales) {
                softmax<Unit::SUMS>(s.scores, begin, count, lanes, s.most + first, s.sum + first * Unit::SUMS,
                                    s.out + first * wide, wide, s.weights, scales);
            };
            if constexpr (is_code<C>) weigh(&scales);
            else weigh(nullptr);
            Unit::multiply_values(s.weights, s.values, static_cast<int>(stop - first), wide,
                                  (count + DEPTH - 1) / DEPTH, s.out + first * wide);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float* sums = s.sum + r / TILE * TILE * Unit::SUMS + r % TILE;
        const float sum = Unit::SUMS == 1 ? *sums : (sums[0] + sums[TILE]) + (sums[2 * TILE] + sums[3 * TILE]);
        unpack_columns(s.out + r * wide, wide, s.row);
        finish<bf16>(call, item, r, s.most[r], sum, s.row, parts);
    }
}

}  // namespace paired
