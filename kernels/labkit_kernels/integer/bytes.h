// The same layers on processors that multiply bytes in shorter vectors: AVX2, and ARM with dot products. Part of cpu.cpp;
// lanes.h has the instructions. Sums of integers are exact and floats are added in the order of the groups, so no row
// depends on others.
//
// A tile of 16 columns is multiplied with up to four rows at once. Many rows read a tile again and again: it lies in L1
// or L2.

constexpr int TILE = 16;             // columns of a tile
constexpr int UNIT = 64;             // bytes of four inputs x 16 columns
constexpr int MOST_AT_ONCE = 4;      // rows
constexpr int64_t MOST_ROWS = 192;   // at once
constexpr int64_t AHEAD = 2048;      // bytes of weights fetched in advance

// Rows of int8, with a scale for each group of inputs, the sum of the group's values, and scale times sum.
struct Rows {
    int64_t deep, groups;
    int8_t* values;        // [rows][deep]
    float *scales, *sums;  // [rows][groups]
    int32_t* counts;
};

struct Room {
    Buffer values, scales, sums, counts, floats, inner, found, products;
};
thread_local Room room;

Rows rows_for(const Weight& w, int64_t rows, bool) {
    const int64_t deep = w.groups * w.group;
    return {deep, w.groups, room.values.fit<int8_t>(rows * deep), room.scales.fit<float>(rows * w.groups),
            room.sums.fit<float>(rows * w.groups), room.counts.fit<int32_t>(rows * w.groups)};
}

typedef int8_t vb __attribute__((vector_size(W)));

#include "lanes.h"

// One row: norm, order, scales, rounding to nearest even.
void quantize(const bf16* x, const Norm& norm, const Weight& w, const Rows& to, int64_t row) {
    float* floats = room.floats.fit<float>(2 * to.deep);
    if (w.order == nullptr) {
        widen(x, w.depth, to.deep, norm, false, floats);
    } else {
        float* plain = floats + to.deep;
        widen(x, w.depth, to.deep, norm, false, plain);
        for (int64_t d = 0; d < w.depth; d++) floats[d] = plain[w.order[d]];
        for (int64_t d = w.depth; d < to.deep; d++) floats[d] = 0.f;
    }
    for (int64_t g = 0; g < to.groups; g++) {
        const float* from = floats + g * w.group;
        vi most{};
        for (int64_t d = 0; d < w.group; d += W) {
            const vi size = (vi)labkit::abs(load(from + d));  // as integers a NaN is larger than any number
            most = size > most ? size : most;
        }
        int32_t bits = 0;
        for (int i = 0; i < W; i++) bits = std::max(bits, most[i]);
        float largest;
        std::memcpy(&largest, &bits, 4);
        const float inverse = largest > 0 ? 127.f / largest : 0.f;
        vi total{};
        for (int64_t d = 0; d < w.group; d += W) {
            const vi q = nearest(load(from + d) * inverse);
            total += q;
            const vb bytes = __builtin_convertvector(q, vb);
            std::memcpy(to.values + row * to.deep + g * w.group + d, &bytes, sizeof bytes);
        }
        int32_t sum = 0;
        for (int i = 0; i < W; i++) sum += total[i];
        const int64_t place = row * to.groups + g;
        to.scales[place] = largest * (1.f / 127.f);
        to.sums[place] = to.scales[place] * sum;
        to.counts[place] = sum;
    }
}

void quantize_all(const bf16* x, int64_t stride, int64_t rows, const Norm& norm, const Weight& w, const Rows& to) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) quantize(x + r * stride, norm, w, to, r);
}

// One group's sums of products with a tile of columns, rows' values from `from`; moves `at` behind the weights.
template <int Count, int Bits>
inline void signed_dots(const int8_t* const (&from)[Count], int64_t begin, int64_t end, Bytes table, const uint8_t*& at,
                        Ints (&dots)[Count][PARTS]) {
    for (int64_t k = begin; k < end; k += 32 / Bits, at += UNIT) {
        __builtin_prefetch(at + AHEAD);
#pragma GCC unroll 4
        for (int h = 0; h < PARTS; h++) {
            const Bytes bytes = load_bytes(at + h * 4 * LANES);
            if constexpr (Bits == 8) {
                const Weights all = weights_of(bytes);
#pragma GCC unroll 4
                for (int r = 0; r < Count; r++) dots[r][h] = add_dots(dots[r][h], all, from[r] + k);
            } else {
                const Weights first = weights_of(look_up(table, low_halves(bytes)));
                const Weights second = weights_of(look_up(table, high_halves(bytes)));
#pragma GCC unroll 4
                for (int r = 0; r < Count; r++) {
                    dots[r][h] = add_dots(dots[r][h], first, from[r] + k);
                    dots[r][h] = add_dots(dots[r][h], second, from[r] + k + 4);
                }
            }
        }
    }
}

#if LABKIT_SUMS_OF_PAIRS
// The same for 4 bits that stand for -8 to 7, taken as 0 to 15. Sums of 32 inputs fit into 16 bits.
template <int Count>
inline void half_byte_dots(const int8_t* const (&from)[Count], int64_t begin, int64_t end, const uint8_t*& at,
                           Ints (&dots)[Count][PARTS]) {
    for (int64_t k = begin; k < end;) {
        const int64_t stop = std::min(end, k + 32);
        Bytes pairs[Count][PARTS] = {};
        for (; k < stop; k += 8, at += UNIT) {
            __builtin_prefetch(at + AHEAD);
#pragma GCC unroll 2
            for (int h = 0; h < PARTS; h++) {
                const Bytes bytes = load_bytes(at + h * 4 * LANES);
                const Bytes first = low_halves(bytes), second = high_halves(bytes);
#pragma GCC unroll 4
                for (int r = 0; r < Count; r++) {
                    pairs[r][h] = add_pairs(pairs[r][h], first, from[r] + k);
                    pairs[r][h] = add_pairs(pairs[r][h], second, from[r] + k + 4);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Count; r++)
            for (int h = 0; h < PARTS; h++) dots[r][h] += sums_of_pairs(pairs[r][h]);
    }
}
#endif

inline bool from_minus_eight(const Weight& w) {
    static constexpr int8_t ALL[] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return std::memcmp(w.table, ALL, sizeof ALL) == 0;
}

// Rows [row, row + Count) times a tile of columns, to 16 of the PANEL sums that each row has.
template <int Count, int Bits>
void times_tile(const Rows& a, int64_t row, const Weight& w, int64_t tile, float* sums) {
    const uint8_t* at = w.values + tile * a.deep * TILE * Bits / 8;
    const Bytes table = load_table(w.table);
    const bool unsigned_too = LABKIT_SUMS_OF_PAIRS && Bits == 4 && from_minus_eight(w);
    const int8_t* from[Count];
    for (int r = 0; r < Count; r++) {
        from[r] = a.values + (row + r) * a.deep;
        std::memset(sums + r * PANEL, 0, TILE * sizeof(float));
    }
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t begin = g * w.group, end = begin + w.group;
        Ints dots[Count][PARTS] = {};
        if (unsigned_too) {
#if LABKIT_SUMS_OF_PAIRS
            for (int r = 0; r < Count; r++)
                for (int h = 0; h < PARTS; h++) dots[r][h] -= 8 * a.counts[(row + r) * w.groups + g];
            half_byte_dots<Count>(from, begin, end, at, dots);
#endif
        } else {
            signed_dots<Count, Bits>(from, begin, end, table, at, dots);
        }
        for (int h = 0; h < PARTS; h++) {
            const int64_t place = (tile * w.groups + g) * TILE + h * LANES;
            const Floats scales = numbers(w, w.scales, place);
            const Floats offsets = w.offsets ? numbers(w, w.offsets, place) : Floats{};
#pragma GCC unroll 4
            for (int r = 0; r < Count; r++) {
                float* to = sums + r * PANEL + h * LANES;
                const Floats by = scales * a.scales[(row + r) * w.groups + g];
                Floats sum = load_bits<Floats>(to);
                sum += __builtin_convertvector(dots[r][h], Floats) * by;
                if (w.offsets) sum += offsets * a.sums[(row + r) * w.groups + g];
                std::memcpy(to, &sum, sizeof sum);
            }
        }
    }
}

template <int Bits>
void some_rows(int64_t rows, const Rows& a, int64_t row, const Weight& w, int64_t tile, float* sums) {
    switch (rows) {
        case 1: return times_tile<1, Bits>(a, row, w, tile, sums);
        case 2: return times_tile<2, Bits>(a, row, w, tile, sums);
        case 3: return times_tile<3, Bits>(a, row, w, tile, sums);
        default: return times_tile<MOST_AT_ONCE, Bits>(a, row, w, tile, sums);
    }
}

// The two tiles of columns that make up a panel: p * step and p * step + second.
struct Panels {
    const Weight& w;
    int64_t step, second;
};

// write(sums of 32 columns, row, panel) for this thread's share of `count` panels.
template <class Write>
void product(const Rows& a, int64_t rows, const Panels& panels, int64_t count, const Write& write) {
    const Weight& w = panels.w;
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
    float* sums = room.products.fit<float>(rows * PANEL);
    for (int64_t panel = count * id / team; panel < count * (id + 1) / team; panel++) {
        for (int half = 0; half < 2; half++)
            for (int64_t r = 0; r < rows; r += MOST_AT_ONCE) {
                auto some = w.bits == 4 ? some_rows<4> : some_rows<8>;
                some(std::min<int64_t>(rows - r, MOST_AT_ONCE), a, r, w, panel * panels.step + half * panels.second,
                     sums + r * PANEL + half * TILE);
            }
        for (int64_t r = 0; r < rows; r++) write(sums + r * PANEL, r, panel);
    }
}

// Rows lie one after the other, however many there are.
bool in_tiles(int64_t) { return false; }

// f(first row, rows) for at most MOST_ROWS rows at a time, split evenly.
template <class F>
void in_parts(int64_t rows, int64_t, const F& f) {
    const int64_t count = parts(rows, MOST_ROWS), each = parts(parts(rows, count), MOST_AT_ONCE) * MOST_AT_ONCE;
    for (int64_t row = 0; row < rows; row += each) f(row, std::min(each, rows - row));
}

// The largest of each row's sums and its column, the first of equals; column 0 and NaN if every sum is NaN.
void argmax(const Linear& call, int64_t* columns_out, float* sums_out) {
    const Weight& w = *call.weight;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    in_parts(call.rows, w.groups * w.group, [&](int64_t row, int64_t rows) {
        const Rows a = rows_for(w, rows, in_tiles(rows));
        Largest* found = room.found.fit<Largest>(call.num_threads * rows);
        for (int64_t i = 0; i < call.num_threads * rows; i++) found[i] = {w.columns, -INFINITY};
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, w, a);
            product(a, rows, Panels{w, 2, 1}, parts(w.columns, PANEL),
                    Best{found + omp_get_thread_num() * rows, static_cast<const bf16*>(call.bias), w.columns});
        }
        for (int64_t r = 0; r < rows; r++) {
            const Largest best = largest_of(found + r, call.num_threads, rows, w.columns);
            columns_out[row + r] = best.column;
            sums_out[row + r] = best.sum;
        }
    });
}

// 16 columns of the gate and the 16 that they multiply, to rows of bfloat16.
template <class Act>
struct GatedRows {
    bf16* to;
    int64_t columns;

    void operator()(const float* sums, int64_t row, int64_t panel) const {
        bf16* at = to + row * columns + panel * TILE;
        for (int c = 0; c < TILE; c += W) store(at + c, Act::of(load(sums + c)) * load(sums + TILE + c));
    }
};
