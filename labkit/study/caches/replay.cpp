// Replays block hashes through one cache with one of the eviction policies that are known here; `Replay` in replay.py is
// the reference, and says what a request does. The same hits and evictions, ten times as fast.

#include <cmath>
#include <cstring>
#include <memory>

#include "policies.h"

namespace {

constexpr int IDLE_BINS = 32;  // as in stack.cpp

std::unique_ptr<Policy> made(i64 kind, Cache& cache, double share) {
    switch (kind) {  // in the order of `KINDS` in replaying.py
        case 0: return std::make_unique<LRU>(cache);
        case 1: return std::make_unique<SLRU>(cache, share);
        case 2: return std::make_unique<S3FIFO>(cache, share);
        case 3: return std::make_unique<Scored>(cache, [](const Cache& c, i64 b) { return (double)c.stored_at[b]; });
        case 4: return std::make_unique<Scored>(cache, [](const Cache& c, i64 b) { return (double)c.hits[b]; });
        case 5: return std::make_unique<Scored>(cache, [](const Cache& c, i64 b) { return -c.next_use[b]; });
        default:
            return std::make_unique<Scored>(cache, [](const Cache& c, i64 b) {
                return (double)c.hits[b] + 1.0 / (double)(1 + c.depth_of[b]);
            });
    }
}

struct Replay {
    Cache cache;
    std::unique_ptr<Policy> policy;
    bool hold;
    i64 num_evicted = 0, num_cached = 0;
    std::vector<i64> idle = std::vector<i64>(IDLE_BINS), blocks, found, evicted;

    Replay(i64 kind, double capacity, bool hold, double share)
        : cache(capacity), policy(made(kind, cache, share)), hold(hold) {}

    i64 add(const i64* hashes, i64 num, double now, const double* next_use) {
        blocks.clear();
        found.clear();
        for (i64 i = 0; i < num; i++) {
            i64 block = cache.get(hashes[i]);
            if (!block) break;
            blocks.push_back(block);
            cache.hits[block]++;
            policy->touched(block);
        }
        i64 num_hit = (i64)blocks.size(), held = num_hit;
        if (num_hit < num) {
            for (i64 i = num_hit; i < num; i++) {
                i64 block = cache.get(hashes[i]);
                found.push_back(block);
                if (!block) continue;
                policy->touched(block);
                held++;
            }
            if (hold) evict((double)(num_cached + num - held) - cache.capacity, now);
            i64 parent = num_hit ? blocks.back() : 0;
            for (i64 i = num_hit; i < num; i++) {
                i64 block = found[i - num_hit];
                if (!block)
                    block = store(hashes[i], parent, i);
                else if (!cache.has_parent(block)) {
                    cache.parent_of[block] = parent;
                    cache.parent_hashes[block] = cache.hashes[parent];
                    cache.children[parent]++;
                }
                blocks.push_back(block);
                parent = block;
            }
        }
        if (next_use)
            for (i64 i = 0; i < num; i++) cache.next_use[blocks[i]] = next_use[i];
        for (i64 block : blocks) cache.used_at[block] = now;
        for (i64 i = num - 1; i >= 0; i--) policy->freed(blocks[i]);
        policy->settled();
        evict((double)num_cached - cache.capacity, now);
        return num_hit;
    }

    i64 store(i64 digest, i64 parent, i64 depth) {
        i64 block;
        if (cache.free.empty())
            block = cache.add_block();
        else {
            block = cache.free.back();
            cache.free.pop_back();
        }
        cache.hashes[block] = digest;
        cache.depth_of[block] = depth;
        cache.stored_at[block] = cache.num_stored++;
        cache.parent_of[block] = parent;
        cache.parent_hashes[block] = cache.hashes[parent];
        cache.block_of.put(digest, block);
        cache.children[parent]++;
        num_cached++;
        return block;
    }

    void evict(double num, double now) {
        if (!(num > 0)) return;
        evicted.clear();
        policy->evict((i64)num, evicted);
        for (i64 block : evicted) {
            double seconds = now - cache.used_at[block];
            int bin = 0;
            if (seconds >= 0x1p-10) {
                std::frexp(seconds, &bin);
                bin = std::min(bin + 10, IDLE_BINS - 1);
            }
            idle[bin]++;
            if (i64 parent = cache.has_parent(block)) cache.children[parent]--;
            cache.block_of.erase(cache.hashes[block]);
            cache.hashes[block] = NOBODY;
            cache.hits[block] = cache.children[block] = 0;
            cache.free.push_back(block);
        }
        num_evicted += (i64)evicted.size();
        num_cached -= (i64)evicted.size();
    }
};

}  // namespace

extern "C" {

void replay_new(i64 kind, double capacity, i64 hold, double share, Replay** made) {
    *made = new Replay(kind, capacity, hold, share);
}

void replay_free(Replay* replay) { delete replay; }

// Requests with `hashes[ends[i]..ends[i + 1]]`, of which those `asked` for are replayed; `hits` [requests]
// No request has the same hash twice: traces are checked for that.
void replay_add(Replay* replay, i64 num, const i64* ends, const i64* hashes, const double* arrival, const uint8_t* asked,
                const double* next_use, i32* hits) {
    for (i64 i = 0; i < num; i++)
        if (asked[i])
            hits[i] = (i32)replay->add(hashes + ends[i], ends[i + 1] - ends[i], arrival[i],
                                       next_use ? next_use + ends[i] : nullptr);
}

void replay_read(Replay* replay, i64* numbers, i64* idle) {
    numbers[0] = replay->num_evicted;
    numbers[1] = replay->num_cached;
    memcpy(idle, replay->idle.data(), 8 * IDLE_BINS);
}
}
