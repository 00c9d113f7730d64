// Integer products on AVX-512 VNNI and AMX: part of cpu.cpp. Both units give the same bits. Few rows use vectors,
// which read each weight once; more rows use AMX where there is one, and blocks of vectors elsewhere. AMX reads
// tiles from memory, so there they are first unpacked into the L1 cache (for many rows: into L2).

constexpr int TILE = 16;                     // rows and columns of a tile
constexpr int UNIT = 64;                     // bytes of four inputs x 16 columns
constexpr int64_t MOST_FEW = 4;              // rows that are multiplied one weight at a time
constexpr int64_t MOST_STREAMED = 48;        // rows for which tiles are unpacked into L1, used once
constexpr int64_t MOST_ROWS = 512;           // at once
constexpr int64_t NEAR = 5 << 18;            // bytes of rows that still leave room in L2
constexpr int64_t AHEAD = 2048;              // bytes of weights fetched in advance

inline bool has_tiles() {
#if LABKIT_INTEGER_TILES
    static const bool there = __builtin_cpu_supports("amx-int8") && amx::available();
    return there;
#else
    return false;
#endif
}

// Inputs of a row that lie together in a tile of rows: as many as an instruction takes.
inline int64_t chunk_of(int64_t group) { return !has_tiles() ? 16 : group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 16; }

#include "rows_int8.h"

// -- weights ---------------------------------------------------------------------------------------------------------

// The two tiles of columns that make up a panel.
struct Panels {
    const Weight& w;
    int64_t step, second;  // panel p has tiles p * step and p * step + second

    int64_t low(int64_t panel) const { return panel * step; }
    int64_t bytes() const { return w.groups * w.group * TILE * w.bits / 8; }  // of a tile
    const uint8_t* values(int64_t tile) const { return w.values + tile * bytes(); }
    void fetch_scales(int64_t tile, int64_t g) const {
        const int64_t at = (tile * w.groups + g) * TILE;
        _mm_prefetch((const char*)w.scales + at * (w.half ? 2 : 4), _MM_HINT_T0);
        if (w.offsets) _mm_prefetch((const char*)w.offsets + at * (w.half ? 2 : 4), _MM_HINT_T0);
    }
    vf scale(const void* from, int64_t tile, int64_t g) const {
        const int64_t at = (tile * w.groups + g) * TILE;
        if (w.half) return (vf)_mm512_cvtph_ps(_mm256_load_si256((const __m256i*)((const uint16_t*)from + at)));
        return load((const float*)from + at);
    }
};

inline void add(float* sums, __m512i dots, vf scales, float scale) {
    store(sums, (vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), (__m512)(scales * scale), (__m512)load(sums)));
}
inline void add_offset(float* sums, vf offsets, float sum) {
    store(sums, (vf)_mm512_fmadd_ps((__m512)offsets, _mm512_set1_ps(sum), (__m512)load(sums)));
}

inline float* place(float* sums, int64_t row) { return sums + row / TILE * 512 + row % TILE * TILE; }

inline __m512i spread_table(const Weight& w, int add) {
    __m128i table = _mm_loadu_si128((const __m128i*)w.table);
    return _mm512_broadcast_i32x4(_mm_add_epi8(table, _mm_set1_epi8(add)));
}

#include "vectors_int8.h"
#if LABKIT_INTEGER_TILES
#include "tiles_int8.h"
#endif

// f(row, rows of it, sums) for panels of this thread.
template <class Write>
void product(const Rows& a, int64_t rows, const Panels& panels, int64_t count, const Write& write) {
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = count * id / team, end = count * (id + 1) / team;
#if LABKIT_INTEGER_TILES
    if (a.tiled && has_tiles()) return tiles::product(a, rows, panels, begin, end, write);
#endif
    float* sums = room.products.fit<float>(parts(rows, TILE) * 512);
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t next = std::min(panel + 1, end - 1);
        if (panels.w.bits == 4) vectors::all<4>(a, rows, panels, panel, next, sums);
        else vectors::all<8>(a, rows, panels, panel, next, sums);
        for (int64_t r = 0; r < rows; r++) write(place(sums, r), place(sums, r) + 256, r, panel);
    }
}

// f(first row, rows) for as many rows at a time as leave room in the caches, split evenly.
template <class F>
void in_parts(int64_t rows, int64_t deep, const F& f) {
    const int64_t most = std::max<int64_t>(64, std::min(MOST_ROWS, NEAR / deep));
    const int64_t count = parts(rows, most), each = parts(parts(rows, count), 32) * 32;
    for (int64_t row = 0; row < rows; row += each) f(row, std::min(each, rows - row));
}

bool in_tiles(int64_t rows) { return rows > MOST_FEW; }

// The largest of each row's sums and its column, the first of equals.
void argmax(const Linear& call, int64_t* columns_out, float* sums_out) {
    const Weight& w = *call.weight;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const Panels panels{w, 2, 1};
    in_parts(call.rows, w.groups * w.group, [&](int64_t row, int64_t rows) {
        const int64_t lines = call.num_threads * rows;
        const Rows a = rows_for(w, rows, in_tiles(call.rows));
        vf* most = room.most.fit<vf>(2 * lines);
        vi* where = reinterpret_cast<vi*>(most + lines);
        for (int64_t i = 0; i < lines; i++) {
            most[i] = splat(-INFINITY);
            where[i] = vi{} + static_cast<int>(w.columns);
        }
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, w, a);
            const int64_t own = omp_get_thread_num() * rows;
            product(a, rows, panels, parts(w.columns, PANEL),
                    Best{most + own, where + own, static_cast<const bf16*>(call.bias), w.columns});
        }
        for (int64_t r = 0; r < rows; r++) {
            const Largest found = largest_of(most + r, where + r, call.num_threads, rows, w.columns);
            columns_out[row + r] = found.column;
            sums_out[row + r] = found.sum;
        }
    });
}

// 16 columns of the gate and the 16 that they multiply, to rows of bfloat16.
template <class Act>
struct GatedRows {
    bf16* to;
    int64_t columns;

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        const vf x = Act::of(load(a)) * load(b);
        _mm256_storeu_si256((__m256i*)(to + row * columns + panel * TILE), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
};
