// The product on AVX-512 VNNI, which multiplies unsigned by signed bytes: weights have 128 added, which `counts` take away
// again. Part of cpu.cpp.
#pragma once

namespace vectors {

// -- up to four rows: bound by memory, each weight is read once ------------------------------------------------------

// Rows [row, row + Count) times a panel. VNNI multiplies unsigned by signed bytes: weights have 128 added, which
// `counts` take away again.
template <int Count, int Bits>
void few(const Rows& a, int64_t row, const Panels& panels, int64_t panel, int64_t next, float* sums) {
    const Weight& w = panels.w;
    const int64_t tile[2] = {panels.low(panel), panels.low(panel) + panels.second};
    const int64_t after[2] = {panels.low(next), panels.low(next) + panels.second};
    const uint8_t* at[2] = {panels.values(tile[0]), panels.values(tile[1])};
    // Fetched ahead: the rest of this panel's tiles, then the first bytes of the next one's.
    const uint8_t* ahead[2] = {at[0] + AHEAD, at[1] + AHEAD};
    int64_t lines = std::max<int64_t>(1, (panels.bytes() - AHEAD) / UNIT);
    const __m512i table = spread_table(w, -128), low_half = _mm512_set1_epi8(15), top = _mm512_set1_epi8(-128);
    const int8_t* from[Count];
    for (int r = 0; r < Count; r++) {
        from[r] = a.at(row + r, 0);
        store(place(sums, row + r), vf{});
        store(place(sums, row + r) + 256, vf{});
    }
    for (int64_t g = 0; g < w.groups; g++) {
        __m512i dots[2][Count];
        for (int t = 0; t < 2; t++)
#pragma GCC unroll 4
            for (int r = 0; r < Count; r++) dots[t][r] = _mm512_setzero_si512();
        panels.fetch_scales(after[0], g);
        panels.fetch_scales(after[1], g);
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 32 / Bits) {
            if (lines-- == 0) {
                ahead[0] = panels.values(after[0]);
                ahead[1] = panels.values(after[1]);
            }
#pragma GCC unroll 2
            for (int t = 0; t < 2; t++) {
                const __m512i bytes = _mm512_load_si512(at[t]);
                _mm_prefetch((const char*)ahead[t], _MM_HINT_T0);
                at[t] += UNIT;
                ahead[t] += UNIT;
                if constexpr (Bits == 4) {
                    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low_half));
                    const __m512i high =
                        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half));
#pragma GCC unroll 4
                    for (int r = 0; r < Count; r++) {
                        int32_t four[2];
                        std::memcpy(four, from[r] + k, 8);
                        dots[t][r] = _mm512_dpbusd_epi32(dots[t][r], low, _mm512_set1_epi32(four[0]));
                        dots[t][r] = _mm512_dpbusd_epi32(dots[t][r], high, _mm512_set1_epi32(four[1]));
                    }
                } else {
                    const __m512i whole = _mm512_xor_si512(bytes, top);
#pragma GCC unroll 4
                    for (int r = 0; r < Count; r++) {
                        int32_t four;
                        std::memcpy(&four, from[r] + k, 4);
                        dots[t][r] = _mm512_dpbusd_epi32(dots[t][r], whole, _mm512_set1_epi32(four));
                    }
                }
            }
        }
        for (int t = 0; t < 2; t++) {
            const vf scales = panels.scale(w.scales, tile[t], g);
            const vf offsets = w.offsets ? panels.scale(w.offsets, tile[t], g) : vf{};
#pragma GCC unroll 4
            for (int r = 0; r < Count; r++) {
                const int64_t one = a.place(row + r, g);
                float* to = place(sums, row + r) + t * 256;
                add(to, _mm512_sub_epi32(dots[t][r], _mm512_set1_epi32(a.counts[one])), scales, a.scales[one]);
                if (w.offsets) add_offset(to, offsets, a.sums[one]);
            }
        }
    }
}

// -- more rows: bound by arithmetic -----------------------------------------------------------------------------------
//
// Weights of some groups become unsigned bytes in L1, and are multiplied by twelve rows at a time: 24 sums, and two
// vectors of weights. The four inputs of a row are an operand in memory, at a constant distance from the row before.

constexpr int ROW = 16;             // bytes from row to row: rows lie in chunks of sixteen inputs
constexpr int64_t MOST_BLOCK = 48;  // rows for which the same weights stay in L1
constexpr int64_t MOST_DEEP = 512;  // inputs whose weights do: 16 KB of a panel

// The weights that are multiplied next, fetched by the first rows that are multiplied now.
struct Next {
    const uint8_t *low, *high;
    int lines;  // for each sixteen inputs

    void some() {
        for (int i = 0; i < lines; i++, low += UNIT, high += UNIT) {
            _mm_prefetch((const char*)low, _MM_HINT_T0);
            _mm_prefetch((const char*)high, _MM_HINT_T0);
        }
    }
};
struct Nothing {
    void some() {}
};

template <int Bits>
inline void unsign(const Weight& w, const uint8_t* from, int64_t units, uint8_t* to) {
    if constexpr (Bits == 4) {
        const __m512i table = spread_table(w, -128), half = _mm512_set1_epi8(15);
        for (int64_t i = 0; i < units; i += 2, from += UNIT, to += 2 * UNIT) {
            const __m512i bytes = _mm512_load_si512(from);
            _mm512_store_si512(to, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, half)));
            _mm512_store_si512(
                to + UNIT, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half)));
        }
    } else {
        const __m512i top = _mm512_set1_epi8(-128);
        for (int64_t i = 0; i < units * UNIT; i += UNIT)
            _mm512_store_si512(to + i, _mm512_xor_si512(_mm512_load_si512(from + i), top));
    }
}

// A block of rows and some groups of a panel.
struct Block {
    const Rows& a;
    const Panels& panels;
    int64_t row, tile[2];        // the block's first row, a multiple of 16; the panel's tiles
    int64_t begin, end;          // groups
    const uint8_t *low, *high;   // their weights, unsigned
    float* sums;                 // of the block

    // Rows [First, First + Count) of the block, which lie in one tile of rows or in two.
    template <int First, int Count, class Fetch>
    void run(Fetch fetch) const {
        constexpr int TOP = First / TILE, SPLIT = std::min(Count, (TOP + 1) * TILE - First);
        const Weight& w = panels.w;
        const int8_t* upper = a.values + (row + TOP * TILE) * a.deep + begin * w.group * TILE + First % TILE * ROW;
        const int8_t* lower = upper + a.deep * TILE - (SPLIT + First % TILE) * ROW;
        const uint8_t *left = low, *right = high;
        for (int64_t g = begin; g < end; g++) {
            const int64_t one = a.place(row + TOP * TILE, g) + First % TILE;
            const int64_t two = one + a.groups * TILE - First % TILE - SPLIT;  // of the tile below, less the rows above
            __m512i x[Count], y[Count];
#pragma GCC unroll 12
            for (int r = 0; r < Count; r++) {
                x[r] = _mm512_set1_epi32(-a.counts[(r < SPLIT ? one : two) + r]);
                y[r] = x[r];
            }
            for (int64_t k = 0; k < w.group; k += 16, upper += 16 * TILE, lower += 16 * TILE) {
#pragma GCC unroll 4
                for (int unit = 0; unit < 4; unit++) {
                    const __m512i b = _mm512_load_si512(left + unit * UNIT);
                    const __m512i c = _mm512_load_si512(right + unit * UNIT);
#pragma GCC unroll 12
                    for (int r = 0; r < Count; r++) {
                        int32_t four;
                        std::memcpy(&four, (r < SPLIT ? upper : lower) + r * ROW + unit * 4, 4);
                        x[r] = _mm512_dpbusd_epi32(x[r], b, _mm512_set1_epi32(four));
                        y[r] = _mm512_dpbusd_epi32(y[r], c, _mm512_set1_epi32(four));
                    }
                }
                left += 4 * UNIT;
                right += 4 * UNIT;
                fetch.some();
            }
            scale<First, Count, SPLIT>(g, 0, x, one, two);
            scale<First, Count, SPLIT>(g, 1, y, one, two);
        }
    }

    template <int First, int Count, int SPLIT>
    void scale(int64_t g, int t, const __m512i (&dots)[Count], int64_t one, int64_t two) const {
        const vf scales = panels.scale(panels.w.scales, tile[t], g);
#pragma GCC unroll 12
        for (int r = 0; r < Count; r++)
            add(place(sums, First + r) + t * 256, dots[r], scales, a.scales[(r < SPLIT ? one : two) + r]);
        if (!panels.w.offsets) return;
        const vf offsets = panels.scale(panels.w.offsets, tile[t], g);
#pragma GCC unroll 12
        for (int r = 0; r < Count; r++)
            add_offset(place(sums, First + r) + t * 256, offsets, a.sums[(r < SPLIT ? one : two) + r]);
    }

    template <int First, class Fetch>
    void rows(int64_t count, Fetch fetch) const {
        if constexpr (First < MOST_BLOCK) {
            const int64_t left = count - First;
            if (left <= 0) return;
            if (left <= 4) return run<First, 4>(fetch);
            if (left <= 8) return run<First, 8>(fetch);
            run<First, 12>(fetch);
            rows<First + 12>(count, Nothing{});
        }
    }
};

// All rows times a panel.
template <int Bits>
void many(const Rows& a, int64_t rows, const Panels& panels, int64_t panel, int64_t next, float* sums) {
    const Weight& w = panels.w;
    const int64_t each = std::max<int64_t>(1, MOST_DEEP / w.group), units = w.group / 4, bytes = units * UNIT * Bits / 8;
    const int64_t tile[2] = {panels.low(panel), panels.low(panel) + panels.second};
    const int64_t after[2] = {panels.low(next), panels.low(next) + panels.second};
    uint8_t* low = room.unpacked.fit<uint8_t>(2 * each * units * UNIT);
    uint8_t* high = low + each * units * UNIT;
    for (int64_t i = 0; i < parts(rows, TILE) * 512; i += W) store(sums + i, vf{});
    for (int64_t row = 0; row < rows; row += MOST_BLOCK) {
        for (int64_t g = 0; g < w.groups; g += each) {
            const int64_t end = std::min(g + each, w.groups);
            unsign<Bits>(w, panels.values(tile[0]) + g * bytes, (end - g) * units, low);
            unsign<Bits>(w, panels.values(tile[1]) + g * bytes, (end - g) * units, high);
            const Block block{a, panels, row, {tile[0], tile[1]}, g, end, low, high, place(sums, row)};
            const int64_t count = std::min(MOST_BLOCK, rows - row);
            if (row > 0) {
                block.template rows<0>(count, Nothing{});
            } else {
                const bool more = end < w.groups;
                const int64_t* where = more ? tile : after;
                const int64_t at = more ? end * bytes : 0;
                for (int64_t i = end; more && i < std::min(end + each, w.groups); i++) {
                    panels.fetch_scales(tile[0], i);
                    panels.fetch_scales(tile[1], i);
                }
                block.template rows<0>(
                    count, Next{panels.values(where[0]) + at, panels.values(where[1]) + at, 4 * Bits / 8});
            }
        }
    }
}

template <int Bits>
void all(const Rows& a, int64_t rows, const Panels& panels, int64_t panel, int64_t next, float* sums) {
    if (a.tiled) return many<Bits>(a, rows, panels, panel, next, sums);
    if (rows == 4) few<4, Bits>(a, 0, panels, panel, next, sums);
    if (rows == 3) few<3, Bits>(a, 0, panels, panel, next, sums);
    if (rows == 2) few<2, Bits>(a, 0, panels, panel, next, sums);
    if (rows == 1) few<1, Bits>(a, 0, panels, panel, next, sums);
}

}  // namespace vectors
