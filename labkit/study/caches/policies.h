// Eviction policies over the columns of a cache. Each function does what the Python method of its name does, in
// labkit/core/blocks/eviction.py, labkit/core/blocks/queues.py and foresight.py.

#pragma once

#include <algorithm>
#include <deque>
#include <functional>

#include "map.h"

using i32 = int32_t;

constexpr i64 NOBODY = INT64_MIN;  // the hash of a block that is not cached

struct Cache {  // columns by block; block 0 stands for none
    double capacity;
    Map block_of;
    std::vector<i64> hits, depth_of, children, stored_at, hashes, parent_hashes, parent_of;
    std::vector<double> next_use, used_at;
    std::vector<i64> free;
    i64 num_stored = 0;

    explicit Cache(double num_blocks) : capacity(num_blocks) { add_block(); }

    i64 add_block() {
        for (auto* column : {&hits, &depth_of, &children, &stored_at, &parent_of}) column->push_back(0);
        hashes.push_back(NOBODY);
        parent_hashes.push_back(NOBODY);
        next_use.push_back(0);
        used_at.push_back(0);
        return (i64)hashes.size() - 1;
    }
    i64 has_parent(i64 block) const {
        i64 parent = parent_of[block];
        return parent && hashes[parent] != NOBODY && hashes[parent] == parent_hashes[block] ? parent : 0;
    }
    i64 get(i64 digest) {
        Map::Entry* entry = block_of.find(digest);
        return entry ? entry->slot : 0;
    }
};

class Policy {
  public:
    explicit Policy(Cache& cache) : cache(cache) {}
    virtual ~Policy() {}
    virtual i64 size() const = 0;
    virtual void freed(i64 block) = 0;
    virtual void settled() {}  // after the blocks of a request were freed
    virtual void touched(i64 block) = 0;
    virtual void evict(i64 num, std::vector<i64>& evicted) = 0;

  protected:
    Cache& cache;
};

// A queue that blocks can leave from the middle. Links grow with the cache.
class Queue {
    std::vector<i32> before{0}, after{0};

  public:
    i64 size = 0;

    void push(i64 block) {
        if (block >= (i64)before.size()) {
            before.resize(2 * block + 1);
            after.resize(2 * block + 1);
        }
        i32 last = before[0];
        after[last] = before[0] = (i32)block;
        before[block] = last;
        after[block] = 0;
        size++;
    }
    void remove(i64 block) {
        after[before[block]] = after[block];
        before[after[block]] = before[block];
        size--;
    }
    i64 pop() {
        i64 block = after[0];
        remove(block);
        return block;
    }
};

class LRU : public Policy {
    Queue queue;

  public:
    using Policy::Policy;
    i64 size() const override { return queue.size; }
    void freed(i64 block) override { queue.push(block); }
    void touched(i64 block) override { queue.remove(block); }
    void evict(i64 num, std::vector<i64>& evicted) override {
        for (; num > 0; num--) evicted.push_back(queue.pop());
    }
};

class SLRU : public Policy {
    Queue probation, protected_;
    std::vector<char> is_protected;
    double share;

  public:
    SLRU(Cache& cache, double share) : Policy(cache), share(share) {}
    i64 size() const override { return probation.size + protected_.size; }
    void freed(i64 block) override {
        if (block >= (i64)is_protected.size()) is_protected.resize(2 * block + 1);
        is_protected[block] = cache.hits[block] > 0;
        (is_protected[block] ? protected_ : probation).push(block);
    }
    void settled() override {
        while ((double)protected_.size > share * cache.capacity) {
            i64 block = protected_.pop();
            is_protected[block] = 0;
            probation.push(block);
        }
    }
    void touched(i64 block) override { (is_protected[block] ? protected_ : probation).remove(block); }
    void evict(i64 num, std::vector<i64>& evicted) override {
        for (; num > 0; num--) evicted.push_back((probation.size ? probation : protected_).pop());
    }
};

// Children of a block that were evicted in this call, which the cache still counts.
class Gone {
    std::vector<i32> count;
    std::vector<i64> counted;

  public:
    i64 of(i64 block) const { return block < (i64)count.size() ? count[block] : 0; }
    void add(i64 block) {
        if (block >= (i64)count.size()) count.resize(2 * block + 1);
        count[block]++;
        counted.push_back(block);
    }
    void clear() {
        for (i64 block : counted) count[block] = 0;
        counted.clear();
    }
};

class S3FIFO : public Policy {
    Queue small, main_;
    std::vector<char> waits_in_small, in_main;
    std::vector<i32> spent;
    Map ghost_at;
    std::deque<i64> ghosts;  // the oldest first; one is dead if the map has another number for it, or none
    i64 first_ghost = 0, num_ghosts = 0;
    double share;
    Gone gone;

  public:
    S3FIFO(Cache& cache, double share) : Policy(cache), share(share) {}
    i64 size() const override { return small.size + main_.size; }
    void freed(i64 block) override {
        if (block >= (i64)in_main.size()) {
            waits_in_small.resize(2 * block + 1);
            in_main.resize(2 * block + 1);
            spent.resize(2 * block + 1);
        }
        if (ghost_at.find(cache.hashes[block])) {
            ghost_at.erase(cache.hashes[block]);
            num_ghosts--;
            in_main[block] = 1;
        }
        push(block, !in_main[block]);
    }
    void touched(i64 block) override { (waits_in_small[block] ? small : main_).remove(block); }

    void evict(i64 num, std::vector<i64>& evicted) override {
        gone.clear();
        i64 passed[2] = {0, 0};  // blocks of main, small skipped in a row because of their children
        while (num > 0) {
            i64 sizes[2] = {main_.size, small.size};
            bool from_small = sizes[1] && ((double)sizes[1] > share * (double)(sizes[1] + sizes[0]) || !sizes[0]);
            bool all[2] = {passed[0] >= sizes[0], passed[1] >= sizes[1]};
            if (all[from_small] && !all[!from_small]) from_small = !from_small;
            i64 block = (from_small ? small : main_).pop();
            if (cache.children[block] > gone.of(block) && !all[from_small]) {
                push(block, from_small);
                passed[from_small]++;
                continue;
            }
            if (std::min(cache.hits[block], (i64)3) > spent[block]) {
                spent[block]++;
                in_main[block] = 1;
                push(block, false);
                continue;
            }
            passed[0] = passed[1] = 0;
            if (from_small) remember(cache.hashes[block]);
            in_main[block] = 0;
            spent[block] = 0;
            evicted.push_back(block);
            num--;
            if (i64 parent = cache.has_parent(block)) gone.add(parent);
        }
    }

  private:
    void push(i64 block, bool to_small) {
        waits_in_small[block] = to_small;
        (to_small ? small : main_).push(block);
    }
    void remember(i64 digest) {
        if (!ghost_at.find(digest)) {
            ghost_at.put(digest, first_ghost + (i64)ghosts.size());
            ghosts.push_back(digest);
            num_ghosts++;
        }
        if ((double)num_ghosts > cache.capacity) {
            while (!alive(first_ghost)) drop();
            ghost_at.erase(ghosts.front());
            num_ghosts--;
        }
        while (!ghosts.empty() && !alive(first_ghost)) drop();
        if ((i64)ghosts.size() > 4 * num_ghosts + 1024) renumber();
    }
    bool alive(i64 number) {
        Map::Entry* entry = ghost_at.find(ghosts[number - first_ghost]);
        return entry && entry->slot == number;
    }
    void drop() {
        ghosts.pop_front();
        first_ghost++;
    }
    void renumber() {
        std::deque<i64> kept;
        for (i64 i = 0; i < (i64)ghosts.size(); i++)
            if (alive(first_ghost + i)) kept.push_back(ghosts[i]);
        ghosts.swap(kept);
        for (i64 i = 0; i < (i64)ghosts.size(); i++) ghost_at.find(ghosts[i])->slot = first_ghost + i;
    }
};

// Lowest score first, among blocks without a cached child.
class Scored : public Policy {
    struct Entry {
        double key;
        i64 number, block;
        bool operator>(const Entry& other) const {
            return key != other.key ? key > other.key : number > other.number;
        }
    };
    std::vector<Entry> heap;
    std::vector<Entry> live;    // by block; number 0: none
    std::vector<char> parked;  // by block
    i64 num_live = 0, num_freed = 0;
    std::function<double(const Cache&, i64)> score;
    Gone gone;

  public:
    Scored(Cache& cache, std::function<double(const Cache&, i64)> score) : Policy(cache), score(score) {}
    i64 size() const override { return num_live; }

    void freed(i64 block) override {
        if (block >= (i64)live.size()) {
            live.resize(2 * block + 1);
            parked.resize(2 * block + 1);
        }
        live[block] = {score(cache, block), ++num_freed, block};
        num_live++;
        push(live[block]);
    }
    void settled() override {
        if ((i64)heap.size() <= 2 * num_live + 64) return;
        heap.clear();
        std::fill(parked.begin(), parked.end(), 0);
        for (const Entry& entry : live)
            if (entry.number) heap.push_back(entry);
        std::make_heap(heap.begin(), heap.end(), std::greater<>());
    }
    void touched(i64 block) override {
        live[block].number = 0;
        parked[block] = 0;
        num_live--;
    }
    void evict(i64 num, std::vector<i64>& evicted) override {
        gone.clear();
        bool strict = true;
        while (num > 0) {
            if (heap.empty()) {  // the rest have children in use: evict them anyway
                strict = false;
                for (const Entry& entry : live)
                    if (entry.number && parked[entry.block]) push(entry);
                std::fill(parked.begin(), parked.end(), 0);
            }
            std::pop_heap(heap.begin(), heap.end(), std::greater<>());
            Entry entry = heap.back();
            heap.pop_back();
            i64 block = entry.block;
            if (live[block].number != entry.number) continue;
            if (strict && cache.children[block] > gone.of(block)) {
                parked[block] = 1;
                continue;
            }
            live[block].number = 0;
            num_live--;
            evicted.push_back(block);
            num--;
            if (i64 parent = cache.has_parent(block)) {
                gone.add(parent);
                if (parent < (i64)parked.size() && parked[parent] && cache.children[parent] <= gone.of(parent)) {
                    parked[parent] = 0;
                    push(live[parent]);
                }
            }
        }
    }

  private:
    void push(const Entry& entry) {
        heap.push_back(entry);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
};
