// Products of which no result depends on how many rows or columns there are: x W^T + bias + residual, each sum in lanes
// over the depth and then over the lanes, in one order. Four rows and four columns share what is loaded.

#include <algorithm>
#include <cstdint>

#include "../repeat.h"
#include "../simd.h"

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 16;  // multiplications below which one thread is faster than waking another

template <class T>
struct Product {
    const T *x, *weight, *bias, *residual;
    T* out;
    int64_t columns, depth, x_row, weight_row, residual_row;

    // M rows x N columns from (row, column).
    template <int M, int N>
    void block(int64_t row, int64_t column) const {
        const T *a = x + row * x_row, *b = weight + column * weight_row;
        vf sums[M][N] = {};
        int64_t k = 0;
        for (; k + W <= depth; k += W) {
            vf left[M];
            for (int i = 0; i < M; i++) left[i] = load(a + i * x_row + k);
            for (int j = 0; j < N; j++) {
                const vf right = load(b + j * weight_row + k);
                for (int i = 0; i < M; i++) sums[i][j] += left[i] * right;
            }
        }
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) {
                float sum = reduce_sum(sums[i][j]);
                for (int64_t l = k; l < depth; l++) sum += to_float(a[i * x_row + l]) * to_float(b[j * weight_row + l]);
                if (bias) sum += to_float(bias[column + j]);
                if (residual) sum += to_float(residual[(row + i) * residual_row + column + j]);
                from_float(out + (row + i) * columns + column + j, sum);
            }
    }

    template <int M>
    void rows(int64_t row, int64_t begin, int64_t end) const {
        int64_t column = begin;
        for (; column + 4 <= end; column += 4) block<M, 4>(row, column);
        for (; column < end; column++) block<M, 1>(row, column);
    }
};

// Columns in strips that stay in a cache for all rows.
template <class T>
void product(const Product<T>& p, int64_t rows, int threads) {
    const int64_t strip = std::max<int64_t>(4, (1 << 18) / (p.depth * static_cast<int64_t>(sizeof(T)) + 1) / 4 * 4);
    const int64_t strips = (p.columns + strip - 1) / strip;
    const bool several = threads > 1 && rows * p.columns * p.depth >= LEAST_WORK;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (several)
    for (int64_t s = 0; s < strips; s++) {
        const int64_t begin = s * strip, end = std::min(p.columns, begin + strip);
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) p.template rows<4>(row, begin, end);
        for (; row < rows; row++) p.template rows<1>(row, begin, end);
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16; out [rows, columns] is dense.
extern "C" void linear_rows(const void* x, const void* weight, const void* bias, const void* residual, void* out,
                            int64_t rows, int64_t columns, int64_t depth, int64_t x_row, int64_t weight_row,
                            int64_t residual_row, int dtype, int threads) {
    auto run = [&](auto t) {
        using T = decltype(t);
        product(Product<T>{(const T*)x, (const T*)weight, (const T*)bias, (const T*)residual, (T*)out, columns, depth,
                           x_row, weight_row, residual_row},
                rows, threads);
    };
    dtype == 0 ? run(float{}) : run(bf16{});
}

LABKIT_REPEATABLE(linear_rows)
