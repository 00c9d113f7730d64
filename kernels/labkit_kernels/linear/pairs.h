// The products of bfloat16 pairs, on AMX tiles or vectors (AVX-512 BF16): part of cpu.cpp. The multiplying code is
// in units.h.
//
// A thread owns a range of columns and streams through its weights once. All threads together convert the rows of x
// into tiles, and apply the norm, if there is one. The rest is one loop over a register block of 32 rows x 32
// columns (2 x 2 tiles of sums, two tiles of each operand).
//
// With few rows the loop is bound by memory, so the next columns' weights are prefetched during the multiplication.
// With many rows it is bound by arithmetic. On the tile unit, finished sums (bias, activation, residual, rounding)
// are then processed row by row between the products of the next block, as the vector units are idle. At most 512
// rows are taken at a time, and deep sums in parts, so that a thread's left operand stays in L2.

using amx::DEPTH;
using amx::TILE;

constexpr int BLOCK = PANEL;               // rows and columns of a register block
constexpr int64_t SIZE = TILE * DEPTH;     // elements of a tile
constexpr int64_t MOST_ROWS = 512;         // at once
constexpr int64_t NEAR = 3 << 19;          // bytes of left operand that still leave room in L2

// -- the left operand ------------------------------------------------------------------------------------------------

// Sixteen rows as tiles [depth / 32][16 rows][32]; rows beyond `count` are zero.
void pack(const bf16* x, int64_t stride, int64_t count, int64_t depth, const Norm& norm, bf16* to) {
    for (int64_t r = 0; r < TILE; r++) {
        bf16* at = to + r * DEPTH;
        const bf16* row = x + r * stride;
        if (r >= count) {
            for (int64_t d = 0; d < depth; d += DEPTH) _mm512_store_si512(at + d * TILE, _mm512_setzero_si512());
        } else if (norm.weight == nullptr) {
            for (int64_t d = 0; d < depth; d += DEPTH)
                _mm512_store_si512(at + d * TILE, amx::load_row(row + d, depth - d));
        } else {
            const float scale = inverse_root(row, depth, norm.eps);
            for (int64_t d = 0; d < depth; d += DEPTH) {
                const __mmask16 low = first(depth - d), high = first(depth - d - TILE);
                vf a = load_first(row + d, low) * scale * norm.scales(d, low);
                vf b = load_first(row + d + TILE, high) * scale * norm.scales(d + TILE, high);
                _mm512_store_si512(at + d * TILE, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
            }
        }
    }
}

// 16 columns of the gate and the 16 of `up` that they multiply, into tiles for the next product.
template <class Act>
struct Gated {
    bf16* tiles;
    int64_t deep;  // tiles in a row of tiles

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        bf16* to = tiles + (row / TILE * deep + panel / 2) * SIZE + row % TILE * DEPTH + panel % 2 * TILE;
        _mm256_store_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)(Act::of(load(a)) * load(b))));
    }
};

// -- the product -----------------------------------------------------------------------------------------------------

#include "panels.h"
#include "units.h"

// Panels [begin, end) of at most 48 rows, `Tall` tiles of them: each weight is read once, from memory.
template <class Unit, int Tall, class Write>
void stream(const bf16* a, int64_t rows, const Columns& columns, int64_t begin, int64_t end, const Write& write) {
    const int64_t deep = columns.deep;
    alignas(64) float sums[2][Tall * 512];
    int turn = 0;
    Waiting<Write> waiting{write};
    for (int64_t panel = begin; panel < end; panel++, turn = 1 - turn) {
        const bf16 *low = columns.low(panel), *high = columns.high(panel);
        if constexpr (Unit::CHUNK > 0) {
            for (int64_t from = 0; from < deep; from += Unit::CHUNK) {
                const int64_t to = std::min<int64_t>(from + Unit::CHUNK, deep);
                const bool more = to < deep;
                const int64_t next = more ? panel : std::min(panel + 1, end - 1), at = (more ? to : 0) * SIZE;
                NextLines fetch{reinterpret_cast<const char*>(columns.low(next) + at),
                                reinterpret_cast<const char*>(columns.high(next) + at)};
                Unit::template product<Tall>(a, deep, low, high, from, to, rows, from ? sums[turn] : nullptr,
                                             sums[turn], fetch, waiting);
            }
        } else {
            Ahead ahead;
            Unit::template product<Tall>(a, deep, low, high, 0, deep, rows, nullptr, sums[turn], ahead, waiting);
        }
        waiting.take(sums[turn], 0, rows, panel, deep);
    }
    waiting.rest();
}

// Panels [begin, end) of many rows: `a` are tiles [rows / 16][deep]. Deep sums are split, so that the left operand of
// one part stays in L2: it is read for every panel.
template <class Unit, class Write>
void multiply(const bf16* a, int64_t rows, const Columns& columns, int64_t begin, int64_t end, const Write& write,
              Buffer& buffer) {
    const int64_t deep = columns.deep, blocks = parts(rows, BLOCK);
    const int64_t cuts = parts(deep, std::max<int64_t>(8, NEAR / (rows * DEPTH * 2)));
    float* partial = cuts > 1 ? buffer.fit<float>((end - begin) * blocks * 1024) : nullptr;
    alignas(64) float sums[2][1024];
    int turn = 0;
    Waiting<Write> waiting{write};

    for (int64_t cut = 0; cut < cuts; cut++) {
        const int64_t from = deep * cut / cuts, to = deep * (cut + 1) / cuts;
        const bool last = cut + 1 == cuts;
        for (int64_t panel = begin; panel < end; panel++) {
            const bf16 *low = columns.low(panel), *high = columns.high(panel);
            NextPanel fetch{};
            if (panel + 1 < end || !last) {
                const int64_t next = panel + 1 < end ? panel + 1 : begin, at = (next > begin ? from : to) * SIZE;
                fetch = {reinterpret_cast<const char*>(columns.low(next) + at),
                         reinterpret_cast<const char*>(columns.high(next) + at), (to - from) * SIZE * 2,
                         static_cast<int>(parts(TILE, blocks))};
            }
            for (int64_t block = 0; block < blocks; block++) {
                const bf16* at = a + block * 2 * deep * SIZE;
                const int64_t left = std::min<int64_t>(rows - block * BLOCK, BLOCK);
                float* kept = partial ? partial + ((panel - begin) * blocks + block) * 1024 : nullptr;
                float* put = last ? sums[turn] : kept;
                const float* sum = cut ? kept : nullptr;
                if (left > TILE)
                    Unit::template product<2>(at, deep, low, high, from, to, left, sum, put, fetch, waiting);
                else
                    Unit::template product<1>(at, deep, low, high, from, to, left, sum, put, fetch, waiting);
                if (last) {
                    waiting.take(put, block * BLOCK, left, panel, to - from);
                    turn = 1 - turn;
                }
            }
        }
    }
    waiting.rest();
}

template <class Unit, class Write>
void product(const bf16* a, int64_t rows, const Columns& columns, int64_t panels, const Write& write, Buffer& buffer) {
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = panels * id / team, end = panels * (id + 1) / team;
    switch (parts(rows, TILE)) {
        case 1: return stream<Unit, 1>(a, rows, columns, begin, end, write);
        case 2: return stream<Unit, 2>(a, rows, columns, begin, end, write);
        case 3: return stream<Unit, 3>(a, rows, columns, begin, end, write);
        default: return multiply<Unit>(a, rows, columns, begin, end, write, buffer);
    }
}

// Prefetches a thread's first panel while rows are packed.
void begin_fetch(const Columns& columns, int64_t panels) {
    const int64_t begin = panels * omp_get_thread_num() / omp_get_num_threads();
    if (begin >= panels) return;
    const int64_t bytes = std::min<int64_t>(columns.deep * SIZE * 2, 1 << 14);
    for (int64_t i = 0; i < bytes; i += LINE) {
        _mm_prefetch(reinterpret_cast<const char*>(columns.low(begin)) + i, _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(columns.high(begin)) + i, _MM_HINT_T1);
    }
}

int64_t whole_rows(int64_t rows) { return parts(rows, TILE) * TILE; }

void pack_all(const bf16* x, int64_t stride, int64_t rows, int64_t depth, const Norm& norm, bf16* to) {
    const int64_t deep = parts(depth, DEPTH);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < whole_rows(rows); r += TILE)
        pack(x + r * stride, stride, rows - r, depth, norm, to + r * deep * DEPTH);
}

// f(first row, rows) for at most MOST_ROWS rows at a time, split evenly.
template <class F>
void in_parts(int64_t rows, const F& f) {
    const int64_t count = parts(rows, MOST_ROWS), each = parts(parts(rows, count), BLOCK) * BLOCK;
    for (int64_t row = 0; row < rows; row += each) f(row, std::min(each, rows - row));
}

thread_local Buffer packed, between, partial_sums;

template <class Unit>
void linear(const Linear& call) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.depth, DEPTH), panels = parts(call.columns, BLOCK);
    const Columns columns{static_cast<const bf16*>(call.weight), deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        bf16* tiles = packed.fit<bf16>(whole_rows(rows) * deep * DEPTH);
        const bf16 *x = row_of(call.x, row, call.x_row), *residual = row_of(call.residual, row, call.residual_row);
#pragma omp parallel num_threads(call.num_threads)
        {
            [[maybe_unused]] typename Unit::Scope scope;
            begin_fetch(columns, panels);
            pack_all(x, call.x_row, rows, call.depth, norm, tiles);
            auto run = [&](auto* out) {
                product<Unit>(tiles, rows, columns, panels,
                        Plain<std::remove_pointer_t<decltype(out)>>{static_cast<const bf16*>(call.bias), residual,
                                                                    out + row * call.out_row, call.columns,
                                                                    call.residual_row, call.out_row},
                        partial_sums);
            };
            call.out_dtype == 0 ? run(static_cast<float*>(call.out)) : run(static_cast<bf16*>(call.out));
        }
    });
}

// The largest of each row's sums and its column, the first of equals.
template <class Unit>
void argmax(const Linear& call, int64_t* columns_out, float* sums_out) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.depth, DEPTH), panels = parts(call.columns, BLOCK);
    const Columns columns{static_cast<const bf16*>(call.weight), deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        const int64_t lines = call.num_threads * rows;
        bf16* tiles = packed.fit<bf16>(whole_rows(rows) * deep * DEPTH);
        vf* most = between.fit<vf>(2 * lines);
        vi* where = reinterpret_cast<vi*>(most + lines);
        for (int64_t i = 0; i < lines; i++) {
            most[i] = splat(-INFINITY);
            where[i] = vi{} + static_cast<int>(call.columns);
        }
        const bf16* x = static_cast<const bf16*>(call.x) + row * call.x_row;
#pragma omp parallel num_threads(call.num_threads)
        {
            [[maybe_unused]] typename Unit::Scope scope;
            begin_fetch(columns, panels);
            pack_all(x, call.x_row, rows, call.depth, norm, tiles);
            const int64_t own = omp_get_thread_num() * rows;
            product<Unit>(tiles, rows, columns, panels,
                    Best{most + own, where + own, static_cast<const bf16*>(call.bias), call.columns}, partial_sums);
        }
        for (int64_t r = 0; r < rows; r++) {
            const Largest found = largest_of(most + r, where + r, call.num_threads, rows, call.columns);
            columns_out[row + r] = found.column;
            sums_out[row + r] = found.sum;
        }
    });
}

template <class Unit, class Act>
void mlp(const Mlp& call) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.size, DEPTH), inner_deep = parts(call.inner, DEPTH);
    const int64_t gates = call.inner / TILE, panels = parts(call.size, BLOCK);
    const Columns up{static_cast<const bf16*>(call.up), deep, 1, gates};
    const Columns down{static_cast<const bf16*>(call.down), inner_deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        const int64_t all = whole_rows(rows);
        bf16* tiles = packed.fit<bf16>(all * deep * DEPTH);
        bf16* inner = between.fit<bf16>(all * inner_deep * DEPTH);
        const bf16 *x = row_of(call.x, row, call.x_row), *residual = row_of(call.residual, row, call.residual_row);
        if (gates % 2)  // half of the last tile is never written
            for (int64_t r = 0; r < all; r += TILE)
                std::memset(inner + (r / TILE * inner_deep + inner_deep - 1) * SIZE, 0, SIZE * sizeof(bf16));
#pragma omp parallel num_threads(call.num_threads)
        {
            [[maybe_unused]] typename Unit::Scope scope;
            begin_fetch(up, gates);
            pack_all(x, call.x_row, rows, call.size, norm, tiles);
            product<Unit>(tiles, rows, up, gates, Gated<Act>{inner, inner_deep}, partial_sums);
            begin_fetch(down, panels);
#pragma omp barrier
            product<Unit>(inner, rows, down, panels,
                    Plain<bf16>{nullptr, residual, static_cast<bf16*>(call.out) + row * call.out_row, call.size,
                                call.residual_row, call.out_row},
                    partial_sums);
        }
    });
}

// f(the best unit of this machine).
template <class F>
void on_best_unit(const F& f) {
#if LABKIT_TILES
    if (amx::available()) return f(TileUnit{});
#endif
    f(VectorUnit{});
}
