// Whole simulations on a `Scheduler`: first come first served or by static keys, one group of layers, LRU.
//
// The scheduler's own modules are the reference. Each function in state.h, planning.h, committing.h and blocks.h does what
// the Python function of its name does, in the same order, on the same arrays; the tests compare everything that is left
// behind, and hand over to Python in the middle. Nothing is decided here that is not decided there. A decode row costs a
// few nanoseconds a step, so that all rows are simply visited.

#include <cmath>

#include "committing.h"

namespace {

enum Code : i64 { DONE, NEED, WIDEN, FULL, AWAITED, STOPPED, BROKEN, IDLE };
constexpr size_t MOST = 1024;  // ended requests and points kept until Python takes them

struct Prices {  // of a LinearCost, in the order of its fields
    double constant, token, context, block, row, pair, join, prefill;
    double num_first;  // bounds of first_tokens, and what each costs beyond per_token
    double bound[8], more[8];
};

// One rounding an operation, as in Python: no fused multiply-add.
double times(double one, double other) {
    volatile double product = one * other;
    return product;
}

struct Simulation {
    Steps steps;
    i64 taken = 0;  // steps, also those that had nothing to compute
    bool linear = false;
    Prices p{};
    double (*cost)(const i64*) = nullptr;
    std::vector<i64> ints;  // what is handed over
    std::vector<Digest> digests;

    Simulation(const Settings& settings, const Arrays& arrays) : steps(settings, arrays) {}

    // The fields of StepWork: decodes, prefill, context, prefill_context, pairs, chunks, sampled, joins, moved
    double seconds() const {
        i64 work[9] = {(i64)steps.num_decode, 0, 0, 0, 0, (i64)steps.chunks.size(), 0, steps.num_joined, 0};
        for (size_t i = 0; i < steps.num_decode; i++) work[2] += steps.a.scheduled[steps.planned[i]];
        for (const Chunk& chunk : steps.chunks) {
            work[1] += chunk.count;
            work[3] += chunk.start + chunk.count;
            work[4] += chunk.count * chunk.start + chunk.count * (chunk.count + 1) / 2;
        }
        work[6] = steps.num_decode + steps.done.size();
        if (!linear) return cost(work);
        double sum = p.constant + times(p.token, (double)(work[0] + work[1]));
        sum += times(p.context, (double)(work[2] + work[3]));
        sum += times(p.block, 0.0);
        sum += times(p.row, (double)(work[0] + work[5]));
        sum += times(p.pair, (double)work[4]);
        sum += times(p.join, (double)work[7]);
        sum += times(p.prefill, (double)(work[5] > 0));
        double tokens = (double)(work[0] + work[1]), begin = 0;
        for (size_t i = 0; i < (size_t)p.num_first; i++) {
            sum += times(p.more[i], std::min(std::max(tokens - begin, 0.0), p.bound[i] - begin));
            begin = p.bound[i];
        }
        return sum;
    }

    // Until `most_steps` were taken in all, or something is to be done in Python.
    Code run(i64 most_steps) {
        Steps& s = steps;
        while (true) {
            if (!s.answered.empty()) return AWAITED;
            if (s.ended.size() >= MOST || s.points.size() >= MOST) return FULL;
            while (true) {
                if (!s.stream && !s.exhausted) return NEED;
                if (s.upcoming.empty() || (*s.upcoming.begin())->arrival > s.now) break;
                Request* request = *s.upcoming.begin();
                s.upcoming.erase(s.upcoming.begin());
                s.stream -= !request->due;
                request->arrival = std::max(request->arrival, (i64)0);
                s.submit(request);
            }
            if (taken >= most_steps) return STOPPED;
            if (s.width() > s.tokens_width || s.width() > s.table_width * s.s.block_size) return WIDEN;
            taken++;
            if (!s.schedule()) {
                bool held = (s.s.asks & (OF_ADMISSION | OF_CHUNK | OF_STEP)) && s.num_running() + s.num_waiting();
                if (s.upcoming.empty()) return held ? IDLE : DONE;
                s.now = std::max(s.now, (*s.upcoming.begin())->arrival);
                continue;
            }
            double took = seconds();
            if (!(took >= 0)) return BROKEN;
            i64 began = s.now;
            s.now += (i64)std::nearbyint(times(took, 1e9));
            s.commit();
            s.look(began);
            if (!s.adds_up()) return BROKEN;
        }
    }

    void put(const Digest& digest) { digests.push_back(digest); }

    void put_request(const Request& r) {
        for (i64 number : {r.serial, r.index, r.arrival, r.priority, r.num_prompt, r.limit, r.num_cached, r.admitted,
                           r.first, r.preemptions, (i64)r.tokens.size()})
            ints.push_back(number);
        ints.insert(ints.end(), r.tokens.begin(), r.tokens.end());
    }

    template <class V>
    void put_all(const V& values) {
        ints.push_back((i64)values.size());
        ints.insert(ints.end(), values.begin(), values.end());
    }

    // Everything that Python keeps in lists and dicts, in the order in which `native.py` reads it.
    void hand_over() {
        Steps& s = steps;
        ints.clear();
        digests.clear();
        put_all(s.blocks.free);
        ints.push_back(s.blocks.lru.size);
        s.blocks.lru.each([&](i32 block) { ints.push_back(block); });
        ints.push_back((i64)s.blocks.spares.size());
        for (auto& entry : s.blocks.spares) {
            ints.push_back(s.blocks.block_of.get(entry.first));
            put_all(entry.second);
        }
        ints.push_back(s.blocks.ghosts.size());
        s.blocks.ghosts.each([&](const Digest& key, i64 step, i64 index) {
            put(key);
            ints.push_back(step);
            ints.push_back(index);
        });
        put_all(s.decoding);
        put_all(s.prefilling);
        put_all(s.free_rows);
        put_all(s.leaves);
        for (auto* all : {&s.decoding, &s.prefilling})
            for (i64 row : *all) {
                Row& one = s.rows[row];
                put_request(*one.request);
                put(one.last);
                ints.push_back(one.held);
                ints.push_back(one.chunk);
                ints.push_back((i64)one.known.size());
                for (const Digest& digest : one.known) put(digest);
                ints.push_back((i64)(one.pending.size() - one.stored));
                for (size_t i = one.stored; i < one.pending.size(); i++) put(one.pending[i]);
            }
        ints.push_back((i64)s.queue.size());
        for (auto& entry : s.queue) put_request(*entry.second);
        ints.push_back(s.num_parked);
        for (auto& entry : s.parked)
            for (Request* request : entry.second) {
                put_request(*request);
                put(entry.first);
            }
        ints.push_back((i64)s.upcoming.size());
        for (Request* request : s.upcoming) {
            put_request(*request);
            ints.push_back(request->due);
        }
        for (i64 number : {s.head_index, s.head_limit, s.blocked_serial, s.blocked_available, s.blocked_missing, s.placed})
            ints.push_back(number);
        put(s.blocked_hash);
    }
};

}  // namespace

extern "C" {

void steps_new(const Settings* settings, const Arrays* arrays, const char* before, const char* behind, Simulation** made) {
    *made = new Simulation(*settings, *arrays);
    (*made)->steps.before = before;
    (*made)->steps.behind = behind;
}

void steps_free(Simulation* one) { delete one; }

void steps_prices(Simulation* one, const double* prices, double (*cost)(const i64*)) {
    one->linear = prices != nullptr;
    if (prices) memcpy(&one->p, prices, sizeof(Prices));
    one->cost = cost;
}

void steps_tables(Simulation* one, i32* table, i64 table_width, i32* tokens, i64 tokens_width) {
    one->steps.table = table;
    one->steps.table_width = table_width;
    one->steps.tokens = tokens;
    one->steps.tokens_width = tokens_width;
}

// `columns` [requests, 8]: due, order, arrival (ns), index, prompt tokens, limit, priority, awaited
void steps_add(Simulation* one, i64 num, const double* at, const i64* columns, const i32* tokens, i64 exhausted) {
    Steps& s = one->steps;
    for (i64 i = 0; i < num; i++, columns += 8) {
        Request* request = new Request(at[i], columns);
        request->tokens.assign(tokens, tokens + request->num_prompt);
        tokens += request->num_prompt;
        s.stream += !request->due;
        s.upcoming.insert(request);
    }
    if (exhausted) s.exhausted = 1;
}

i64 steps_run(Simulation* one, i64 most_steps) {
    try {
        return one->run(most_steps);
    } catch (const AskingFailed&) {
        return BROKEN;
    }
}

void steps_asks(Simulation* one, i64 (*answer)(i64, i64, i64, i64), Board* board) {
    one->steps.answer = answer;
    one->steps.board = board;
}

// In the order of `NUMBERS` in native.py
void steps_numbers(Simulation* one, i64* numbers, double* times) {
    Steps& s = one->steps;
    i64 all[] = {s.now, s.step, s.num_submitted, s.num_finished, s.num_rejected, s.num_preempted, s.num_queries,
                 s.num_hit_queries, s.queried, s.hit_tokens, s.blocks.num_evicted, s.blocks.num_stored, s.num_prompt,
                 s.most_used, s.num_running(), s.num_waiting(), s.width(), (i64)s.ended.size(), (i64)s.points.size(),
                 (i64)s.answers.size(), s.stream, s.blocks.used(), s.num_rows};
    memcpy(numbers, all, sizeof(all));
    times[0] = s.busy;
    times[1] = s.used_time;
    times[2] = s.waiting_time;
}

void steps_take(Simulation* one, Ended* ended, Point* points, i64* answered, i64* lengths) {
    Steps& s = one->steps;
    std::copy(s.ended.begin(), s.ended.end(), ended);
    std::copy(s.points.begin(), s.points.end(), points);
    for (size_t i = 0; i < s.answers.size(); i++) {
        answered[i] = s.answered[i];
        lengths[i] = (i64)s.answers[i].size();
    }
    s.ended.clear();
    s.points.clear();
    s.answered.clear();
}

void steps_answers(Simulation* one, i32* tokens) {
    for (auto& answer : one->steps.answers) tokens = std::copy(answer.begin(), answer.end(), tokens);
    one->steps.answers.clear();
}

void steps_hand_over(Simulation* one, i64* num_ints, i64* num_digests) {
    one->hand_over();
    *num_ints = (i64)one->ints.size();
    *num_digests = (i64)one->digests.size();
}

void steps_handed_over(Simulation* one, i64* ints, Digest* digests) {
    std::copy(one->ints.begin(), one->ints.end(), ints);
    std::copy(one->digests.begin(), one->digests.end(), digests);
}
}
