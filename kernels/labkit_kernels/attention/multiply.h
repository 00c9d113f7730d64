// Small products of float32 in registers, for scores and weighted values. Part of attend.h.

// C[R x N] = C * rescale + A[R x K] B[K x N], N = VECTORS vectors; without `rescale`, C = A B. B's row k is at b(k).
template <int R, int VECTORS, class B>
inline void register_tile(const float* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t depth,
                          const float* rescale) {
    vf sums[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < VECTORS; j++)
            sums[r][j] = rescale ? labkit::load(c + r * ldc + j * W) * rescale[r] : labkit::splat(0.f);
    for (int64_t k = 0; k < depth; k++) {
        const float* row = b(k);
        vf x[VECTORS];
        for (int j = 0; j < VECTORS; j++) x[j] = labkit::load(row + j * W);
        for (int r = 0; r < R; r++) {
            vf y = labkit::splat(a[r * lda + k]);
            for (int j = 0; j < VECTORS; j++) sums[r][j] += x[j] * y;
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < VECTORS; j++) labkit::store(c + r * ldc + j * W, sums[r][j]);
}

template <int VECTORS, class B>
inline void panel(const float* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t rows, int64_t depth,
                  const float* rescale) {
    int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < blocks; i++) {  // even split: 7 rows are 4 + 3, not 6 + 1
        int64_t begin = rows * i / blocks, count = rows * (i + 1) / blocks - begin;
        const float* from = a + begin * lda;
        float* to = c + begin * ldc;
        const float* by = rescale ? rescale + begin : nullptr;
        switch (count) {
            case 1: register_tile<1, VECTORS>(from, lda, b, to, ldc, depth, by); break;
            case 2: register_tile<2, VECTORS>(from, lda, b, to, ldc, depth, by); break;
            case 3: register_tile<3, VECTORS>(from, lda, b, to, ldc, depth, by); break;
            case 4: register_tile<4, VECTORS>(from, lda, b, to, ldc, depth, by); break;
            case 5: register_tile<5, VECTORS>(from, lda, b, to, ldc, depth, by); break;
            default: register_tile<6, VECTORS>(from, lda, b, to, ldc, depth, by); break;
        }
    }
}

// The same for any number of columns (a multiple of W).
template <class B>
inline void multiply(const float* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t rows, int64_t cols,
                     int64_t depth, const float* rescale) {
    for (int64_t j = 0; j < cols; j += COLS * W) {
        auto at = [=](int64_t k) { return b(k) + j; };
        switch (std::min<int64_t>(COLS, (cols - j) / W)) {
            case 1: panel<1>(a, lda, at, c + j, ldc, rows, depth, rescale); break;
            case 2: panel<2>(a, lda, at, c + j, ldc, rows, depth, rescale); break;
            case 3: panel<std::min(3, COLS)>(a, lda, at, c + j, ldc, rows, depth, rescale); break;
            default: panel<COLS>(a, lda, at, c + j, ldc, rows, depth, rescale); break;
        }
    }
}
