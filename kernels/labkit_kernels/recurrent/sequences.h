// The sequences of a step, as in sequences.py, and what the recurrent layers share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../gates.h"
#include "../memory.h"
#include "../repeat.h"
#include "../simd.h"
#include "../threads.h"

namespace labkit {

struct Sequences {
    const int32_t *query_start, *slot;
    const uint8_t* fresh;  // or null
    int64_t count;

    int64_t begin(int64_t i) const { return query_start[i]; }
    int64_t tokens(int64_t i) const { return query_start[i + 1] - query_start[i]; }
    bool starts_from_zeros(int64_t i) const { return slot[i] < 0 || (fresh && fresh[i]); }
};

inline void widen(float* to, const float* from, int64_t count) { std::copy_n(from, count, to); }
inline void widen(float* to, const bf16* from, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = to_float(from[i]);
}

template <class T>
inline void narrow(T* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    for (; i < count; i++) from_float(to + i, from[i]);
}

// A row of another token lies in another page, where the hardware fetches nothing in advance.
template <int Write, class T>
void fetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += LINE / sizeof(T)) __builtin_prefetch(row + i, Write, 2);
}

inline int64_t whole_vectors(int64_t count) { return parts(count, W) * W; }

inline vf expv(vf x) { return exp2v(x * gates::LOG2E); }

// log(1 + e^x), with a small relative error also where it is tiny.
inline vf softplusv(vf x) {
    const vf e = expv(min(x, splat(20.f))), u = e + 1.f, rest = u - 1.f;
    const vf y = rest == 0.f ? e : logv(u) * (e / (rest == 0.f ? splat(1.f) : rest));
    return x > 20.f ? x : y;
}

constexpr int64_t FEW = 2;               // tokens up to which a state is changed where it lies
constexpr int64_t LEAST_WORK = 1 << 15;  // numbers of states times tokens for which another thread is woken

// Every head of every sequence: a few tokens change the state where it lies, whose rows have `columns` numbers, more go
// through blocks of it. `each` is the numbers of a head's state. in_place and in_blocks are found by the type of head.
template <class Head, class Call>
void each_head(const Call& call, int64_t each, int64_t columns, int threads) {
    const Sequences& sequences = call.sequences;
    const int64_t tokens = sequences.count ? sequences.query_start[sequences.count] : 0;
    const int64_t units = sequences.count * call.heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) \
    if (threads > 1 && tokens * call.heads * each >= LEAST_WORK)
    for (int64_t unit = 0; unit < units; unit++) {
        static thread_local Buffer buffer;
        const int64_t i = unit / call.heads, begin = sequences.begin(i), count = sequences.tokens(i);
        if (count <= 0) continue;
        const Head head{call, unit % call.heads};
        float* state = sequences.slot[i] < 0 ? nullptr : call.state + (sequences.slot[i] * call.heads + head.head) * each;
        const bool zeros = sequences.starts_from_zeros(i);
        if (count > FEW || columns % W || state == nullptr) {
            in_blocks(head, begin, begin + count, state, zeros, buffer);
            continue;
        }
        for (int64_t t = 0; t < count; t++) in_place(head, begin + t, state, zeros && t == 0, buffer);
    }
}

}  // namespace labkit
