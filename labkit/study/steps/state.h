// Requests, rows, queue and pending prefixes, and how a request is preempted; as in state.py, pending.py and preempt.py.

#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>

#include "asking.h"
#include "blocks.h"

enum Limit : i64 { NOTHING, BUDGET, BLOCKS, ROWS, PENDING, POLICY };
constexpr i64 NEVER = INT64_MAX;

struct Settings {  // in the order of `SETTINGS` in native.py
    i64 num_blocks, block_size, num_rows, first_row, max_seqs, budget, max_chunk, chunked, watermark, prefix_hold, caching, vocab,
        room, max_waiting, look_every, by_priority, by_size, asks;
    double prefill_share;
    Digest root;
};

struct Request {
    double at;  // seconds, unrounded
    i64 due, order, arrival, index, num_prompt, limit, priority, awaited;
    i64 serial = 0, row = -1, num_cached = 0, admitted = -1, first = -1, end = -1, preemptions = 0, key_a = 0, key_b = 0;
    u64 key = 0;
    std::vector<i32> tokens;  // while it waits
    std::vector<Digest> hashes;
    i64 cached = 0;  // tokens that would hit, when an order asked last
    bool hashed = false;

    Request(double at, const i64* c)
        : at(at), due(c[0]), order(c[1]), arrival(c[2]), index(c[3]), num_prompt(c[4]), limit(c[5]), priority(c[6]),
          awaited(c[7]) {}
};

struct Ended {  // in the order of `ENDED` in native.py
    i64 index, arrival, admitted, first, end, num_prompt, num_cached, num_output, preemptions;
};

struct Point {
    i64 now, step, queried, hit, output, used, waiting, running;
};

struct Chunk {
    i64 row, start, count, gap;
};

struct Row {
    Request* request = nullptr;
    std::vector<Digest> known, pending;  // hashes of its prompt; those that it has yet to store
    size_t stored = 0;                   // of `pending`
    Digest last;
    i64 held = NOTHING, chunk = 0;
};

struct Later {
    bool operator()(const Request* a, const Request* b) const {
        return std::tie(a->at, a->due, a->order) < std::tie(b->at, b->due, b->order);
    }
};

using Place = std::tuple<i64, i64, i64>;
const u64 MIX[3] = {0xBF58476D1CE4E5B9ull, 0x94D049BB133111EBull, 0x9E3779B97F4A7C15ull};

class State : public Asking {
  public:
    Settings s;
    Blocks blocks;
    Arrays& a;
    i32 *table = nullptr, *tokens = nullptr;
    i64 table_width = 0, tokens_width = 0, needed_width = 0;
    std::string before, behind;  // of a request's index, in the text that its tokens follow from

    std::vector<Row> rows;
    std::vector<i64> free_rows, decoding, prefilling, leaves;
    std::map<Place, Request*> queue;  // with policies by serial, and Python knows the order
    std::set<Request*, Later> upcoming;
    Map pending_row;
    std::unordered_map<Digest, std::vector<Request*>, DigestHash> parked;
    i64 stream = 0, exhausted = 0;  // requests of the stream among `upcoming`; whether no more will come

    i64 now = 0, step = 0, head = -1, budget = 0, num_parked = 0, num_submitted = 0, num_finished = 0, num_rejected = 0, num_preempted = 0;
    i64 num_queries = 0, num_hit_queries = 0, queried = 0, hit_tokens = 0, num_output = 0, num_prompt = 0, marked = 0, num_rows = 0;
    i64 most_used = 0, placed = 0, head_index = -1, head_limit = NOTHING, blocked_serial = -1, blocked_available = 0, blocked_missing = 0;
    Digest blocked_hash{};
    double busy = 0, used_time = 0, waiting_time = 0;
    bool preempted = false, passed_before = false;

    std::vector<Chunk> chunks;
    std::vector<size_t> cut;
    std::vector<i64> done;
    std::vector<Ended> ended;
    std::vector<Point> points;
    std::vector<std::vector<i32>> answers;  // of awaited requests, prompt first
    std::vector<i64> answered;              // their places in `ended`

    State(const Settings& settings, const Arrays& arrays)
        : s(settings), blocks(arrays, settings.num_blocks, settings.block_size), a(blocks.a), rows(settings.num_rows) {
        for (i64 row = s.num_rows - 1; row >= s.first_row; row--) free_rows.push_back(row);
    }

    ~State() {
        for (Request* request : upcoming) delete request;
        for (auto& entry : queue) delete entry.second;
        for (auto& entry : parked)
            for (Request* request : entry.second) delete request;
        for (Row& row : rows) delete row.request;
    }

    void show() override {
        *board = {now, step, budget, (i64)decoding.size(), (i64)prefilling.size(), (i64)free_rows.size(),
                  blocks.available(), num_waiting(), (i64)decoding.data(), (i64)prefilling.data()};
    }

    i64 num_running() const { return (i64)(decoding.size() + prefilling.size()); }
    i64 num_waiting() const { return (i64)queue.size() + num_parked; }

    // -- requests -----------------------------------------------------------------------------------------------------

    void submit(Request* request) {
        bool rejected = request->limit > s.room || (s.max_waiting >= 0 && num_waiting() + 1 > s.max_waiting);
        if (s.asks) head = ask(SUBMIT, request->index, rejected);
        request->serial = ++num_submitted;
        num_prompt += request->num_prompt;
        if (rejected) {
            num_rejected++;
            delete request;
            return;
        }
        request->key_a = s.by_priority ? request->priority : s.by_size ? request->limit : request->arrival;
        request->key_b = s.by_priority ? request->arrival : 0;
        u64 key = 1469598103934665603ull;
        for (unsigned char byte : before + std::to_string(request->index) + behind) key = (key ^ byte) * 1099511628211ull;
        request->key = key;
        queue[place_of(request)] = request;
        widen(request->num_prompt);
    }

    Place place_of(const Request* r) const { return s.asks ? Place{0, 0, r->serial} : Place{r->key_a, r->key_b, r->serial}; }

    void push(Request* request) {
        queue[place_of(request)] = request;
        if (s.asks) head = ask(PUSH, request->serial);
    }

    Request* next() { return s.asks ? queue.at({0, 0, head}) : queue.begin()->second; }

    // The next of the queue leaves it; Python takes it off its queue when it is told where to.
    void pop(const Request* request) { queue.erase(place_of(request)); }

    // Hashes of its full blocks, computed once and kept until it has a row
    const std::vector<Digest>& hashes_of(Request* request) {
        if (s.caching && !request->hashed) {
            request->hashes.resize(request->tokens.size() / s.block_size);
            for (size_t i = 0; i < request->hashes.size(); i++)
                request->hashes[i] =
                    blocks.hash(i ? request->hashes[i - 1] : s.root, request->tokens.data() + i * s.block_size);
            request->hashed = true;
            placed = 1;
        }
        return request->hashes;
    }

    void widen(i64 length) {
        if (length + 2 > needed_width) needed_width = length + 2;
    }

    i64 width() const { return (needed_width / s.block_size + 2) * s.block_size; }

    void append(i64 row, i32 block) {
        table[row * table_width + a.num_blocks[row]++] = block;
        a.room[row] += s.block_size;
    }

    bool senior(i64 one, i64 other) const {
        const i64* rank = a.rank;
        for (i64 column = 0; column < 3; column++, rank += s.num_rows)
            if (rank[one] != rank[other]) return rank[one] < rank[other];
        return false;
    }

    i64 victim() {
        std::vector<i64> all = decoding;
        all.insert(all.end(), prefilling.begin(), prefilling.end());
        return victim_of(all);
    }

    // The row to preempt, of these
    i64 victim_of(const std::vector<i64>& all) {
        if (s.asks & OF_VICTIM) return ask(VICTIM, (i64)all.data(), (i64)all.size());
        return *std::max_element(all.begin(), all.end(), [&](i64 one, i64 other) { return senior(one, other); });
    }

    void preempt(i64 row) {
        Request* request = rows[row].request;
        if (s.asks) ask(PREEMPT, row);
        request->preemptions++;
        num_preempted++;
        remove_row(row);
        forget_pending(row);
        const i32* known = tokens + row * tokens_width;
        request->tokens.assign(known, known + a.num_tokens[row]);
        request->hashed = false;
        close_row(row);
        push(request);
    }

    void remove_row(i64 row) {
        for (auto* all : {&decoding, &prefilling})
            for (size_t i = 0; i < all->size(); i++)
                if ((*all)[i] == row) {
                    all->erase(all->begin() + i);
                    return;
                }
    }

    void close_row(i64 row) {
        blocks.release(table + row * table_width, a.num_blocks[row]);
        a.num_blocks[row] = a.room[row] = a.num_tokens[row] = a.num_computed[row] = 0;
        Row& one = rows[row];
        one.request->row = -1;
        one.request = nullptr;
        one.known.clear();
        one.held = NOTHING;
        one.chunk = 0;
        leaves.push_back(row);
        free_rows.push_back(row);
    }

    void settle_pending(i64 row, i64 num_left) {
        Row& one = rows[row];
        i64 num_done = (i64)(one.pending.size() - one.stored) - num_left;
        for (; num_done > 0; num_done--) {
            const Digest& digest = one.pending[one.stored++];
            pending_row.erase(digest);
            if (parked.empty()) continue;
            auto at = parked.find(digest);
            if (at == parked.end()) continue;
            for (Request* request : at->second) {
                num_parked--;
                push(request);
            }
            parked.erase(at);
        }
    }

    void forget_pending(i64 row) { settle_pending(row, 0); }

    // -- of the step under way ----------------------------------------------------------------------------------------

    std::vector<i64> scratch, full, of_step, planned;  // `planned`: decode rows that compute a token in this step
    std::vector<i32> hit;
    size_t num_decode = 0;
    i64 num_joined = 0;
};
