// The gated delta rule on a CPU.
//
// A few tokens of a sequence are bound by reading and writing its state, 64 KB a head of 128 x 128. It is walked twice: once
// for what it holds for the key and for the query, once to change it, when it still is in L2.
//
// Many tokens are bound by arithmetic: three multiply-adds for each number of the state and token, which the chunked
// form with matrix products does not save either. So a block of 4 vectors of columns stays in L1 for a chunk of tokens, and
// one pass over it writes a token and reads for the next. The chunk's decays are not applied to the state but, inverted, to
// what is written: with A the decay since the chunk began, S = A S', S' += (k / A) delta^T, S^T q = S'^T (A q). A chunk
// ends where A becomes too small to divide by.

#include "sequences.h"

namespace {

using namespace labkit;

constexpr int VECTORS = 4;                  // of a block's columns
constexpr int COLUMNS = VECTORS * W;
constexpr int64_t CHUNK = 32;               // tokens
constexpr float LEAST = 1e-12f;             // the smallest decay within a chunk

struct Call {
    const void *q, *k, *v;
    const float *g, *beta;
    float* state;
    void* out;
    Sequences sequences;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int64_t key_heads, heads, key, value;
    float scale;
    bool normalize, channels;  // channels: a decay for each channel of the key
};

template <class T>
struct Head {
    const Call& call;
    int64_t head;

    const T* query(int64_t token) const { return at(call.q, token * call.q_token + from() * call.q_head); }
    const T* key(int64_t token) const { return at(call.k, token * call.k_token + from() * call.k_head); }
    const T* value(int64_t token) const { return at(call.v, token * call.v_token + head * call.v_head); }
    T* out(int64_t token) const {
        return static_cast<T*>(call.out) + (token * call.heads + head) * call.value;
    }
    float beta(int64_t token) const { return call.beta[token * call.heads + head]; }
    int64_t from() const { return head / (call.heads / call.key_heads); }
    static const T* at(const void* tensor, int64_t offset) { return static_cast<const T*>(tensor) + offset; }

    // The decay of each row; rows beyond the key's size stay.
    void decay(int64_t token, float* to) const {
        const int64_t n = call.key, i = token * call.heads + head;
        if (!call.channels) {
            std::fill_n(to, whole_vectors(n), std::exp(call.g[i]));
            return;
        }
        int64_t r = 0;
        for (; r + W <= n; r += W) store(to + r, expv(load(call.g + i * n + r)));
        for (; r < n; r++) to[r] = std::exp(call.g[i * n + r]);
    }
};

float dot(const float* a, const float* b, int64_t count) {  // of whole vectors
    vf sum{}, other{};
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        sum += load(a + i) * load(b + i);
        other += load(a + i + W) * load(b + i + W);
    }
    if (i < count) sum += load(a + i) * load(b + i);
    return reduce_sum(sum + other);
}

void times(float* x, float by, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) * by);
}

// A key or query as floats, of length 1 if asked, times `scale`; zeros up to a whole vector.
template <class T>
void vector_of(float* to, const T* from, int64_t count, bool normalize, float scale) {
    const int64_t whole = whole_vectors(count);
    std::fill(to + count, to + whole, 0.f);
    widen(to, from, count);
    const float length = normalize ? std::sqrt(dot(to, to, whole) + 1e-6f) : 1.f;
    if (normalize || scale != 1.f) times(to, scale / length, whole);
}

constexpr int64_t AHEAD = 32;  // rows that are fetched in advance, line after line: four rows at once defeat the hardware

// -- few tokens: the state where it lies -----------------------------------------------------------------------------

// held += S^T kept and read += S^T asked, `Rows` rows of whole vectors of columns.
template <int Rows>
void read_rows(const float* s, int64_t columns, const float* kept, const float* asked, float* held, float* read) {
    vf a[Rows], b[Rows];
    for (int r = 0; r < Rows; r++) {
        a[r] = splat(kept[r]);
        b[r] = splat(asked[r]);
    }
    for (int64_t c = 0; c < columns; c += W) {
        vf x = load(held + c), y = load(read + c);
        for (int i = 0; i < Rows * W; i += LINE / 4) __builtin_prefetch(s + AHEAD * columns + c * Rows + i, 0, 2);
        for (int r = 0; r < Rows; r++) {
            const vf z = load(s + r * columns + c);
            x += z * a[r];
            y += z * b[r];
        }
        store(held + c, x);
        store(read + c, y);
    }
}

template <int Rows, bool Zeros>
void write_rows(float* s, int64_t columns, const float* decay, const float* key, const float* delta) {
    vf a[Rows], b[Rows];
    for (int r = 0; r < Rows; r++) {
        a[r] = splat(decay[r]);
        b[r] = splat(key[r]);
    }
    for (int64_t c = 0; c < columns; c += W) {
        const vf d = load(delta + c);
        for (int r = 0; r < Rows; r++) {
            float* at = s + r * columns + c;
            store(at, Zeros ? b[r] * d : load(at) * a[r] + b[r] * d);
        }
    }
}

// f.rows<4>(row) and f.rows<1>(row) for all rows.
template <class F>
void by_rows(int64_t rows, const F& f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
    for (; r < rows; r++) f(std::integral_constant<int, 1>{}, r);
}

template <class T>
void in_place(const Head<T>& head, int64_t token, float* s, bool zeros, Buffer& buffer) {
    const Call& call = head.call;
    const int64_t rows = call.key, columns = call.value, deep = whole_vectors(rows);
    float* decay = buffer.fit<float>(5 * deep + 3 * columns);
    float *key = decay + deep, *query = key + deep, *kept = query + deep, *asked = kept + deep;
    float *held = asked + deep, *read = held + columns, *delta = read + columns;
    head.decay(token, decay);
    vector_of(key, head.key(token), rows, call.normalize, 1.f);
    vector_of(query, head.query(token), rows, call.normalize, call.scale);
    std::fill_n(held, 2 * columns, 0.f);
    if (!zeros) {
        for (int64_t r = 0; r < deep; r += W) {
            store(kept + r, load(key + r) * load(decay + r));
            store(asked + r, load(query + r) * load(decay + r));
        }
        by_rows(rows, [&](auto many, int64_t r) {
            read_rows<many>(s + r * columns, columns, kept + r, asked + r, held, read);
        });
    }
    const float beta = head.beta(token), same = dot(key, query, deep);
    const T* value = head.value(token);
    T* out = head.out(token);
    for (int64_t c = 0; c < columns; c += W) {
        const vf d = (load(value + c) - load(held + c)) * beta;
        store(delta + c, d);
        store(out + c, load(read + c) + d * same);
    }
    by_rows(rows, [&](auto many, int64_t r) {
        float* at = s + r * columns;
        zeros ? write_rows<many, true>(at, columns, decay + r, key + r, delta)
              : write_rows<many, false>(at, columns, decay + r, key + r, delta);
    });
}

// -- many tokens: blocks of columns in L1 ----------------------------------------------------------------------------

// What a chunk's tokens write and read, for all blocks of columns.
struct Chunk {
    int64_t deep;
    float *running, *scale, *next;      // [deep] decays: since the chunk began; between two chunks; of the next token
    float *written, *kept, *asked;      // [CHUNK][deep] k / A, A k, A q
    float same[CHUNK], beta[CHUNK];     // k . q
    int64_t count;

    static int64_t room(int64_t deep) { return (3 + 3 * CHUNK) * deep; }
    void at(float* memory, int64_t size) {
        deep = size;
        running = memory;
        scale = running + deep;
        next = scale + deep;
        written = next + deep;
        kept = written + CHUNK * deep;
        asked = kept + CHUNK * deep;
    }

    // Takes tokens from `begin` on, at most up to `last`.
    template <class T>
    void take(const Head<T>& head, int64_t begin, int64_t last) {
        head.decay(begin, next);
        for (int64_t r = 0; r < deep; r += W) {  // up to the chunk's first token, which its own decay precedes
            store(scale + r, load(running + r) * load(next + r));
            store(running + r, splat(1.f));
        }
        const int64_t end = std::min(last, begin + CHUNK);
        for (count = 0; begin + count < end; count++) {
            const int64_t token = begin + count;
            if (count > 0 && !forget(head, token)) return;
            if (token + CHUNK < last) {
                fetch<0>(head.key(token + CHUNK), head.call.key);
                fetch<0>(head.query(token + CHUNK), head.call.key);
            }
            fetch<0>(head.value(token), head.call.value);
            fetch<1>(head.out(token), head.call.value);
            float *w = written + count * deep, *k = kept + count * deep, *q = asked + count * deep;
            vector_of(k, head.key(token), head.call.key, head.call.normalize, 1.f);
            vector_of(q, head.query(token), head.call.key, head.call.normalize, head.call.scale);
            same[count] = dot(k, q, deep);
            beta[count] = head.beta(token);
            const vf inverse = splat(1.f / running[0]);
            for (int64_t r = 0; r < deep; r += W) {
                const vf a = load(running + r), x = load(k + r);
                store(w + r, head.call.channels ? x / a : x * inverse);
                store(k + r, x * a);
                store(q + r, load(q + r) * a);
            }
        }
    }

    // Multiplies the running decay with the token's; false if it would become too small.
    template <class T>
    bool forget(const Head<T>& head, int64_t token) {
        head.decay(token, next);
        vf least = splat(1.f);
        for (int64_t r = 0; r < deep; r += W) {
            store(next + r, load(next + r) * load(running + r));
            least = min(least, load(next + r));
        }
        if (!(-reduce_max(-least) > LEAST)) return false;
        std::swap(next, running);
        return true;
    }
};

struct Sums {
    vf held[VECTORS], read[VECTORS];
};

// One pass over a block [rows][COLUMNS]: adds written * delta, and takes the sums with `kept` and `asked`.
void write_and_read(float* s, int64_t rows, const float* written, const vf (&delta)[VECTORS], const float* kept,
                    const float* asked, Sums& sums) {
    vf d[VECTORS], held[VECTORS]{}, read[VECTORS]{};
    for (int v = 0; v < VECTORS; v++) d[v] = delta[v];
    for (int64_t r = 0; r < rows; r++, s += COLUMNS) {
        const vf w = splat(written[r]), k = splat(kept[r]), q = splat(asked[r]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const vf x = load(s + v * W) + w * d[v];
            store(s + v * W, x);
            held[v] += x * k;
            read[v] += x * q;
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        sums.held[v] = held[v];
        sums.read[v] = read[v];
    }
}

// The same before a chunk's first token: multiplies the rows with `scale`.
void scale_and_read(float* s, int64_t rows, const float* scale, const float* kept, const float* asked, Sums& sums) {
    vf held[VECTORS]{}, read[VECTORS]{};
    for (int64_t r = 0; r < rows; r++, s += COLUMNS) {
        const vf a = splat(scale[r]), k = splat(kept[r]), q = splat(asked[r]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const vf x = load(s + v * W) * a;
            store(s + v * W, x);
            held[v] += x * k;
            read[v] += x * q;
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        sums.held[v] = held[v];
        sums.read[v] = read[v];
    }
}

void write_only(float* s, int64_t rows, const float* written, const vf (&delta)[VECTORS]) {
    for (int64_t r = 0; r < rows; r++, s += COLUMNS) {
        const vf w = splat(written[r]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(s + v * W, load(s + v * W) + w * delta[v]);
    }
}

// Columns [first, first + count) of a chunk's tokens.
template <class T>
void columns_of(const Head<T>& head, const Chunk& chunk, int64_t begin, float* s, int64_t first, int64_t count) {
    const int64_t rows = head.call.key, deep = chunk.deep;
    Sums sums;
    scale_and_read(s, rows, chunk.scale, chunk.kept, chunk.asked, sums);
    for (int64_t i = 0; i < chunk.count; i++) {
        alignas(64) float value[COLUMNS], out[COLUMNS];
        vf delta[VECTORS];
        widen(value, head.value(begin + i) + first, count);
        std::fill(value + count, value + COLUMNS, 0.f);
        for (int v = 0; v < VECTORS; v++) {
            delta[v] = (load(value + v * W) - sums.held[v]) * chunk.beta[i];
            store(out + v * W, sums.read[v] + delta[v] * chunk.same[i]);
        }
        narrow(head.out(begin + i) + first, out, count);
        if (i + 1 < chunk.count)
            write_and_read(s, rows, chunk.written + i * deep, delta, chunk.kept + (i + 1) * deep,
                           chunk.asked + (i + 1) * deep, sums);
        else
            write_only(s, rows, chunk.written + i * deep, delta);
    }
}

template <class T>
void in_blocks(const Head<T>& head, int64_t begin, int64_t end, float* state, bool zeros, Buffer& buffer) {
    const int64_t rows = head.call.key, columns = head.call.value, deep = whole_vectors(rows);
    const int64_t blocks = parts(columns, COLUMNS), room = blocks * rows * COLUMNS;
    float* s = buffer.fit<float>(room + Chunk::room(deep));
    Chunk chunk;
    chunk.at(s + room, deep);
    std::fill_n(chunk.running, deep, 1.f);
    if (zeros || columns % COLUMNS) std::fill_n(s, room, 0.f);
    auto each_part = [&](auto&& copy) {
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t r = 0; r < rows; r++)
                copy(s + (b * rows + r) * COLUMNS, r, state + r * columns + b * COLUMNS,
                     std::min<int64_t>(COLUMNS, columns - b * COLUMNS));
    };
    if (!zeros) each_part([](float* own, int64_t, const float* from, int64_t n) { std::copy_n(from, n, own); });
    for (int64_t t = begin; t < end; t += chunk.count) {
        chunk.take(head, t, end);
        for (int64_t b = 0; b < blocks; b++)
            columns_of(head, chunk, t, s + b * rows * COLUMNS, b * COLUMNS,
                       std::min<int64_t>(COLUMNS, columns - b * COLUMNS));
    }
    if (state == nullptr) return;
    each_part([&](const float* own, int64_t r, float* to, int64_t n) {
        for (int64_t c = 0; c < n; c++) to[c] = own[c] * chunk.running[r];
    });
}

}  // namespace

// dtype: 0 float32, 1 bfloat16; strides in elements, of tokens and heads of q, k and v
extern "C" void gated_delta(const void* q, const void* k, const void* v, const void* g, const void* beta, void* state,
                            void* out, const void* query_start, const void* slot, const void* fresh, int64_t count,
                            int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token,
                            int64_t v_head, int64_t key_heads, int64_t heads, int64_t key, int64_t value, double scale,
                            int normalize, int channels, int dtype, int threads) {
    const Call call{q, k, v, static_cast<const float*>(g), static_cast<const float*>(beta), static_cast<float*>(state), out,
                    {static_cast<const int32_t*>(query_start), static_cast<const int32_t*>(slot),
                     static_cast<const uint8_t*>(fresh), count},
                    q_token, q_head, k_token, k_head, v_token, v_head, key_heads, heads, key, value,
                    static_cast<float>(scale), normalize != 0, channels != 0};
    const int64_t each = call.key * call.value;
    dtype == 0 ? each_head<Head<float>>(call, each, call.value, threads)
               : each_head<Head<bf16>>(call, each, call.value, threads);
}

LABKIT_REPEATABLE(gated_delta)
