// The block pool, the LRU queue and the prefix cache of a `BlockManager`, over its own arrays.
//
// What the manager keeps in lists and dicts (free blocks, candidates, hash -> block, duplicates, ghosts) is kept here as
// long as steps are taken here. Each function does what the Python method of its name does, in the same order.

#pragma once

#include <unordered_map>

#include "digests.h"

struct Arrays {  // in the order of `ARRAYS` in native.py
    i32* count;
    uint8_t* stored;
    Digest *hash_of, *parent_hash_of;
    i32* tokens_of;
    i64 *depth_of, *parent_of, *children, *hits, *stored_at, *stamp, *parent_stamp;
    i64 *num_blocks, *room, *num_tokens, *num_computed, *next_full;
    i64 *scheduled, *limit, *no_stop_before, *serial, *rank, *last_plan;
    u64* keys;
};

struct DigestHash {
    size_t operator()(const Digest& digest) const { return digest.word[0]; }
};

// Blocks by the time of their release, the least recent first.
class Lru {
    std::vector<i32> before, after;  // 0 is the ring's beginning and end

  public:
    i64 size = 0;

    explicit Lru(i64 num_blocks) : before(num_blocks + 1), after(num_blocks + 1) {}

    void freed(i32 block) {
        i32 last = before[0];
        after[last] = block;
        before[block] = last;
        after[block] = 0;
        before[0] = block;
        size++;
    }
    void forget(i32 block) {
        after[before[block]] = after[block];
        before[after[block]] = before[block];
        size--;
    }
    i32 evict() {
        i32 block = after[0];
        forget(block);
        return block;
    }
    template <class F>
    void each(F f) const {
        for (i32 block = after[0]; block; block = after[block]) f(block);
    }
};

class Blocks {
  public:
    Arrays a;
    i64 num_blocks, block_size, step = 0;
    std::vector<i32> free;
    Lru lru;
    Map block_of;
    std::unordered_map<Digest, std::vector<i32>, DigestHash> spares;
    Ghosts ghosts;
    Hasher hash;
    i64 num_evicted = 0, num_stored = 0;

    Blocks(const Arrays& arrays, i64 num, i64 size) : a(arrays), num_blocks(num), block_size(size), lru(num), hash(size) {
        for (i64 block = num; block > 0; block--) free.push_back((i32)block);
    }

    i64 available() const { return (i64)free.size() + lru.size; }
    i64 used() const { return num_blocks - available(); }
    i64 blocks_for(i64 tokens) const { return (tokens + block_size - 1) / block_size; }

    // `n` empty blocks; `for_whom(i)` is the request that the i-th is for
    template <class F>
    std::vector<i32>& take(i64 n, F for_whom) {
        taken.clear();
        i64 short_of = n - (i64)free.size();
        if (short_of < 0) short_of = 0;
        for (i64 i = 0; i < n - short_of; i++) {
            taken.push_back(free.back());
            free.pop_back();
        }
        if (short_of) {
            evicted.clear();
            for (i64 i = 0; i < short_of; i++) evicted.push_back(lru.evict());
            remove(n - short_of, for_whom);
            taken.insert(taken.end(), evicted.begin(), evicted.end());
            num_evicted += short_of;
        }
        for (i32 block : taken) a.count[block] = 1;
        return taken;
    }

    // A table's blocks, its last first. Those without a holder are reused next, or kept as long as there is room.
    void release(const i32* blocks, i64 num) {
        for (i64 i = num - 1; i >= 0; i--) {
            i32 block = blocks[i];
            if (--a.count[block]) continue;
            if (a.stored[block])
                lru.freed(block);
            else
                free.push_back(block);
        }
    }

    void hold(const std::vector<i32>& blocks) {
        for (i32 block : blocks)
            if (!a.count[block]) lru.forget(block);
        for (i32 block : blocks) {
            a.count[block]++;
            a.hits[block]++;
        }
    }

    void find(const std::vector<Digest>& hashes, i64 usable, std::vector<i32>& found) const {
        found.clear();
        for (i64 i = 0; i < usable && i < (i64)hashes.size(); i++) {
            i64 block = block_of.get(hashes[i]);
            if (block < 0) break;
            found.push_back((i32)block);
        }
    }

    void store(i32 block, const Digest& digest, const Digest& parent_digest, i32 parent, i64 depth, const i32* tokens) {
        memcpy(a.tokens_of + block * block_size, tokens, 4 * block_size);
        a.depth_of[block] = depth;
        a.parent_of[block] = parent;
        a.parent_stamp[block] = a.stamp[parent];
        a.children[parent]++;
        a.stored_at[block] = num_stored++;
        a.stored[block] = 1;
        a.hash_of[block] = digest;
        a.parent_hash_of[block] = parent_digest;
        i64 first = block_of.get(digest);
        if (first >= 0)
            spares[digest].push_back(block);
        else
            block_of.set(digest, block);
        if (first < 0 && ghosts.size()) ghosts.erase(digest);
    }

  private:
    std::vector<i32> taken, evicted;

    template <class F>
    void remove(i64 first, F for_whom) {
        for (i32 block : evicted)
            if (a.parent_stamp[block] == a.stamp[a.parent_of[block]]) a.children[a.parent_of[block]]--;
        for (i32 block : evicted) {
            a.stored[block] = 0;
            a.stamp[block]++;
            a.children[block] = a.hits[block] = a.parent_of[block] = 0;
        }
        for (size_t i = 0; i < evicted.size(); i++) {
            i32 block = evicted[i];
            const Digest& digest = a.hash_of[block];
            if (!spares.empty()) {
                auto at = spares.find(digest);
                if (at != spares.end()) {
                    auto& others = at->second;
                    if (block_of.get(digest) == block) {
                        block_of.set(digest, others.front());
                        others.erase(others.begin());
                    } else {
                        for (size_t j = 0; j < others.size(); j++)
                            if (others[j] == block) {
                                others.erase(others.begin() + j);
                                break;
                            }
                    }
                    if (others.empty()) spares.erase(at);
                    continue;
                }
            }
            block_of.erase(digest);
            ghosts.add(digest, step, for_whom(first + (i64)i));
        }
        i64 beyond = ghosts.size() - 4 * num_blocks;
        if (beyond > 0) ghosts.drop_oldest(beyond > num_blocks ? beyond : num_blocks);
        ghosts.compact(10 * num_blocks + 4096);
    }
};
