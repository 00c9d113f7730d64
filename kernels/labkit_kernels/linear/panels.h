// Panels of weights: their addresses, and prefetching. Part of cpu.cpp.

// The two columns of tiles that make up a panel.
struct Columns {
    const bf16* weight;
    int64_t deep;             // tiles a column of tiles
    int64_t step, second;     // panel p reads columns p * step and p * step + second

    const bf16* low(int64_t panel) const { return weight + panel * step * deep * SIZE; }
    const bf16* high(int64_t panel) const { return low(panel) + second * deep * SIZE; }
};

// Finished sums still to be written, row by row.
template <class Write>
struct Waiting {
    const Write& write;
    const float* sums = nullptr;
    int64_t row = 0, panel = 0;
    int done = 0, count = 0, each = 0;

    void take(const float* from, int64_t at, int64_t rows, int64_t of, int64_t steps) {
        sums = from;
        row = at;
        panel = of;
        done = 0;
        count = static_cast<int>(rows);
        each = static_cast<int>(parts(count, steps));
    }
    void some() {
        for (int i = 0; i < each && done < count; i++, done++) one();
    }
    void rest() {
        for (; done < count; done++) one();
    }
    void one() {
        const float* at = sums + done / TILE * 512 + done % TILE * TILE;
        write(at, at + 256, row + done, panel);
    }
};

// Prefetches the next panel's weights into L2, a few cache lines per step.
struct NextPanel {
    const char *low, *high;
    int64_t left;
    int each;

    void some(const bf16*, const bf16*) {
        for (int i = 0; i < each && left > 0; i++, left -= LINE, low += LINE, high += LINE) {
            _mm_prefetch(low, _MM_HINT_T1);
            _mm_prefetch(high, _MM_HINT_T1);
        }
    }
    void line() {}
};

// Or one cache line of each column of tiles with every pair of depths that is multiplied.
struct NextLines {
    const char *low, *high;

    void some(const bf16*, const bf16*) {}
    void line() {
        _mm_prefetch(low, _MM_HINT_T0);
        _mm_prefetch(high, _MM_HINT_T0);
        low += LINE;
        high += LINE;
    }
};

// Or the weights just ahead of those being read, directly into L1.
struct Ahead {
    void some(const bf16* low, const bf16* high) {
        for (int64_t i = SIZE; i < 2 * SIZE; i += LINE / sizeof(bf16)) {
            _mm_prefetch(reinterpret_cast<const char*>(low + i), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(high + i), _MM_HINT_T0);
        }
    }
};
