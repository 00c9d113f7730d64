// LRU caches of all sizes in one pass over a trace: the stack of Mattson et al. (1970).
//
// An LRU cache of C blocks holds the C most recently used ones. So one list in order of use holds every cache size, and
// a block's distance from the top is the smallest cache that hits it. Here the list is a row of slots, filled in order
// of use: a used block moves to a new slot at the end. A bit per slot says whether it is still occupied; a Fenwick tree
// over words of 64 bits counts the occupied slots above any one in about 14 steps, from 64 KiB for a million slots.
//
// For sizes that are asked for, `boundary` is the first slot that such a cache holds. It only moves forward, so what
// it passes is what that cache evicts, and how long those blocks were idle comes at no extra cost.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "map.h"

namespace {

constexpr int IDLE_BINS = 32;  // bin b > 0: idle for 2^(b-11) to 2^(b-10) seconds
constexpr int HEAT_DISTANCE = 40, HEAT_DEPTH = 24;  // powers of two
enum Cause : uint8_t { MISS, SYSTEM, SESSION, CROSS };

struct Block {
    i64 digest;
    double used_at;
    i64 sessions[2];   // the first two different ones
    i64 num_sessions;  // 3 stands for more
};

struct Stack {
    std::vector<i64> capacity, boundary, count, evicted;
    i64 history;
    Map map;
    std::vector<Block> slots;
    std::vector<uint64_t> bits;
    std::vector<i64> tree;  // Fenwick tree over words of bits
    i64 top = 0, occupied = 0, oldest = 0, num_cold = 0;
    std::vector<i64> distances, idle, heat;
    std::vector<i64> found, waiting;

    Stack(i64 num, const i64* sizes, i64 history)
        : capacity(sizes, sizes + num), boundary(num), count(num), evicted(num), history(history),
          idle(num * IDLE_BINS), heat(HEAT_DISTANCE * HEAT_DEPTH) {
        resize(1 << 13);
    }

    void resize(i64 size) {
        slots.resize(size);
        bits.assign(size / 64, 0);
        tree.assign(size / 64 + 1, 0);
    }
    bool is_set(i64 slot) const { return bits[slot >> 6] >> (slot & 63) & 1; }
    void set(i64 slot, int by) {
        bits[slot >> 6] ^= 1ull << (slot & 63);
        for (i64 i = (slot >> 6) + 1; i < (i64)tree.size(); i += i & -i) tree[i] += by;
    }
    i64 below(i64 slot) const {  // occupied slots before this one
        i64 sum = __builtin_popcountll(bits[slot >> 6] & ((1ull << (slot & 63)) - 1));
        for (i64 i = slot >> 6; i > 0; i -= i & -i) sum += tree[i];
        return sum;
    }

    // Occupied slots move to the front, in order. At least half of the row is free afterwards.
    void compact(i64 room) {
        std::vector<i64> rank(bits.size());
        i64 sum = 0;
        for (size_t w = 0; w < bits.size(); w++) rank[w] = sum, sum += __builtin_popcountll(bits[w]);
        auto moved = [&](i64 slot) {
            if (slot >= (i64)slots.size()) return sum;
            return rank[slot >> 6] + (i64)__builtin_popcountll(bits[slot >> 6] & ((1ull << (slot & 63)) - 1));
        };
        for (Map::Entry& e : map.entries)
            if (e.slot >= 0) e.slot = moved(e.slot);
        for (i64& edge : boundary) edge = moved(edge);
        oldest = 0;
        i64 to = 0;
        for (i64 slot = 0; slot < top; slot++)
            if (is_set(slot)) slots[to++] = slots[slot];
        i64 size = slots.size();
        while (size < 2 * (occupied + room)) size *= 2;
        resize(size);
        top = occupied;
        for (i64 slot = 0; slot < top; slot++) bits[slot >> 6] |= 1ull << (slot & 63);
        for (size_t w = 0; w < bits.size(); w++) {
            tree[w + 1] += __builtin_popcountll(bits[w]);
            size_t up = (w + 1) + ((w + 1) & -(w + 1));
            if (up < tree.size()) tree[up] += tree[w + 1];
        }
    }

    static uint8_t cause(const Block& b, i64 session) {
        bool own = session == b.sessions[0] || (b.num_sessions > 1 && session == b.sessions[1]);
        if (b.num_sessions >= 3 || (b.num_sessions == 2 && !own)) return SYSTEM;
        return own ? SESSION : CROSS;
    }
    static void note(Block& b, i64 session) {
        for (i64 i = 0; i < b.num_sessions && i < 2; i++)
            if (b.sessions[i] == session) return;
        if (b.num_sessions < 2) b.sessions[b.num_sessions] = session;
        if (b.num_sessions < 3) b.num_sessions++;
    }

    void add(const i64* hashes, i64 n, double now, i64 session, int32_t* hits, uint8_t* causes) {
        const i64 num = capacity.size();
        if (top + n > (i64)slots.size()) compact(n);
        found.assign(n, -1);
        i64 lowest = top, alive = 0, farthest = 0;  // alive: the smallest cache that has hit all so far
        bool cold = false;
        for (i64 i = 0; i < n; i++) {
            Map::Entry* e = map.find(hashes[i]);
            i64 slot = e ? e->slot : -1;
            found[i] = slot;
            for (i64 k = 0; k < num && slot < boundary[k]; k++) count[k]++;
            cold |= slot < 0;
            if (cold) {
                causes[i] = MISS;
                num_cold++;
                continue;
            }
            if (slot < lowest) {
                lowest = slot;
                farthest = occupied - below(slot);
                for (; alive < num && lowest < boundary[alive]; alive++) hits[alive] = i;
            }
            if (farthest >= (i64)distances.size()) distances.resize(2 * farthest + 1);
            distances[farthest]++;
            int far = 63 - __builtin_clzll(farthest), deep = 63 - __builtin_clzll(i + 1);
            heat[(far < HEAT_DISTANCE ? far : HEAT_DISTANCE - 1) * HEAT_DEPTH + (deep < HEAT_DEPTH ? deep : HEAT_DEPTH - 1)]++;
            causes[i] = cause(slots[slot], session);
        }
        i64 warm = 0;
        while (warm < n && causes[warm] != MISS) warm++;
        for (; alive < num; alive++) hits[alive] = warm;
        for (i64 i = n - 1; i >= 0; i--) {  // the last block first, so that leaves leave before their parents
            Block b{hashes[i], now, {0, 0}, 0};
            if (found[i] >= 0) {
                b = slots[found[i]];
                b.used_at = now;
                set(found[i], -1);
                map.find(hashes[i])->slot = top;
            } else {
                map.put(hashes[i], top);
                occupied++;
            }
            note(b, session);
            slots[top] = b;
            set(top++, 1);
        }
        for (i64 k = 0; k < num; k++) {
            for (; count[k] > capacity[k]; boundary[k]++) {
                if (!is_set(boundary[k])) continue;
                count[k]--;
                evicted[k]++;
                double idled = now - slots[boundary[k]].used_at;
                int bin = idled < 1.0 / 1024 ? 0 : std::ilogb(idled) + 11;
                idle[k * IDLE_BINS + (bin < IDLE_BINS ? bin : IDLE_BINS - 1)]++;
            }
        }
        for (; occupied > history; oldest++) {
            if (!is_set(oldest)) continue;
            map.erase(slots[oldest].digest);
            set(oldest, -1);
            occupied--;
        }
    }
};

}  // namespace

extern "C" {

void stack_new(i64 num, const i64* capacities, i64 history, void** out) { *out = new Stack(num, capacities, history); }

void stack_free(void* stack) { delete (Stack*)stack; }

// indptr [n + 1], hashes [indptr[n]], arrival [n], session [n] -> hits [n, capacities], causes [indptr[n]]
void stack_add(void* stack, i64 n, const i64* indptr, const i64* hashes, const double* arrival, const i64* session,
               int32_t* hits, uint8_t* causes) {
    Stack& s = *(Stack*)stack;
    const i64 num = s.capacity.size();
    for (i64 r = 0; r < n; r++)
        s.add(hashes + indptr[r], indptr[r + 1] - indptr[r], arrival[r], session[r], hits + r * num, causes + indptr[r]);
}

// sizes [4]: distances, occupied, cold, bytes
void stack_sizes(void* stack, i64* sizes) {
    const Stack& s = *(Stack*)stack;
    sizes[0] = s.distances.size();
    sizes[1] = s.occupied;
    sizes[2] = s.num_cold;
    sizes[3] = s.map.entries.size() * sizeof(Map::Entry) + s.slots.size() * sizeof(Block) + s.distances.size() * 8;
}

void stack_read(void* stack, i64* distances, i64* idle, i64* heat, i64* evicted) {
    const Stack& s = *(Stack*)stack;
    std::memcpy(distances, s.distances.data(), 8 * s.distances.size());
    std::memcpy(idle, s.idle.data(), 8 * s.idle.size());
    std::memcpy(heat, s.heat.data(), 8 * s.heat.size());
    std::memcpy(evicted, s.evicted.data(), 8 * s.evicted.size());
}
}
