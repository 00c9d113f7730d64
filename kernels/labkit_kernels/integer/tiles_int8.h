// The product on AMX: tiles of 16 rows x 16 columns, of which each instruction adds 64 (or 32, or 16) inputs. Part of
// cpu.cpp.
//
// A group's integer sums leave the tile registers through a buffer in L1. They are scaled and added while the next
// group is multiplied: the tile unit and the vector units work side by side.
#pragma once

namespace tiles {

// Registers while one of these lives: `Tall` x 2 of sums, then rows, then columns.
struct Scope {
    Scope(int tall, int64_t chunk) {
        amx::TileConfig c;
        const int sums = tall == 3 ? 6 : 4;
        for (int i = 0; i < 8; i++) {
            const bool is_sum = i < sums, is_column = i == 7 || (i == 6 && tall < 3);
            c.rows[i] = is_sum || !is_column ? TILE : chunk / 4;
            c.bytes[i] = is_sum || is_column ? 64 : chunk;
        }
        asm volatile("ldtilecfg %0" ::"m"(c) : "memory");
    }
    ~Scope() { asm volatile("tilerelease" ::: "memory"); }
};

// A group of a tile's weights, of 4 bits, to signed bytes, while `ahead` is fetched.
inline void unpack(const uint8_t* from, int64_t group, __m512i table, uint8_t* to, const uint8_t* ahead) {
    const __m512i low_half = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < group * TILE / 2; i += UNIT) {
        const __m512i bytes = _mm512_load_si512(from + i);
        _mm_prefetch((const char*)ahead + i, _MM_HINT_T0);
        _mm512_store_si512(to + 2 * i, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low_half)));
        _mm512_store_si512(to + 2 * i + UNIT,
                           _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half)));
    }
}

// Adds a group's integer sums [tiles of rows][2][16][16], scaled, to `sums`. Half of the work where groups are short, so
// the loop over sixteen rows is unrolled.
struct Scaling {
    const Rows& a;
    const Panels& panels;
    int64_t row, rows;  // a multiple of 16; how many
    int64_t tile[2];

    void operator()(int64_t g, const int32_t* dots, float* sums) const {
        for (int t = 0; t < 2; t++) {
            const vf scales = panels.scale(panels.w.scales, tile[t], g);
            const vf offsets = panels.w.offsets ? panels.scale(panels.w.offsets, tile[t], g) : vf{};
            for (int64_t r = 0; r < rows; r += TILE) {
                const int64_t at = r * 32 + t * 256, from = a.place(row + r, g);
                const int count = static_cast<int>(std::min<int64_t>(rows - r, TILE));
                if (count == TILE) tile_of<TILE>(dots + at, sums + at, scales, a.scales + from, TILE);
                else tile_of<0>(dots + at, sums + at, scales, a.scales + from, count);
                if (panels.w.offsets)
                    for (int i = 0; i < count; i++) add_offset(sums + at + i * TILE, offsets, a.sums[from + i]);
            }
        }
    }

    template <int Count>
    static void tile_of(const int32_t* __restrict dots, float* __restrict sums, vf scales,
                        const float* __restrict each, int count) {
        const int n = Count ? Count : count;
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) add(sums + i * TILE, _mm512_load_si512(dots + i * TILE), scales, each[i]);
    }
};

template <int Tall>
inline void multiply(const int8_t* rows, int64_t down, const uint8_t* low, const uint8_t* high, int64_t chunk) {
    if constexpr (Tall == 3) {
        _tile_loadd(7, low, UNIT);
        _tile_loadd(6, rows, chunk);
        _tile_dpbssd(0, 6, 7);
        _tile_loadd(6, rows + down, chunk);
        _tile_dpbssd(2, 6, 7);
        _tile_loadd(6, rows + 2 * down, chunk);
        _tile_dpbssd(4, 6, 7);
        _tile_loadd(7, high, UNIT);
        _tile_dpbssd(5, 6, 7);
        _tile_loadd(6, rows + down, chunk);
        _tile_dpbssd(3, 6, 7);
        _tile_loadd(6, rows, chunk);
        _tile_dpbssd(1, 6, 7);
    } else {
        _tile_loadd(6, low, UNIT);
        _tile_loadd(4, rows, chunk);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, high, UNIT);
        _tile_dpbssd(1, 4, 7);
        if constexpr (Tall == 2) {
            _tile_loadd(5, rows + down, chunk);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
}

template <int Tall>
inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Tall > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    if constexpr (Tall > 2) {
        _tile_zero(4);
        _tile_zero(5);
    }
}

template <int Tall>
inline void leave(int32_t* to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    if constexpr (Tall > 1) {
        _tile_stored(2, to + 512, 64);
        _tile_stored(3, to + 768, 64);
    }
    if constexpr (Tall > 2) {
        _tile_stored(4, to + 1024, 64);
        _tile_stored(5, to + 1280, 64);
    }
}

// Where a block finds its panel's weights.
enum Weights {
    HALVES,   // in memory, two to a byte: unpacked a group at a time
    BYTES,    // in memory: fetched ahead
    NEAR_BY,  // in the cache, as bytes
};

// The two tiles of a panel, and those that are read after them.
struct Source {
    const uint8_t *low, *high, *next_low, *next_high;
    int64_t size;  // bytes of a tile

    Source(const Panels& panels, int64_t panel, int64_t end) : size(panels.bytes()) {
        const int64_t next = std::min(panel + 1, end - 1);
        low = panels.values(panels.low(panel));
        high = panels.values(panels.low(panel) + panels.second);
        next_low = panels.values(panels.low(next));
        next_high = panels.values(panels.low(next) + panels.second);
    }
    const uint8_t* ahead_low(int64_t at) const {
        return at + AHEAD < size ? low + at + AHEAD : next_low + std::max<int64_t>(0, at + AHEAD - size);
    }
    const uint8_t* ahead_high(int64_t at) const {
        return at + AHEAD < size ? high + at + AHEAD : next_high + std::max<int64_t>(0, at + AHEAD - size);
    }
};

// Up to 16 * Tall rows from `row` on times a panel.
template <int Tall, Weights From>
void block(const Rows& a, int64_t row, int64_t rows, const Panels& panels, int64_t panel, const Source& source,
           uint8_t* scratch, float* sums) {
    const Weight& w = panels.w;
    const Scaling scaled{a, panels, row, rows, {panels.low(panel), panels.low(panel) + panels.second}};
    const __m512i table = spread_table(w, 0);
    const int64_t chunk = a.chunk, size = w.group * TILE, down = a.deep * TILE;
    const int8_t* from = a.at(row, 0);
    alignas(64) int32_t dots[2][Tall * 512];
    std::memset(sums, 0, Tall * 512 * sizeof(float));
    if constexpr (From == HALVES) {
        unpack(source.low, w.group, table, scratch, source.ahead_low(0));
        unpack(source.high, w.group, table, scratch + size, source.ahead_high(0));
    }
    for (int64_t g = 0; g < w.groups; g++) {
        const uint8_t *left = source.low + g * size, *right = source.high + g * size;
        if constexpr (From == HALVES) {
            left = scratch + g % 2 * 2 * size;
            right = left + size;
        }
        clear<Tall>();
        for (int64_t k = 0; k < w.group; k += chunk) {
            multiply<Tall>(from + (g * w.group + k) * TILE, down, left + k * TILE, right + k * TILE, chunk);
            if constexpr (From == BYTES)
                for (int64_t i = 0; i < chunk * TILE; i += UNIT) {
                    _mm_prefetch((const char*)source.ahead_low(g * size + k * TILE) + i, _MM_HINT_T0);
                    _mm_prefetch((const char*)source.ahead_high(g * size + k * TILE) + i, _MM_HINT_T0);
                }
        }
        if constexpr (From == HALVES)
            if (g + 1 < w.groups) {
                uint8_t* next = scratch + (g + 1) % 2 * 2 * size;
                const int64_t at = (g + 1) * size / 2;
                unpack(source.low + at, w.group, table, next, source.ahead_low(at));
                unpack(source.high + at, w.group, table, next + size, source.ahead_high(at));
            }
        if (g > 0) scaled(g - 1, dots[(g - 1) % 2], sums);
        leave<Tall>(dots[g % 2]);
    }
    scaled(w.groups - 1, dots[(w.groups - 1) % 2], sums);
}

template <int Tall, class Write>
void stream(const Rows& a, int64_t rows, const Panels& panels, int64_t begin, int64_t end, const Write& write) {
    const Scope scope(Tall, a.chunk);
    const int64_t size = panels.w.group * TILE;
    uint8_t* scratch = panels.w.bits == 4 ? room.unpacked.fit<uint8_t>(4 * size) : nullptr;
    alignas(64) float sums[Tall * 512];
    for (int64_t panel = begin; panel < end; panel++) {
        const Source source(panels, panel, end);
        if (scratch) block<Tall, HALVES>(a, 0, rows, panels, panel, source, scratch, sums);
        else block<Tall, BYTES>(a, 0, rows, panels, panel, source, nullptr, sums);
        for (int64_t r = 0; r < rows; r++) write(place(sums, r), place(sums, r) + 256, r, panel);
    }
}

template <class Write>
void product(const Rows& a, int64_t rows, const Panels& panels, int64_t begin, int64_t end, const Write& write) {
    if (rows <= TILE) return stream<1>(a, rows, panels, begin, end, write);
    if (rows <= 2 * TILE) return stream<2>(a, rows, panels, begin, end, write);
    if (rows <= MOST_STREAMED) return stream<3>(a, rows, panels, begin, end, write);
    const Scope scope(2, a.chunk);
    const Weight& w = panels.w;
    const int64_t size = a.deep * TILE;
    uint8_t* whole = w.bits == 4 ? room.unpacked.fit<uint8_t>(2 * size) : nullptr;
    const __m512i table = spread_table(w, 0);
    alignas(64) float sums[1024];
    for (int64_t panel = begin; panel < end; panel++) {
        Source source(panels, panel, end);
        if (whole) {
            unpack(source.low, a.deep, table, whole, source.next_low);
            unpack(source.high, a.deep, table, whole + size, source.next_high);
            source.low = whole;
            source.high = whole + size;
        }
        for (int64_t row = 0; row < rows; row += 2 * TILE) {
            const int64_t left = std::min<int64_t>(rows - row, 2 * TILE);
            if (left <= TILE) block<1, NEAR_BY>(a, row, left, panels, panel, source, nullptr, sums);
            else if (row > 0 || whole) block<2, NEAR_BY>(a, row, left, panels, panel, source, nullptr, sums);
            else block<2, BYTES>(a, row, left, panels, panel, source, nullptr, sums);
            for (int64_t r = 0; r < left; r++) write(place(sums, r), place(sums, r) + 256, row + r, panel);
        }
    }
}

}  // namespace tiles
