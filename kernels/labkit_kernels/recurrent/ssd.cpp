// The scan of Mamba 2 on a CPU.
//
// A few tokens of a sequence are bound by reading and writing its state, 32 KB a head of 64 x 128: one pass decays it, adds
// the input and takes the sums. Many tokens are bound by arithmetic, two multiply-adds for each number of the state and
// token, which the chunked form does not save. Two vectors of the head's numbers, transposed, stay in L1 for a chunk of
// tokens, and each pass serves two tokens. As in delta.cpp the chunk's decays are divided out of what is added.

#include "sequences.h"

namespace {

using namespace labkit;

constexpr int VECTORS = 2;                  // of a head's numbers that are taken at once
constexpr int COLUMNS = VECTORS * W;
constexpr int64_t CHUNK = 32;               // tokens, an even number
constexpr float LEAST = 1e-12f;             // the smallest decay within a chunk
constexpr int64_t AHEAD = 32;               // rows that are fetched in advance: four rows at once defeat the hardware

struct Call {
    const void *x, *b, *c;
    const float *dt, *a, *d, *dt_bias;  // d and dt_bias may be null
    float* state;
    void* out;
    Sequences sequences;
    int64_t x_token, x_head, dt_token, b_token, b_group, c_token, c_group;
    int64_t groups, heads, size, states;
    float least, most;
    bool softplus;
};

template <class T>
struct Head {
    const Call& call;
    int64_t head;

    const T* x(int64_t token) const { return at(call.x, token * call.x_token + head * call.x_head); }
    const T* b(int64_t token) const { return at(call.b, token * call.b_token + group() * call.b_group); }
    const T* c(int64_t token) const { return at(call.c, token * call.c_token + group() * call.c_group); }
    T* out(int64_t token) const { return static_cast<T*>(call.out) + (token * call.heads + head) * call.size; }
    float skip() const { return call.d ? call.d[head] : 0.f; }
    int64_t group() const { return head / (call.heads / call.groups); }
    static const T* at(const void* tensor, int64_t offset) { return static_cast<const T*>(tensor) + offset; }

    // Step sizes and logarithms of decays of `count` tokens; room for whole vectors.
    void steps(int64_t begin, int64_t count, float* dt, float* decay) const {
        const float bias = call.dt_bias ? call.dt_bias[head] : 0.f;
        for (int64_t i = 0; i < whole_vectors(count); i++)
            dt[i] = i < count ? call.dt[(begin + i) * call.dt_token + head] + bias : 0.f;
        for (int64_t i = 0; i < count; i += W) {
            vf y = load(dt + i);
            if (call.softplus) y = softplusv(y);
            y = min(max(y, splat(call.least)), splat(call.most));
            store(dt + i, y);
            store(decay + i, expv(y * call.a[head]));
        }
    }
};

// -- few tokens: the state where it lies -----------------------------------------------------------------------------

template <int Rows, bool Zeros>
void change_rows(float* s, int64_t states, float decay, const float* x, const float* b, const float* c, float* y) {
    vf in[Rows], sum[Rows];
    for (int r = 0; r < Rows; r++) {
        in[r] = splat(x[r]);
        sum[r] = vf{};
    }
    for (int64_t n = 0; n < states; n += W) {
        if (!Zeros)
            for (int i = 0; i < Rows * W; i += LINE / 4) __builtin_prefetch(s + AHEAD * states + n * Rows + i, 0, 2);
        const vf from = load(b + n), to = load(c + n);
        for (int r = 0; r < Rows; r++) {
            float* at = s + r * states + n;
            const vf next = Zeros ? in[r] * from : load(at) * decay + in[r] * from;
            store(at, next);
            sum[r] += next * to;
        }
    }
    for (int r = 0; r < Rows; r++) y[r] = reduce_sum(sum[r]);
}

template <class T>
void in_place(const Head<T>& head, int64_t token, float* s, bool zeros, Buffer& buffer) {
    const int64_t size = head.call.size, states = head.call.states;
    float* x = buffer.fit<float>(3 * size + 2 * states);
    float *scaled = x + size, *y = scaled + size, *b = y + size, *c = b + states;
    float dt[W], decay[W];
    head.steps(token, 1, dt, decay);
    widen(x, head.x(token), size);
    widen(b, head.b(token), states);
    widen(c, head.c(token), states);
    for (int64_t p = 0; p < size; p++) scaled[p] = dt[0] * x[p];
    auto rows = [&](auto many, int64_t p) {
        zeros ? change_rows<many, true>(s + p * states, states, decay[0], scaled + p, b, c, y + p)
              : change_rows<many, false>(s + p * states, states, decay[0], scaled + p, b, c, y + p);
    };
    int64_t p = 0;
    for (; p + 4 <= size; p += 4) rows(std::integral_constant<int, 4>{}, p);
    for (; p < size; p++) rows(std::integral_constant<int, 1>{}, p);
    const float skip = head.skip();
    for (int64_t i = 0; i < size; i++) y[i] += skip * x[i];
    narrow(head.out(token), y, size);
}

// -- many tokens: blocks of a head's numbers in L1 -------------------------------------------------------------------

struct Chunk {
    int64_t states, count;
    float scale = 1.f, running = 1.f;   // decays between two chunks, and since the chunk began
    float dt[CHUNK + W], decay[CHUNK + W], since[CHUNK];
    float *b, *c;                       // [CHUNK][states]

    // Takes tokens from `begin` on, at most up to `last`.
    template <class T>
    void take(const Head<T>& head, int64_t begin, int64_t last) {
        const int64_t most = std::min(last - begin, CHUNK);
        head.steps(begin, most, dt, decay);
        scale = running * decay[0];  // up to the chunk's first token, which its own decay precedes
        running = 1.f;
        for (count = 0; count < most; count++) {
            if (count > 0) {
                if (!(running * decay[count] > LEAST)) return;
                running *= decay[count];
            }
            since[count] = running;
            const int64_t token = begin + count;
            if (token + CHUNK < last) {
                fetch<0>(head.b(token + CHUNK), states);
                fetch<0>(head.c(token + CHUNK), states);
            }
            fetch<0>(head.x(token), head.call.size);
            fetch<1>(head.out(token), head.call.size);
            widen(b + count * states, head.b(token), states);
            widen(c + count * states, head.c(token), states);
        }
    }
};

// One pass over a block [states][COLUMNS] for `Tokens` tokens: adds x b^T and takes the sums with c of each.
template <int Tokens>
void pass(float* s, int64_t states, const float* b, const float* c, const float* inputs, float* sums) {
    vf x[Tokens][VECTORS], y[Tokens][VECTORS]{};
    for (int t = 0; t < Tokens; t++)
        for (int v = 0; v < VECTORS; v++) x[t][v] = load(inputs + t * COLUMNS + v * W);
    for (int64_t n = 0; n < states; n++, s += COLUMNS) {
        vf z[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) z[v] = load(s + v * W);
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; t++) {
            const vf from = splat(b[t * states + n]), to = splat(c[t * states + n]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                z[v] += x[t][v] * from;
                y[t][v] += z[v] * to;
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) store(s + v * W, z[v]);
    }
    for (int t = 0; t < Tokens; t++)
        for (int v = 0; v < VECTORS; v++) store(sums + t * COLUMNS + v * W, y[t][v]);
}

// The head's numbers [first, first + count) of a chunk's tokens.
template <class T>
void columns_of(const Head<T>& head, const Chunk& chunk, int64_t begin, float* s, int64_t first, int64_t count) {
    const int64_t states = chunk.states;
    alignas(64) float x[CHUNK * COLUMNS], in[CHUNK * COLUMNS], y[CHUNK * COLUMNS];
    for (int64_t i = 0; i < chunk.count; i++) {
        float* to = x + i * COLUMNS;
        widen(to, head.x(begin + i) + first, count);
        std::fill(to + count, to + COLUMNS, 0.f);
        const float by = chunk.dt[i] / chunk.since[i];
        for (int v = 0; v < COLUMNS; v += W) store(in + i * COLUMNS + v, load(to + v) * by);
    }
    if (chunk.scale != 1.f)
        for (int64_t n = 0; n < states * COLUMNS; n += W) store(s + n, load(s + n) * chunk.scale);
    int64_t i = 0;
    for (; i + 2 <= chunk.count; i += 2)
        pass<2>(s, states, chunk.b + i * states, chunk.c + i * states, in + i * COLUMNS, y + i * COLUMNS);
    if (i < chunk.count)
        pass<1>(s, states, chunk.b + i * states, chunk.c + i * states, in + i * COLUMNS, y + i * COLUMNS);
    const float skip = head.skip();
    for (i = 0; i < chunk.count; i++) {
        float* at = y + i * COLUMNS;
        for (int v = 0; v < COLUMNS; v += W)
            store(at + v, load(at + v) * chunk.since[i] + load(x + i * COLUMNS + v) * skip);
        narrow(head.out(begin + i) + first, at, count);
    }
}

// [rows][columns] -> [columns][rows of `wide`], which is zero beyond `rows`.
void transpose_in(const float* from, int64_t rows, int64_t columns, float* to, float* wide_end) {
    std::fill(to, wide_end, 0.f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * COLUMNS + r] = from[r * columns + c];
}

template <class T>
void in_blocks(const Head<T>& head, int64_t begin, int64_t end, float* state, bool zeros, Buffer& buffer) {
    const int64_t size = head.call.size, states = head.call.states, block = states * COLUMNS;
    const int64_t blocks = parts(size, COLUMNS);
    float* s = buffer.fit<float>(blocks * block + 2 * CHUNK * states);
    Chunk chunk;
    chunk.states = states;
    chunk.b = s + blocks * block;
    chunk.c = chunk.b + CHUNK * states;
    auto count = [&](int64_t p) { return std::min<int64_t>(COLUMNS, size - p * COLUMNS); };
    for (int64_t p = 0; p < blocks; p++)
        transpose_in(state + p * block, zeros ? 0 : count(p), states, s + p * block, s + (p + 1) * block);
    for (int64_t t = begin; t < end; t += chunk.count) {
        chunk.take(head, t, end);
        for (int64_t p = 0; p < blocks; p++)
            columns_of(head, chunk, t, s + p * block, p * COLUMNS, count(p));
    }
    if (state == nullptr) return;
    for (int64_t p = 0; p < blocks; p++)
        for (int64_t r = 0; r < count(p); r++)
            for (int64_t n = 0; n < states; n++)
                state[p * block + r * states + n] = s[p * block + n * COLUMNS + r] * chunk.running;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16; strides in elements, of tokens and of heads or groups
extern "C" void ssd(const void* x, const void* dt, const void* a, const void* b, const void* c, const void* d,
                    const void* dt_bias, void* state, void* out, const void* query_start, const void* slot,
                    const void* fresh, int64_t count, int64_t x_token, int64_t x_head, int64_t dt_token,
                    int64_t b_token, int64_t b_group, int64_t c_token, int64_t c_group, int64_t groups, int64_t heads,
                    int64_t size, int64_t states, double least, double most, int softplus, int dtype, int threads) {
    auto floats = [](const void* at) { return static_cast<const float*>(at); };
    const Call call{x, b, c, floats(dt), floats(a), floats(d), floats(dt_bias), static_cast<float*>(state), out,
                    {static_cast<const int32_t*>(query_start), static_cast<const int32_t*>(slot),
                     static_cast<const uint8_t*>(fresh), count},
                    x_token, x_head, dt_token, b_token, b_group, c_token, c_group, groups, heads, size, states,
                    static_cast<float>(least), static_cast<float>(most), softplus != 0};
    const int64_t each = call.size * call.states;
    dtype == 0 ? each_head<Head<float>>(call, each, call.states, threads)
               : each_head<Head<bf16>>(call, each, call.states, threads);
}

LABKIT_REPEATABLE(ssd)
