// The scan of Mamba 1 on a CPU: bound by an exponential for each number of the state and token. Vectors run along the
// channels, so the sums over the state need no reduction, and the decays and states of a block of channels are
// transposed once for all tokens of all sequences, and stay in L1.

#include "sequences.h"

namespace {

using namespace labkit;

constexpr int VECTORS = 2;
constexpr int COLUMNS = VECTORS * W;        // channels of a block
constexpr int64_t AHEAD = 4;                // tokens that are fetched in advance
constexpr int64_t LEAST_WORK = 1 << 14;     // numbers of states times tokens for which another thread is woken

struct Call {
    const void *x, *b, *c, *gate;
    const float *dt, *a, *d, *dt_bias;  // gate, d and dt_bias may be null
    float* state;
    void* out;
    Sequences sequences;
    int64_t x_token, dt_token, b_token, c_token, gate_token, channels, states;
    bool softplus;
};

// [count][columns] -> [columns][COLUMNS], and back; numbers beyond `count` are left alone.
void transpose_in(const float* from, int64_t count, int64_t columns, float* to) {
    int64_t r = 0;
    for (; r + W <= count; r += W) {
        int64_t c = 0;
        for (; c + W <= columns; c += W) {
            vf rows[W];
            for (int i = 0; i < W; i++) rows[i] = load(from + (r + i) * columns + c);
            transpose(rows);
            for (int i = 0; i < W; i++) store(to + (c + i) * COLUMNS + r, rows[i]);
        }
        for (; c < columns; c++)
            for (int i = 0; i < W; i++) to[c * COLUMNS + r + i] = from[(r + i) * columns + c];
    }
    for (; r < count; r++)
        for (int64_t c = 0; c < columns; c++) to[c * COLUMNS + r] = from[r * columns + c];
}

void transpose_out(const float* from, int64_t count, int64_t columns, float* to) {
    int64_t r = 0;
    for (; r + W <= count; r += W) {
        int64_t c = 0;
        for (; c + W <= columns; c += W) {
            vf rows[W];
            for (int i = 0; i < W; i++) rows[i] = load(from + (c + i) * COLUMNS + r);
            transpose(rows);
            for (int i = 0; i < W; i++) store(to + (r + i) * columns + c, rows[i]);
        }
        for (; c < columns; c++)
            for (int i = 0; i < W; i++) to[(r + i) * columns + c] = from[c * COLUMNS + r + i];
    }
    for (; r < count; r++)
        for (int64_t c = 0; c < columns; c++) to[r * columns + c] = from[c * COLUMNS + r];
}

template <class T>
void some(float* to, const T* from, int64_t count) {  // `count` numbers, and zeros up to a block
    widen(to, from, count);
    std::fill(to + count, to + COLUMNS, 0.f);
}

// One token of a block: decays and changes the state, and gives the sums.
void token(float* s, const float* a, const float* b, const float* c, int64_t states, const vf (&dt)[VECTORS],
           const vf (&x)[VECTORS], vf (&y)[VECTORS]) {
    vf in[VECTORS], sum[VECTORS]{};
    for (int v = 0; v < VECTORS; v++) in[v] = dt[v] * x[v];
    for (int64_t n = 0; n < states; n++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            float* at = s + n * COLUMNS + v * W;
            const vf next = load(at) * exp2v(dt[v] * load(a + n * COLUMNS + v * W)) + in[v] * b[n];
            store(at, next);
            sum[v] += next * c[n];
        }
    for (int v = 0; v < VECTORS; v++) y[v] = sum[v];
}

template <class T>
void block(const Call& call, int64_t first, Buffer& buffer) {
    const int64_t states = call.states, count = std::min<int64_t>(COLUMNS, call.channels - first);
    float* a = buffer.fit<float>(2 * states * COLUMNS + 2 * states);
    float *s = a + states * COLUMNS, *b = s + states * COLUMNS, *c = b + states;
    float bias[COLUMNS] = {}, skip[COLUMNS] = {};
    std::fill_n(a, states * COLUMNS, 0.f);
    transpose_in(call.a + first * states, count, states, a);
    for (int64_t i = 0; i < states * COLUMNS; i += W) store(a + i, load(a + i) * gates::LOG2E);
    if (call.dt_bias) std::copy_n(call.dt_bias + first, count, bias);
    if (call.d) std::copy_n(call.d + first, count, skip);

    const int64_t last = call.sequences.query_start[call.sequences.count];
    for (int64_t i = 0; i < call.sequences.count; i++) {
        const int64_t begin = call.sequences.begin(i), end = begin + call.sequences.tokens(i);
        if (begin >= end) continue;
        const int64_t slot = call.sequences.slot[i];
        float* state = slot < 0 ? nullptr : call.state + (slot * call.channels + first) * states;
        if (call.sequences.starts_from_zeros(i) || count < COLUMNS) std::fill_n(s, states * COLUMNS, 0.f);
        if (!call.sequences.starts_from_zeros(i)) transpose_in(state, count, states, s);
        if (i + 1 < call.sequences.count && call.sequences.slot[i + 1] >= 0)
            fetch<0>(call.state + (call.sequences.slot[i + 1] * call.channels + first) * states, count * states);
        for (int64_t t = begin; t < end; t++) {
            if (const int64_t next = t + AHEAD; next < last) {
                fetch<0>(static_cast<const T*>(call.x) + next * call.x_token + first, count);
                fetch<0>(call.dt + next * call.dt_token + first, count);
                if (call.gate) fetch<0>(static_cast<const T*>(call.gate) + next * call.gate_token + first, count);
                fetch<1>(static_cast<T*>(call.out) + next * call.channels + first, count);
            }
            float x[COLUMNS], step[COLUMNS], gate[COLUMNS], out[COLUMNS];
            vf xs[VECTORS], dt[VECTORS], y[VECTORS];
            some(x, static_cast<const T*>(call.x) + t * call.x_token + first, count);
            some(step, call.dt + t * call.dt_token + first, count);
            widen(b, static_cast<const T*>(call.b) + t * call.b_token, states);
            widen(c, static_cast<const T*>(call.c) + t * call.c_token, states);
            if (call.gate) some(gate, static_cast<const T*>(call.gate) + t * call.gate_token + first, count);
            for (int v = 0; v < VECTORS; v++) {
                xs[v] = load(x + v * W);
                dt[v] = load(step + v * W) + load(bias + v * W);
                if (call.softplus) dt[v] = softplusv(dt[v]);
            }
            token(s, a, b, c, states, dt, xs, y);
            for (int v = 0; v < VECTORS; v++) {
                y[v] += xs[v] * load(skip + v * W);
                if (call.gate) y[v] *= gates::Silu::of(load(gate + v * W));
                store(out + v * W, y[v]);
            }
            narrow(static_cast<T*>(call.out) + t * call.channels + first, out, count);
        }
        if (state) transpose_out(s, count, states, state);
    }
}

template <class T>
void all(const Call& call, int threads) {
    const int64_t tokens = call.sequences.count ? call.sequences.query_start[call.sequences.count] : 0;
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (threads > 1 && tokens * call.channels * call.states >= LEAST_WORK)
    for (int64_t first = 0; first < call.channels; first += COLUMNS) {
        static thread_local Buffer buffer;
        block<T>(call, first, buffer);
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16; strides of tokens, in elements
extern "C" void selective_scan(const void* x, const void* dt, const void* a, const void* b, const void* c, const void* d,
                               const void* dt_bias, const void* gate, void* state, void* out, const void* query_start,
                               const void* slot, const void* fresh, int64_t count, int64_t x_token, int64_t dt_token,
                               int64_t b_token, int64_t c_token, int64_t gate_token, int64_t channels, int64_t states,
                               int softplus, int dtype, int threads) {
    auto floats = [](const void* at) { return static_cast<const float*>(at); };
    const Call call{x, b, c, gate, floats(dt), floats(a), floats(d), floats(dt_bias), static_cast<float*>(state), out,
                    {static_cast<const int32_t*>(query_start), static_cast<const int32_t*>(slot),
                     static_cast<const uint8_t*>(fresh), count},
                    x_token, dt_token, b_token, c_token, gate_token, channels, states, softplus != 0};
    dtype == 0 ? all<float>(call, threads) : all<bf16>(call, threads);
}

LABKIT_REPEATABLE(selective_scan)
