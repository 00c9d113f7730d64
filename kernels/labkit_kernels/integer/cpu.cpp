// Linear layers whose weights are integers of 4 or 8 bits, for AVX-512 VNNI and AMX. Rows of x are quantized to int8 with
// a scale for each group of inputs, the same groups that the weights have scales for; products within a group are
// integer sums, and each group adds scale * scale * sum to a float32 sum.
//
// Integer sums are exact, and the float32 additions happen in the order of the groups. So both units give the same
// bits, and a row's result does not depend on how many other rows there are. Few rows use vectors, which read each
// weight once; more rows use AMX where there is one, and blocks of vectors elsewhere.
//
// Weights lie in tiles of 16 columns, four inputs of a column in 32 bits (a unit: 64 bytes), as both units read them.
// Weights of 4 bits are numbers of a table with 16 values: the low halves of 64 bytes are a unit, the high halves the
// next. AMX reads tiles from memory, so there they are first unpacked into the L1 cache (for many rows: into L2).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LABKIT_INTEGERS 1
#include "../endings.h"
#include "../repeat.h"
#include "../tiles.h"
#if defined(__AMX_INT8__) && LABKIT_TILES
#define LABKIT_INTEGER_TILES 1
#else
#define LABKIT_INTEGER_TILES 0
#endif
#else
#define LABKIT_INTEGERS 0
#endif

struct Weight {
    const uint8_t* values;       // [tiles][units][16 columns][4], half as long for 4 bits
    const void *scales, *offsets;  // [tiles][groups][16]; offsets may be null
    const int32_t* order;        // [depth]: which input is multiplied at each place; null: in order
    int64_t columns, depth, groups, group;  // a group's size: a multiple of 16
    int32_t bits, half;          // half: scales and offsets are float16, else float32
    int8_t table[16];            // what 4 bits stand for
};

struct Linear {
    const void *x, *norm, *bias, *residual;
    void* out;
    const Weight* weight;
    int64_t rows, x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, out_dtype;  // 0 float32, 1 bfloat16
    int64_t num_threads;
};

struct Mlp {
    const void *x, *norm, *residual;
    void* out;
    const Weight *up, *down;  // `up` holds the gate's columns, then those it multiplies
    int64_t rows, x_row, residual_row, out_row;
    double eps;
    int32_t norm_dtype, gate;  // 0 silu, 1 gelu by tanh, 2 gelu by erf
    int64_t num_threads;
};

namespace {

inline float half_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half >> 15 ? -size : size;
}

// To the nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

#if LABKIT_INTEGERS
namespace {

using namespace labkit;

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

const bf16* row_of(const void* from, int64_t row, int64_t stride) {
    return from ? static_cast<const bf16*>(from) + row * stride : nullptr;
}

void linear(const Linear& call) {
    const Weight& w = *call.weight;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const Panels panels{w, 2, 1};
    in_parts(call.rows, w.groups * w.group, [&](int64_t row, int64_t rows) {
        const Rows a = rows_for(w, rows, in_tiles(call.rows));
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, w, a);
            auto run = [&](auto* out) {
                product(a, rows, panels, parts(w.columns, PANEL),
                        Plain<std::remove_pointer_t<decltype(out)>>{
                            static_cast<const bf16*>(call.bias), row_of(call.residual, row, call.residual_row),
                            out + row * call.out_row, w.columns, call.residual_row, call.out_row});
            };
            call.out_dtype == 0 ? run(static_cast<float*>(call.out)) : run(static_cast<bf16*>(call.out));
        }
    });
}

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

template <class Act>
void mlp(const Mlp& call) {
    const Weight &up = *call.up, &down = *call.down;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t inner = down.depth, gates = inner / TILE;
    in_parts(call.rows, down.groups * down.group, [&](int64_t row, int64_t rows) {
        const bool tiled = in_tiles(call.rows);
        // Both products use one working memory, the larger of the two: the first is through when the second begins.
        rows_for(down, rows, tiled);
        const Rows a = rows_for(up, rows, tiled), b = rows_for(down, rows, tiled);
        bf16* between = room.inner.fit<bf16>(rows * inner);
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, up, a);
            product(a, rows, Panels{up, 1, gates}, gates, GatedRows<Act>{between, inner});
#pragma omp barrier
            quantize_all(between, inner, rows, Norm{}, down, b);
            product(b, rows, Panels{down, 2, 1}, parts(down.columns, PANEL),
                    Plain<bf16>{nullptr, row_of(call.residual, row, call.residual_row),
                                static_cast<bf16*>(call.out) + row * call.out_row, down.columns, call.residual_row,
                                call.out_row});
        }
    });
}

}  // namespace
#endif

extern "C" void integers_available(int32_t* answer) { *answer = LABKIT_INTEGERS; }

extern "C" void linear_integers(const Linear* call) {
#if LABKIT_INTEGERS
    linear(*call);
#endif
}

extern "C" void argmax_integers(const Linear* call, int64_t* columns, float* sums) {
#if LABKIT_INTEGERS
    argmax(*call, columns, sums);
#endif
}

extern "C" void mlp_integers(const Mlp* call) {
#if LABKIT_INTEGERS
    if (call->gate == 0) mlp<gates::Silu>(*call);
    else if (call->gate == 1) mlp<gates::GeluTanh>(*call);
    else mlp<gates::Gelu>(*call);
#endif
}

// Bytes [columns, depth] as tiles [tiles][units][16 columns][4]. For 4 bits, whose bytes are 0 to 15, two units to one.
// Columns and inputs beyond the weight are `rest`.
extern "C" void pack_integers(const uint8_t* values, int64_t stride, int64_t columns, int64_t depth, int64_t tiles,
                              int64_t deep, int32_t bits, uint8_t rest, uint8_t* to, int64_t num_threads) {
    const int64_t bytes = deep * 16 * bits / 8;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t unit = 0; unit < deep / 4; unit++) {
            uint8_t one[64];
            std::memset(one, rest, 64);
            const int64_t count = std::min<int64_t>(4, depth - unit * 4);
            for (int64_t n = 0; n < std::min<int64_t>(16, columns - tile * 16) && count > 0; n++)
                std::memcpy(one + n * 4, values + (tile * 16 + n) * stride + unit * 4, count);
            uint8_t* at = to + tile * bytes + unit * 64;
            if (bits == 8) {
                std::memcpy(at, one, 64);
            } else {
                at = to + tile * bytes + unit / 2 * 64;
                for (int i = 0; i < 64; i++) at[i] = unit % 2 ? at[i] | one[i] << 4 : one[i];
            }
        }
}

// Rows `ids` of a weight whose inputs are in order, as bfloat16 [n, depth].
extern "C" void gather_integers(const Weight* weight, const int64_t* ids, int64_t n, uint16_t* out) {
    const Weight& w = *weight;
    const int64_t deep = w.groups * w.group;
    for (int64_t i = 0; i < n; i++) {
        const int64_t tile = ids[i] / 16, lane = ids[i] % 16;
        const uint8_t* from = w.values + tile * deep * 2 * w.bits + lane * 4;
        auto number = [&](const void* of, int64_t g) {
            const int64_t at = (tile * w.groups + g) * 16 + lane;
            return w.half ? half_to_float(static_cast<const uint16_t*>(of)[at]) : static_cast<const float*>(of)[at];
        };
        auto integer = [&](int64_t d) -> int {
            if (w.bits == 8) return static_cast<int8_t>(from[d / 4 * 64 + d % 4]);
            const uint8_t both = from[d / 8 * 64 + d % 4];
            return w.table[d / 4 % 2 ? both >> 4 : both & 15];
        };
        for (int64_t g = 0; g * w.group < w.depth; g++) {
            const float scale = number(w.scales, g), offset = w.offsets ? number(w.offsets, g) : 0.f;
            const int64_t end = std::min(w.depth, (g + 1) * w.group);
            for (int64_t d = g * w.group; d < end; d++) out[i * w.depth + d] = to_bfloat16(integer(d) * scale + offset);
        }
    }
}

LABKIT_REPEATABLE(linear_integers)
LABKIT_REPEATABLE(mlp_integers)
