// What is done with the sums of a product: bias and residual, a gate, or the maximum. Part of cpu.cpp.

// Sums of 32 columns beside each other, plus bias and residual, to `out`.
template <class Out>
struct Plain {
    const bf16 *bias, *residual;
    Out* out;
    int64_t columns, residual_row, out_row;

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        const int64_t at = panel * BLOCK;
        const __mmask16 low = first(columns - at), high = first(columns - at - TILE);
        vf x = load(a), y = load(b);
        if (bias) {
            x += load_first(bias + at, low);
            y += load_first(bias + at + TILE, high);
        }
        if (residual) {
            const bf16* from = residual + row * residual_row + at;
            x += load_first(from, low);
            y += load_first(from + TILE, high);
        }
        write(out + row * out_row + at, x, y, low, high);
    }

    static void write(bf16* to, vf x, vf y, __mmask16 low, __mmask16 high) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
        _mm512_mask_storeu_epi16(to, low | static_cast<__mmask32>(high) << 16, both);
    }
    static void write(float* to, vf x, vf y, __mmask16 low, __mmask16 high) {
        _mm512_mask_storeu_ps(to, low, (__m512)x);
        _mm512_mask_storeu_ps(to + TILE, high, (__m512)y);
    }
};

// 16 columns of the gate and the 16 of `up` that they multiply, into tiles for the next product.
template <class Act>
struct Gated {
    bf16* tiles;
    int64_t deep;  // tiles in a row of tiles

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        bf16* to = tiles + (row / TILE * deep + panel / 2) * SIZE + row % TILE * DEPTH + panel % 2 * TILE;
        _mm256_store_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)(Act::of(load(a)) * load(b))));
    }
};

// Nothing is written: each row keeps its largest sum and its column. Lane i holds columns i, i + 16, ...
struct Best {
    vf* most;    // [rows]
    vi* where;   // [rows]
    const bf16* bias;
    int64_t columns;

    void operator()(const float* a, const float* b, int64_t row, int64_t panel) const {
        const int64_t at = panel * BLOCK;
        look(load(a), row, at);
        if (at + TILE < columns) look(load(b), row, at + TILE);
    }
    void look(vf x, int64_t row, int64_t at) const {
        const __mmask16 there = first(columns - at);
        if (bias) x += load_first(bias + at, there);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at)), (__m512i)LANES);
        const __mmask16 more = _mm512_mask_cmp_ps_mask(there, (__m512)x, (__m512)most[row], _CMP_GT_OQ);
        most[row] = (vf)_mm512_mask_mov_ps((__m512)most[row], more, (__m512)x);
        where[row] = (vi)_mm512_mask_mov_epi32((__m512i)where[row], more, index);
    }
    static constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
