// Two units that multiply a block of packed rows by a panel of packed columns: tile registers, and vectors of
// bfloat16 pairs. Both read the same tiles and leave the same layout of sums: [tiles of rows][low, high][16][16].
#pragma once

#if LABKIT_TILES
// Bound by the tile unit most of the time, so finished sums of the previous block are written in between.
struct TileUnit {
    using Scope = amx::Tiles;
    static constexpr int CHUNK = 0;  // few rows take all depths of a panel at once

    // Sums of a block of rows and a panel of columns, depths [from, to), on top of `sum` if there are any, to `put`.
    template <int Tall, class Fetch, class Write>
    static void product(const bf16* a0, int64_t deep, const bf16* low, const bf16* high, int64_t from, int64_t to,
                            int64_t, const float* sum, float* put, Fetch& fetch, Waiting<Write>& waiting) {
            if constexpr (Tall == 3) return tall(a0, deep, low, high, put, fetch, waiting);
        const bf16* a1 = a0 + deep * SIZE;
        if (sum == nullptr) {
            _tile_zero(0);
            _tile_zero(1);
            if (Tall > 1) {
                _tile_zero(2);
                _tile_zero(3);
            }
        } else {
            _tile_loadd(0, sum, 64);
            _tile_loadd(1, sum + 256, 64);
            if (Tall > 1) {
                _tile_loadd(2, sum + 512, 64);
                _tile_loadd(3, sum + 768, 64);
            }
        }
        for (int64_t k = from; k < to; k++) {
            _tile_loadd(6, low + k * SIZE, 64);
            _tile_loadd(4, a0 + k * SIZE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, high + k * SIZE, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (Tall > 1) {
                _tile_loadd(5, a1 + k * SIZE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            fetch.some(low + k * SIZE, high + k * SIZE);
            waiting.some();
        }
        waiting.rest();
        _tile_stored(0, put, 64);
        _tile_stored(1, put + 256, 64);
        if (Tall > 1) {
            _tile_stored(2, put + 512, 64);
            _tile_stored(3, put + 768, 64);
        }
    }

    // Three tiles of rows take all depths at once: six sums leave one register for each operand.
    template <class Fetch, class Write>
    static void tall(const bf16* a, int64_t deep, const bf16* low, const bf16* high, float* put, Fetch& fetch,
                         Waiting<Write>& waiting) {
        const bf16 *b = a + deep * SIZE, *c = b + deep * SIZE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        for (int64_t k = 0; k < deep; k++) {
            _tile_loadd(7, low + k * SIZE, 64);
            _tile_loadd(6, a + k * SIZE, 64);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(6, b + k * SIZE, 64);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(6, c + k * SIZE, 64);
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(7, high + k * SIZE, 64);
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(6, b + k * SIZE, 64);
            _tile_dpbf16ps(3, 6, 7);
            _tile_loadd(6, a + k * SIZE, 64);
            _tile_dpbf16ps(1, 6, 7);
            fetch.some(low + k * SIZE, high + k * SIZE);
            waiting.some();
        }
        waiting.rest();
        _tile_stored(0, put, 64);
        _tile_stored(1, put + 256, 64);
        _tile_stored(2, put + 512, 64);
        _tile_stored(3, put + 768, 64);
        _tile_stored(4, put + 1024, 64);
        _tile_stored(5, put + 1280, 64);
    }
};
#endif

// Sums of up to twelve rows x 32 columns stay in registers: two vectors of weights are read for twelve rows, and one
// pair of depths of each row is broadcast over a vector.
struct VectorUnit {
    struct Scope {};
    static constexpr int CHUNK = 8;  // tiles of depth whose weights (16 KB) stay in L1 for all rows of a block

    template <int Tall, class Fetch, class Write>
    static void product(const bf16* a, int64_t deep, const bf16* low, const bf16* high, int64_t from, int64_t to,
                        int64_t rows, const float* sum, float* put, Fetch& fetch, Waiting<Write>& waiting) {
        waiting.rest();
        Group g{a, deep, low, high, from, to, sum, put};
        if constexpr (Tall == 1) {
            g.template few<0>(rows, fetch);
            if (rows > 8) g.template few<8>(rows - 8, NOTHING);
        } else {
            g.template run<0, 12>(fetch);
            g.template rest<12, Tall * TILE>(rows);
        }
    }

  private:
    struct Nothing {
        void some(const bf16*, const bf16*) const {}
        void line() const {}
    };
    static constexpr Nothing NOTHING{};

    struct Group {
        const bf16* a;
        int64_t deep;
        const bf16 *low, *high;
        int64_t from, to;
        const float* sum;
        float* put;

        // Rows [First, First + Count) of the block; they lie in one tile of rows or in two.
        template <int First, int Count, class Fetch>
        void run(Fetch& given) const {
            std::remove_const_t<Fetch> fetch = given;  // in registers: in memory it would be what each pair waits for
            constexpr int TOP = First / TILE, SPLIT = std::min(Count, (TOP + 1) * TILE - First);
            const bf16* here = a + TOP * deep * SIZE + First % TILE * DEPTH;
            const bf16* below = a + (TOP + 1) * deep * SIZE - SPLIT * DEPTH;
            __m512 x[Count], y[Count];
            for (int r = 0; r < Count; r++) {
                x[r] = sum ? _mm512_load_ps(place(sum, First + r)) : _mm512_setzero_ps();
                y[r] = sum ? _mm512_load_ps(place(sum, First + r) + 256) : _mm512_setzero_ps();
            }
            for (int64_t k = from; k < to; k++) {
                const bf16 *left = low + k * SIZE, *right = high + k * SIZE;
                const bf16 *upper = here + k * SIZE, *lower = below + k * SIZE;
                for (int pair = 0; pair < DEPTH / 2; pair++) {
                    const __m512bh b = (__m512bh)_mm512_load_si512(left + pair * DEPTH);
                    const __m512bh c = (__m512bh)_mm512_load_si512(right + pair * DEPTH);
#pragma GCC unroll 12
                    for (int r = 0; r < Count; r++) {
                        int32_t two;
                        std::memcpy(&two, (r < SPLIT ? upper : lower) + r * DEPTH + pair * 2, 4);
                        const __m512bh spread = (__m512bh)_mm512_set1_epi32(two);
                        x[r] = _mm512_dpbf16_ps(x[r], spread, b);
                        y[r] = _mm512_dpbf16_ps(y[r], spread, c);
                    }
                    fetch.line();
                }
                fetch.some(left, right);
            }
            for (int r = 0; r < Count; r++) {
                _mm512_store_ps(const_cast<float*>(place(put, First + r)), x[r]);
                _mm512_store_ps(const_cast<float*>(place(put, First + r)) + 256, y[r]);
            }
            if constexpr (!std::is_const_v<Fetch>) given = fetch;
        }

        // The fewest rows there is code for that are at least `rows`, at most 8.
        template <int First, class Fetch>
        void few(int64_t rows, Fetch& fetch) const {
            if (rows == 1) return run<First, 1>(fetch);
            if (rows == 2) return run<First, 2>(fetch);
            if (rows == 3) return run<First, 3>(fetch);
            if (rows == 4) return run<First, 4>(fetch);
            if (rows <= 6) return run<First, 6>(fetch);
            run<First, 8>(fetch);
        }

        // Rows [First, rows), twelve at a time; at most `Most` rows.
        template <int First, int Most>
        void rest(int64_t rows) const {
            if (rows <= First) return;
            if (rows <= First + 8) return few<First>(rows - First, NOTHING);
            if constexpr (First + 8 < Most) {
                run<First, 12>(NOTHING);
                rest<First + 12, Most>(rows);
            }
        }

        static const float* place(const float* sums, int row) { return sums + row / TILE * 512 + row % TILE * TILE; }
    };
};
