// A depthwise causal convolution on a CPU: every channel's weighted sum of its last inputs. Bound by the exponential of
// the silu in long sequences and by the call itself in decode. Vectors run along the channels, so neither the inputs nor
// the state are transposed. Channels are taken in blocks whose rows stay in L1 until the last tap has read them.

#include "sequences.h"

namespace {

using namespace labkit;

constexpr int64_t BLOCK = 512;             // channels
constexpr int64_t LEAST_WORK = 1 << 14;    // numbers below which one thread is faster than waking another

struct Call {
    const void *x, *weight, *bias;
    void *state, *out;
    Sequences sequences;
    int64_t x_row, channels;
};

// One token: `rows` are its input and those before it, oldest first, each at the block's first channel.
template <int Width, bool Silu, class T>
void token(T* out, const T* const (&rows)[Width], const float* taps, const float* bias, int64_t count) {
    auto sum = [&](int64_t c, auto&& from) {
        vf y = load(bias + c);
        for (int i = 0; i < Width; i++) y += from(rows[i]) * load(taps + i * BLOCK + c);
        return Silu ? gates::Silu::of(y) : y;
    };
    int64_t c = 0;
    for (; c + W <= count; c += W) store(out + c, sum(c, [&](const T* row) { return load(row + c); }));
    if (c == count) return;
    float last[W];
    store(last, sum(c, [&](const T* row) {
        vf x{};
        for (int64_t i = c; i < count; i++) x[i - c] = to_float(row[i]);
        return x;
    }));
    for (int64_t i = c; i < count; i++) from_float(out + i, last[i - c]);
}

template <int Width, bool Silu, class T, class Weight>
void block(const Call& call, int64_t first) {
    const int64_t count = std::min(BLOCK, call.channels - first);
    alignas(64) float taps[Width * BLOCK], bias[BLOCK] = {};
    const Weight* weight = static_cast<const Weight*>(call.weight) + first * Width;
    for (int64_t c = 0; c < count; c++)
        for (int i = 0; i < Width; i++) taps[i * BLOCK + c] = to_float(weight[c * Width + i]);
    for (int64_t c = count; c < whole_vectors(count); c++)
        for (int i = 0; i < Width; i++) taps[i * BLOCK + c] = 0.f;
    if (call.bias) widen(bias, static_cast<const Weight*>(call.bias) + first, count);

    for (int64_t s = 0; s < call.sequences.count; s++) {
        const int64_t tokens = call.sequences.tokens(s), slot = call.sequences.slot[s];
        if (tokens <= 0) continue;
        const T* x = static_cast<const T*>(call.x) + call.sequences.begin(s) * call.x_row + first;
        T* out = static_cast<T*>(call.out) + call.sequences.begin(s) * call.channels + first;
        T* kept = slot < 0 ? nullptr : static_cast<T*>(call.state) + slot * (Width - 1) * call.channels + first;
        T past[Width - 1][BLOCK] = {};
        if (!call.sequences.starts_from_zeros(s))
            for (int i = 0; i < Width - 1; i++) std::copy_n(kept + i * call.channels, count, past[i]);
        auto row = [&](int64_t t) -> const T* { return t < 0 ? past[t + Width - 1] : x + t * call.x_row; };
        for (int64_t t = 0; t < tokens; t++) {
            const T* rows[Width];
            for (int i = 0; i < Width; i++) rows[i] = row(t - (Width - 1) + i);
            token<Width, Silu>(out + t * call.channels, rows, taps, bias, count);
        }
        if (kept)
            for (int i = 0; i < Width - 1; i++)
                std::copy_n(row(tokens - (Width - 1) + i), count, kept + i * call.channels);
    }
}

template <int Width, bool Silu, class T, class Weight>
void all(const Call& call, int threads) {
    const int64_t tokens = call.sequences.count ? call.sequences.query_start[call.sequences.count] : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tokens * call.channels >= LEAST_WORK)
    for (int64_t first = 0; first < call.channels; first += BLOCK) block<Width, Silu, T, Weight>(call, first);
}

}  // namespace

// dtypes: 0 float32, 1 bfloat16; that of x is also the state's, and that of the weight the bias's
extern "C" void causal_conv(const void* x, const void* weight, const void* bias, void* state, void* out,
                            const void* query_start, const void* slot, const void* fresh, int64_t count, int64_t x_row,
                            int64_t channels, int width, int silu, int dtype, int weight_dtype, int threads) {
    const Call call{x, weight, bias, state, out,
                    {static_cast<const int32_t*>(query_start), static_cast<const int32_t*>(slot),
                     static_cast<const uint8_t*>(fresh), count},
                    x_row, channels};
    auto typed = [&](auto wide, auto active) {
        constexpr int width = decltype(wide)::value;
        constexpr bool silu = decltype(active)::value;
        if (dtype == 0)
            weight_dtype == 0 ? all<width, silu, float, float>(call, threads) : all<width, silu, float, bf16>(call, threads);
        else
            weight_dtype == 0 ? all<width, silu, bf16, float>(call, threads) : all<width, silu, bf16, bf16>(call, threads);
    };
    auto wide = [&](auto width) {
        silu ? typed(width, std::true_type{}) : typed(width, std::false_type{});
    };
    if (width == 2) wide(std::integral_constant<int, 2>{});
    if (width == 3) wide(std::integral_constant<int, 3>{});
    if (width == 4) wide(std::integral_constant<int, 4>{});
}

LABKIT_REPEATABLE(causal_conv)
