// Block hashes to numbers.

#pragma once

#include <cstdint>
#include <vector>

using i64 = int64_t;

// digest -> slot; open addressing, removal shifts the following entries back
struct Map {
    struct Entry {
        i64 key, slot;  // slot -1: empty
    };
    std::vector<Entry> entries;
    uint64_t mask;
    i64 used = 0;

    Map() : entries(1 << 12, Entry{0, -1}), mask((1 << 12) - 1) {}

    uint64_t home(i64 key) const {
        uint64_t x = (uint64_t)key * 0x9E3779B97F4A7C15ull;
        return (x ^ (x >> 29)) & mask;
    }
    Entry* find(i64 key) {
        for (uint64_t at = home(key);; at = (at + 1) & mask) {
            Entry& e = entries[at];
            if (e.slot < 0) return nullptr;
            if (e.key == key) return &e;
        }
    }
    void put(i64 key, i64 slot) {
        if (2 * (used + 1) > (i64)entries.size()) grow();
        uint64_t at = home(key);
        while (entries[at].slot >= 0) at = (at + 1) & mask;
        entries[at] = {key, slot};
        used++;
    }
    void erase(i64 key) {
        uint64_t at = home(key);
        while (entries[at].key != key || entries[at].slot < 0) at = (at + 1) & mask;
        for (uint64_t next = (at + 1) & mask; entries[next].slot >= 0; next = (next + 1) & mask) {
            if (((next - home(entries[next].key)) & mask) >= ((next - at) & mask)) {
                entries[at] = entries[next];
                at = next;
            }
        }
        entries[at].slot = -1;
        used--;
    }
    void grow() {
        std::vector<Entry> old(2 * entries.size(), Entry{0, -1});
        old.swap(entries);
        mask = entries.size() - 1;
        for (const Entry& e : old) {
            if (e.slot < 0) continue;
            uint64_t at = home(e.key);
            while (entries[at].slot >= 0) at = (at + 1) & mask;
            entries[at] = e;
        }
    }
};
