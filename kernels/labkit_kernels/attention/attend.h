// Paged attention on a CPU; the same code does decode and prefill. It takes pointers and strides, no torch headers.
// cpu.cpp compiles it for caches of the queries' dtype, codes.cpp for those in 8 bits, each when first needed.
//
// A decode step reads every key and value once and computes little, so its loop over keys must run at memory speed. A
// prefill computes a lot on keys that stay in cache, so it must run at FMA speed. For both, (queries of a tile) x
// (heads that share a key head) are the rows of a small matrix product, so keys are read once for the whole group.
// Keys come in tiles of 64, found by one pointer per row, so any block size works. A tile is transposed on its way
// into L1 (64 shuffles for 16x16), which is still faster than memory. The softmax is online: a row keeps its largest
// score and its sum, and rescales its result when the largest score grows.
//
// A cache may hold codes of 8 bits with a scale for each key and each value (see ../codes.h). Codes become floats on the
// way into L1. A key's scale multiplies its scores and a value's scale its weights, so that neither costs anything for
// each element.
//
// A work item is (sequence, key head, tile of queries, range of keys). Long ranges are split if there are too few items
// for the threads; the thread that finishes the last part of a split item combines the parts.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../codes.h"
#include "../threads.h"

namespace {

using labkit::bf16;
using labkit::is_code;
using labkit::vf;
using labkit::W;

constexpr int KEYS = 64;           // keys in a tile
constexpr int ROWS = 6;            // rows of a register tile
constexpr int ROWS_AN_ITEM = 96;   // rows that share one transposed tile of keys
constexpr int LEAST_PART = 256;    // keys below which a range is not split
constexpr int64_t LEAST_WORK = 1 << 21;  // multiply-adds (some 50 us) below which another thread is not worth waking
constexpr float LOG2E = 1.4426950408889634f;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int COLS = 4;  // vectors beside each other in a register tile: 6 x 4 sums, 4 operands, of 32 registers
#else
constexpr int COLS = 2;  // of 16 registers
#endif

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

struct Call {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const int32_t* table;
    const int32_t* query_start;
    const int32_t* seq_len;
    const float* sinks;
    const float* alibi;
    int64_t q_token, q_head;              // strides, in elements; the last dimension is dense
    int64_t k_block, k_head, k_slot;      // of the caches: in their elements
    int64_t v_block, v_head, v_slot;
    int64_t table_row;
    int64_t num_seqs, num_heads, num_kv_heads, head_size, value_size, block_size;
    int64_t window, num_threads, invariant, code;  // code: of the caches, 0 for the dtype of the queries
    double scale, softcap;
};

struct Item {
    int seq, head;           // head: of the keys
    int query, num_queries;  // within the sequence
    int begin, end;          // keys
    int part, num_parts, slot;  // slot: where this item's parts store their sums
    int64_t cost;
};

// One row of a tile of keys or values, and where to find it.
struct Rows {
    const void* at[KEYS];
};

// What multiplies a tile's scores and weights, where keys and values are codes.
struct Scales {
    alignas(64) float key[KEYS], value[KEYS];
};

// A thread's working memory, a few hundred KB; kept between calls.
struct Scratch {
    std::vector<float> store;
    float *q, *scores, *out, *keys, *values, *most, *sum, *rescale;

    void fit(int64_t rows, int64_t size, int64_t value_size) {
        auto whole = [](int64_t n) { return (n + 15) / 16 * 16; };  // cache lines
        int64_t need[] = {rows * size, rows * KEYS, rows * value_size, size * KEYS,
                          KEYS * value_size, rows, rows * W, rows};
        float** to[] = {&q, &scores, &out, &keys, &values, &most, &sum, &rescale};
        int64_t total = 16;
        for (int64_t n : need) total += whole(n);
        if (static_cast<int64_t>(store.size()) < total) store.resize(total);
        auto at = (reinterpret_cast<uintptr_t>(store.data()) + 63) / 64 * 64;
        for (int i = 0; i < 8; i++) {
            *to[i] = reinterpret_cast<float*>(at);
            at += whole(need[i]) * sizeof(float);
        }
    }
};

#include "multiply.h"
#include "rows.h"

struct Mask {
    float scale, softcap, slope;  // softcap, slope: 0 is off
    float distance;               // first key's position minus the query's
    int first, stop;              // the columns that this row sees
};

// Turns a row of scores into weights, in place. Updates the row's largest score (to base 2) and its W partial sums,
// which are added at the end. Returns the factor for the row's earlier result.
// `scales`: of the tile's keys and values, if the cache has any.
inline float softmax_row(float* row, int columns, const Mask& mask, float& most, float* sum, const Scales* scales) {
    float scale = mask.scale * LOG2E;
    if (scales)
        for (int j = 0; j < columns; j += W)
            labkit::store(row + j, labkit::load(row + j) * labkit::load(scales->key + j));
    if (mask.softcap != 0.f || mask.slope != 0.f) {
        for (int j = 0; j < columns; j += W) {
            vf x = labkit::load(row + j) * mask.scale;
            if (mask.softcap != 0.f) x = labkit::tanhv(x / mask.softcap) * mask.softcap;
            labkit::store(row + j, x + (labkit::iota() + (mask.distance + j)) * mask.slope);
        }
        scale = LOG2E;
    }
    std::fill(row, row + mask.first, -INFINITY);
    std::fill(row + mask.stop, row + columns, -INFINITY);
    vf largest = labkit::load(row);
    for (int j = W; j < columns; j += W) largest = labkit::max(largest, labkit::load(row + j));
    const float grown = std::max(most, labkit::reduce_max(largest) * scale);
    const float shift = grown == -INFINITY ? 0.f : grown;
    vf total{};
    for (int j = 0; j < columns; j += W) {
        vf weight = labkit::exp2v(labkit::load(row + j) * scale - shift);
        labkit::store(row + j, scales ? weight * labkit::load(scales->value + j) : weight);
        total += weight;
    }
    const float rescale = most == grown ? 1.f : std::exp2(most - shift);
    labkit::store(sum, labkit::load(sum) * rescale + total);
    most = grown;
    return rescale;
}

// A part's result before the division, as `combine` needs it.
struct Parts {
    std::vector<float> most, sum, out;
    int64_t rows, value_size;

    int64_t row(const Item& item, int part) const { return (static_cast<int64_t>(item.slot) + part) * rows; }
};

template <class T>
void write_row(const Call& call, const Item& item, int64_t r, const float* values, float by) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t token = call.query_start[item.seq] + item.query + r / group, head = item.head * group + r % group;
    T* to = static_cast<T*>(call.out) + (token * call.num_heads + head) * call.value_size;
    int64_t d = 0;
    for (; d + W <= call.value_size; d += W) labkit::store(to + d, labkit::load(values + d) * by);
    for (; d < call.value_size; d++) labkit::from_float(to + d, values[d] * by);
}

// Stores one finished row: in the output or, for a split item, where `combine` reads it.
template <class T>
void finish(const Call& call, const Item& item, int64_t r, float most, float sum, const float* values, Parts& parts) {
    if (item.num_parts == 1) {
        write_row<T>(call, item, r, values, sum > 0.f ? 1.f / sum : 0.f);
        return;
    }
    const int64_t at = parts.row(item, item.part) + r, wide = padded(call.value_size);
    parts.most[at] = most;
    parts.sum[at] = sum;
    std::memcpy(parts.out.data() + at * wide, values, wide * sizeof(float));
}

inline int first_position(const Call& call, const Item& item) {
    return call.seq_len[item.seq] - (call.query_start[item.seq + 1] - call.query_start[item.seq]) + item.query;
}

template <class T>
inline const T* query_row(const Call& call, const Item& item, int64_t r) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    return static_cast<const T*>(call.q) + (call.query_start[item.seq] + item.query + r / group) * call.q_token +
           (item.head * group + r % group) * call.q_head;
}

// Iterates over an item's keys tile by tile, with the address of the next tile for prefetching.
template <class C>
struct Walk {
    const Call& call;
    const Item& item;
    int begin, count;
    Rows keys, values, next_keys, next_values;
    Scales scales;

    Walk(const Call& call, const Item& item) : call(call), item(item), begin(item.begin - KEYS), count(0) {
        if (item.begin < item.end) find(item.begin);
    }

    bool next() {
        begin += KEYS;
        if (begin >= item.end) return false;
        keys = next_keys;
        values = next_values;
        count = std::min(KEYS, item.end - begin);
        if constexpr (is_code<C>) {
            const int32_t* table = call.table + item.seq * call.table_row;
            read_scales(key_scales(), call.k_block, table, call.block_size, begin, count, scales.key);
            read_scales(value_scales(), call.v_block, table, call.block_size, begin, count, scales.value);
        }
        if (begin + KEYS < item.end) find(begin + KEYS);
        return true;
    }

  private:
    void find(int from) {
        const int32_t* table = call.table + item.seq * call.table_row;
        const int n = std::min(KEYS, item.end - from);
        find_rows<C>(call.k, call.k_block, call.k_head, call.k_slot, table, call.block_size, item.head, from, n,
                     next_keys);
        find_rows<C>(call.v, call.v_block, call.v_head, call.v_slot, table, call.block_size, item.head, from, n,
                     next_values);
        if constexpr (is_code<C>) {
            prefetch_scales(key_scales(), call.k_block, table, call.block_size, from, n);
            prefetch_scales(value_scales(), call.v_block, table, call.block_size, from, n);
        }
    }
    // Of this head, in block 0: behind the codes.
    const char* key_scales() const {
        return static_cast<const char*>(call.k) + item.head * call.k_head + call.block_size * call.k_slot;
    }
    const char* value_scales() const {
        return static_cast<const char*>(call.v) + item.head * call.v_head + call.block_size * call.v_slot;
    }
};

// Types of their own, so that products are compiled once for all caches.
struct KeyRow {
    const float* keys;
    const float* operator()(int64_t d) const { return keys + d * KEYS; }
};
struct ValueRow {
    const float* const* at;
    const float* operator()(int64_t k) const { return at[k]; }
};

// T: of queries and result; C: of the cache, T or codes.
template <class T, class C>
void attend(const Call& call, const Item& item, Scratch& s, Parts& parts) {
    const int64_t group = call.num_heads / call.num_kv_heads, rows = item.num_queries * group;
    const int64_t size = call.head_size, wide = padded(call.value_size);
    const int position = first_position(call, item);

    s.fit(rows, size, wide);
    std::memset(s.out, 0, rows * wide * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        const T* from = query_row<T>(call, item, r);
        for (int64_t d = 0; d < size; d++) s.q[r * size + d] = labkit::to_float(from[d]);
        const float* sink = call.sinks && item.part == 0 ? call.sinks + item.head * group + r % group : nullptr;
        s.most[r] = sink ? *sink * LOG2E : -INFINITY;
        labkit::store(s.sum + r * W, vf{});
        s.sum[r * W] = sink ? 1.f : 0.f;
    }

    const float* value_rows[KEYS];
    const KeyRow key_row{s.keys};
    const ValueRow value_row{value_rows};
    Walk<C> walk(call, item);
    while (walk.next()) {
        const int begin = walk.begin, count = walk.count, columns = padded(count);
        // Rows above see none of these keys yet; with a window, rows below see none of them any more.
        const int64_t top = std::clamp<int64_t>(begin - position, 0, item.num_queries) * group;
        int64_t bottom = rows;
        if (call.window)
            bottom = std::clamp<int64_t>(begin + count - 1 + call.window - position, 0, item.num_queries) * group;
        if (top >= bottom) continue;
        transpose_keys<C>(walk.keys, count, size, s.keys, walk.next_keys, walk.next_values);
        float_rows<C>(walk.values, count, call.value_size, s.values, value_rows);
        multiply(s.q + top * size, size, key_row, s.scores + top * KEYS, KEYS, bottom - top, columns, size, nullptr);
        for (int64_t r = top; r < bottom; r++) {
            const int at = position + r / group;
            Mask mask;
            mask.scale = call.scale;
            mask.softcap = call.softcap;
            mask.slope = call.alibi ? call.alibi[item.head * group + r % group] : 0.f;
            mask.distance = begin - at;
            mask.first = call.window ? std::clamp<int>(at - call.window + 1 - begin, 0, columns) : 0;
            mask.stop = std::clamp(at + 1 - begin, 0, count);
            s.rescale[r] = softmax_row(s.scores + r * KEYS, columns, mask, s.most[r], s.sum + r * W,
                                       is_code<C> ? &walk.scales : nullptr);
        }
        multiply(s.scores + top * KEYS, KEYS, value_row, s.out + top * wide, wide, bottom - top, wide, count,
                 s.rescale + top);
    }
    for (int64_t r = 0; r < rows; r++)
        finish<T>(call, item, r, s.most[r], labkit::reduce_sum(labkit::load(s.sum + r * W)), s.out + r * wide, parts);
}

#if defined(__AVX512BF16__)
#define LABKIT_PAIRED 1
#include "paired.h"
#endif

// Combines the parts of a split item.
template <class T>
void combine(const Call& call, const Item& item, Parts& parts) {
    const int64_t group = call.num_heads / call.num_kv_heads, wide = padded(call.value_size);
    for (int64_t r = 0; r < item.num_queries * group; r++) {
        float most = -INFINITY, sum = 0.f;
        for (int p = 0; p < item.num_parts; p++) most = std::max(most, parts.most[parts.row(item, p) + r]);
        const float shift = most == -INFINITY ? 0.f : most;
        float* total = parts.out.data() + (parts.row(item, 0) + r) * wide;
        for (int p = 0; p < item.num_parts; p++) {
            const int64_t at = parts.row(item, p) + r;
            const float by = std::exp2(parts.most[at] - shift);
            sum += parts.sum[at] * by;
            const float* from = parts.out.data() + at * wide;
            for (int64_t d = 0; d < wide; d += W) {
                vf x = labkit::load(from + d) * by;
                labkit::store(total + d, p == 0 ? x : labkit::load(total + d) + x);
            }
        }
        write_row<T>(call, item, r, total, sum > 0.f ? 1.f / sum : 0.f);
    }
}

std::vector<Item> find_work(const Call& call, int64_t& total) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int tile = std::max<int64_t>(1, ROWS_AN_ITEM / group);
    std::vector<Item> items;
    total = 0;
    for (int seq = 0; seq < call.num_seqs; seq++) {
        const int queries = call.query_start[seq + 1] - call.query_start[seq], length = call.seq_len[seq];
        for (int query = 0; query < queries; query += tile) {
            const int count = std::min(tile, queries - query), position = length - queries + query;
            const int end = std::max(0, position + count);
            int begin = call.window ? std::clamp<int>(position - call.window + 1, 0, end) : 0;
            if (call.invariant) begin = begin / KEYS * KEYS;  // tiles begin at the same keys for every query
            // A tile of keys is moved once (which costs as much as 16 rows) and multiplied with every row.
            const int64_t cost = (end - begin) * (count * group + 16) + 64;
            for (int head = 0; head < call.num_kv_heads; head++)
                items.push_back({seq, head, query, count, begin, end, 0, 1, 0, cost});
            total += cost * call.num_kv_heads;
        }
    }
    return items;
}

// Splits items that would keep one thread busy after the others are done.
std::vector<Item> cut(const std::vector<Item>& items, int64_t most, int& num_slots) {
    std::vector<Item> found;
    for (const Item& item : items) {
        const int keys = item.end - item.begin;
        const int parts = std::clamp<int64_t>((item.cost + most - 1) / most, 1, std::max(1, keys / LEAST_PART));
        for (int p = 0; p < parts; p++) {
            Item piece = item;
            const int share = (keys / parts + KEYS - 1) / KEYS * KEYS;
            piece.begin = std::min(item.end, item.begin + p * share);
            piece.end = p + 1 == parts ? item.end : std::min(item.end, piece.begin + share);
            piece.part = p;
            piece.num_parts = parts;
            piece.slot = num_slots;
            piece.cost = item.cost / parts;
            found.push_back(piece);
        }
        if (parts > 1) num_slots += parts;
    }
    return found;
}

template <class T, class C>
void run(const Call& call) {
    int64_t total = 0;
    std::vector<Item> items = find_work(call, total);
    int64_t threads = std::min<int64_t>(call.num_threads, omp_get_max_threads());
    threads = std::clamp<int64_t>(total * (call.head_size + call.value_size) / 2 / LEAST_WORK, 1, threads);
    int num_slots = 0;
    if (threads > 1 && !call.invariant) {
        items = cut(items, std::max<int64_t>(1, total / (2 * threads)), num_slots);
        std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    }
    Parts parts;
    std::vector<std::atomic<int>> left(num_slots);
    if (num_slots) {
        parts.rows = 0;
        for (const Item& item : items)
            parts.rows = std::max<int64_t>(parts.rows, item.num_queries * (call.num_heads / call.num_kv_heads));
        parts.most.resize(num_slots * parts.rows);
        parts.sum.resize(num_slots * parts.rows);
        parts.out.resize(num_slots * parts.rows * padded(call.value_size));
        for (const Item& item : items)
            if (item.num_parts > 1) left[item.slot] = item.num_parts;
    }
    const int64_t count = items.size();
    std::atomic<int64_t> next{0};
    auto loop = [&](auto&& one) {
        for (int64_t i = next++; i < count; i = next++) {
            one(items[i]);
            if (items[i].num_parts > 1 && --left[items[i].slot] == 0) combine<T>(call, items[i], parts);
        }
    };
    auto work = [&] {
#if LABKIT_PAIRED
        if constexpr (std::is_same_v<T, bf16>) {
            paired::on_best_unit([&](auto unit) {
                using Unit = decltype(unit);
                static thread_local paired::Scratch scratch;
                [[maybe_unused]] typename Unit::Scope scope;
                loop([&](const Item& item) { paired::attend<Unit, C>(call, item, scratch, parts); });
            });
        } else
#endif
        {
            static thread_local Scratch scratch;
            loop([&](const Item& item) { attend<T, C>(call, item, scratch, parts); });
        }
    };
    if (threads == 1) {
        work();
    } else {
#pragma omp parallel num_threads(threads)
        work();
    }
}

}  // namespace
