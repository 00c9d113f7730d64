// Low-rank products by slot on a CPU. A tile is up to 16 tokens of one adapter. Shrinking is dot products of rows of x
// and rows of A, four tokens by four rows at a time, so that each load serves four of them. Expanding streams rows of B
// past four tokens' sums, and adds them to the layer's product. In decode both are bound by reading A and B.

#include <algorithm>
#include <cstdint>

#include "../repeat.h"
#include "../simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 16;  // multiplications below which one thread is faster than waking another
constexpr int64_t COLUMNS = 4 * W;
constexpr int64_t AHEAD = 2 * COLUMNS;  // fetched in advance: rows of B are too far apart for the processor to foresee

inline float sum_of(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    return reduce_sum(x);
#endif
}

template <class T>
struct Dot {
    static constexpr int64_t step = W;
    static vf add(vf sum, const T* x, const T* y) { return sum + load(x) * load(y); }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
    static constexpr int64_t step = 32;
    static vf add(vf sum, const bf16* x, const bf16* y) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(y));
    }
};
#endif

// M x N dot products of rows of x and rows of a.
template <int M, int N, class T>
void dots(const T* const* x, const T* a, int64_t size, float* out, int64_t out_row) {
    vf sums[M][N] = {};
    int64_t k = 0;
    for (; k + Dot<T>::step <= size; k += Dot<T>::step)
        for (int j = 0; j < N; j++)
            for (int i = 0; i < M; i++) sums[i][j] = Dot<T>::add(sums[i][j], x[i] + k, a + j * size + k);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float rest = 0.f;
            for (int64_t l = k; l < size; l++) rest += to_float(x[i][l]) * to_float(a[j * size + l]);
            out[i * out_row + j] = sum_of(sums[i][j]) + rest;
        }
}

template <int N, class T>
void dots(const T* const* x, int64_t count, const T* a, int64_t size, float* out, int64_t out_row) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) dots<4, N>(x + i, a, size, out + i * out_row, out_row);
    for (; i + 2 <= count; i += 2) dots<2, N>(x + i, a, size, out + i * out_row, out_row);
    for (; i < count; i++) dots<1, N>(x + i, a, size, out + i * out_row, out_row);
}

template <class T>
void shrink(const T* x, int64_t x_row, const T* a, const int32_t* ranks, const int32_t* tokens, const int32_t* tiles,
            int64_t num_tiles, float* out, int64_t size, int64_t rank, int64_t parts, int64_t num_tokens, int threads) {
    int64_t width = rank * parts, blocks = width / 16;
    bool several = threads > 1 && num_tokens * width * size >= LEAST_WORK;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (several)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int32_t *at = tiles + 3 * tile, slot = at[0], count = at[2] - at[1];
            if (count <= 0) continue;
            const T* rows[16];
            for (int i = 0; i < count; i++) rows[i] = x + tokens[at[1] + i] * x_row;
            int64_t column = block * 16, used = std::min<int64_t>(16, std::max<int64_t>(0, ranks[slot] - column % rank)), j = 0;
            const T* mine = a + (slot * width + column) * size;
            float* to = out + at[1] * width + column;
            for (; j + 4 <= used; j += 4) dots<4>(rows, count, mine + j * size, size, to + j, width);
            for (; j < used; j++) dots<1>(rows, count, mine + j * size, size, to + j, width);
            for (int i = 0; i < count; i++)
                for (int64_t l = used; l < 16; l++) to[i * width + l] = 0.f;
        }
}

// out[i] += t[i] * b for M tokens and 4 vectors of columns.
template <int M, class T>
void add(T* const* out, const float* t, int64_t t_row, const T* b, int64_t b_row, int64_t rank) {
    vf sums[M][4] = {};
    for (int64_t r = 0; r < rank; r++) {
        const T* row = b + r * b_row;
        vf line[4];
        for (int j = 0; j < 4; j++) line[j] = load(row + j * W);
        for (int64_t ahead = 0; ahead < COLUMNS; ahead += 64 / sizeof(T)) __builtin_prefetch(row + AHEAD + ahead);
        for (int i = 0; i < M; i++) {
            vf factor = splat(t[i * t_row + r]);
            for (int j = 0; j < 4; j++) sums[i][j] += factor * line[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++) store(out[i] + j * W, load(out[i] + j * W) + sums[i][j]);
}

#if defined(__AVX512BF16__)
// The same in pairs of ranks, for which the factors are rounded to bfloat16, as they are between two layers. Two rows of
// b are interleaved within 128 bits, and the sums are put in order at the end.
template <int M>
void add(bf16* const* out, const float* t, int64_t t_row, const bf16* b, int64_t b_row, int64_t rank) {
    static_assert(COLUMNS == 64);
    __m512 sums[M][4];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_ps();
    for (int64_t first = 0; first < rank; first += 16) {
        const int64_t some = std::min<int64_t>(16, rank - first);
        alignas(32) uint32_t factors[M][8];
        for (int i = 0; i < M; i++) {
            const __m512 own = _mm512_maskz_loadu_ps((1u << some) - 1, t + i * t_row + first);
            _mm256_store_si256((__m256i*)factors[i], (__m256i)_mm512_cvtneps_pbh(own));
        }
        for (int64_t r = 0; r < some; r += 2) {
            const bf16 *low = b + (first + r) * b_row, *high = r + 1 < some ? low + b_row : low;  // times zero
            __m512bh pairs[4];
            for (int h = 0; h < 2; h++) {
                const __m512i x = _mm512_loadu_si512(low + h * 32), y = _mm512_loadu_si512(high + h * 32);
                pairs[2 * h] = (__m512bh)_mm512_unpacklo_epi16(x, y);
                pairs[2 * h + 1] = (__m512bh)_mm512_unpackhi_epi16(x, y);
                __builtin_prefetch(low + AHEAD + h * 32);
                __builtin_prefetch(high + AHEAD + h * 32);
            }
            for (int i = 0; i < M; i++) {
                const __m512bh factor = (__m512bh)_mm512_set1_epi32(factors[i][r / 2]);
                for (int j = 0; j < 4; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], factor, pairs[j]);
            }
        }
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < M; i++)
        for (int h = 0; h < 2; h++) {
            bf16* to = out[i] + h * 32;
            const __m512 x = sums[i][2 * h], y = sums[i][2 * h + 1];
            store(to, load(to) + (vf)_mm512_permutex2var_ps(x, first, y));
            store(to + W, load(to + W) + (vf)_mm512_permutex2var_ps(x, second, y));
        }
}
#endif

template <class T>
void add_rest(T* out, const float* t, const T* b, int64_t b_row, int64_t rank, int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        float sum = 0.f;
        for (int64_t r = 0; r < rank; r++) sum += t[r] * to_float(b[r * b_row + j]);
        from_float(out + j, to_float(out[j]) + sum);
    }
}

template <class T>
void expand(T* out, int64_t out_row, const float* t, const T* b, const int32_t* ranks, const int32_t* tokens,
            const int32_t* tiles, int64_t num_tiles, const int64_t* sizes, int64_t parts, int64_t rank, int64_t outputs,
            int64_t num_tokens, int threads) {
    int64_t width = rank * parts, chunks = 0;
    for (int64_t p = 0; p < parts; p++) chunks += (sizes[p] + COLUMNS - 1) / COLUMNS;
    bool several = threads > 1 && num_tokens * rank * outputs >= LEAST_WORK;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (several)
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int32_t *at = tiles + 3 * tile, slot = at[0], count = at[2] - at[1];
            int64_t used = ranks[slot], part = 0, begin = 0, mine = chunk;
            if (count <= 0 || used <= 0) continue;
            while (mine >= (sizes[part] + COLUMNS - 1) / COLUMNS) {
                mine -= (sizes[part] + COLUMNS - 1) / COLUMNS;
                begin += sizes[part++];
            }
            int64_t column = mine * COLUMNS, left = sizes[part] - column;
            const T* weights = b + slot * rank * outputs + begin + column;
            const float* from = t + at[1] * width + part * rank;
            T* rows[16];
            for (int i = 0; i < count; i++) rows[i] = out + tokens[at[1] + i] * out_row + begin + column;
            int i = 0;
            if (left >= COLUMNS) {
                for (; i + 4 <= count; i += 4) add<4>(rows + i, from + i * width, width, weights, outputs, used);
                for (; i + 2 <= count; i += 2) add<2>(rows + i, from + i * width, width, weights, outputs, used);
                for (; i < count; i++) add<1>(rows + i, from + i * width, width, weights, outputs, used);
            } else {
                for (; i < count; i++) add_rest(rows[i], from + i * width, weights, outputs, used, left);
            }
        }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16
extern "C" void lora_shrink(const void* x, int64_t x_row, const void* a, const void* ranks, const void* tokens,
                            const void* tiles, int64_t num_tiles, void* out, int64_t size, int64_t rank, int64_t parts,
                            int64_t num_tokens, int dtype, int threads) {
    auto run = [&](auto t) {
        using T = decltype(t);
        shrink((const T*)x, x_row, (const T*)a, (const int32_t*)ranks, (const int32_t*)tokens, (const int32_t*)tiles,
               num_tiles, (float*)out, size, rank, parts, num_tokens, threads);
    };
    dtype == 0 ? run(float{}) : run(bf16{});
}

extern "C" void lora_expand(void* out, int64_t out_row, const void* t, const void* b, const void* ranks,
                            const void* tokens, const void* tiles, int64_t num_tiles, int64_t size0, int64_t size1,
                            int64_t size2, int64_t parts, int64_t rank, int64_t num_tokens, int dtype, int threads) {
    int64_t sizes[] = {size0, size1, size2};
    auto run = [&](auto kind) {
        using T = decltype(kind);
        expand((T*)out, out_row, (const float*)t, (const T*)b, (const int32_t*)ranks, (const int32_t*)tokens,
               (const int32_t*)tiles, num_tiles, sizes, parts, rank, size0 + size1 + size2, num_tokens, threads);
    };
    dtype == 0 ? run(float{}) : run(bf16{});
}

LABKIT_REPEATABLE(lora_shrink)
LABKIT_REPEATABLE(lora_expand)
