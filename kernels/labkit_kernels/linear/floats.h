// The same products on processors without instructions for bfloat16 (AVX2, or the first AVX-512): part of cpu.cpp.
//
// A weight is read in 16 bits, half of what float32 takes from memory, and becomes a float in a register: the two
// weights of a pair are the halves of 32 bits, so a shift gives one and a mask the other. Rows of x are floats, rounded
// to bfloat16 after the norm as elsewhere. Each sum is taken in the order of the depths, so no row depends on others.
//
// One row is bound by memory, and up to six share each weight's conversion. Of many rows, as many depths at a time are
// multiplied as stay in L1 for all of them.

constexpr int TILE = 16, DEPTH = 32;       // columns and depths of a tile of weights
constexpr int64_t SIZE = TILE * DEPTH;     // elements of a tile
constexpr int VECTORS = PANEL / W;         // of a row's sums
constexpr int MOST_AT_ONCE = 6;            // rows: twelve sums, of sixteen registers
constexpr int64_t CHUNK = 8;               // tiles of depth (16 KB of weights) that are multiplied with all rows
constexpr int64_t MOST_ROWS = 192;         // at once
constexpr int64_t AHEAD = 512;             // pairs of weights (2 KB) that are fetched in advance

// The two columns of tiles that make up a panel.
struct Columns {
    const bf16* weight;
    int64_t deep;          // tiles a column of tiles
    int64_t step, second;  // panel p has columns p * step and p * step + second

    const bf16* tile(int64_t panel, int half) const { return weight + (panel * step + half * second) * deep * SIZE; }
};

// Rows x `Vecs` vectors of columns from vector `first` of a panel, depths [from, to) in tiles, on top of `sums` (a row
// has PANEL) unless they are the first. Fetch: the weights may come from memory.
template <int Rows, int Vecs, bool Fetch>
void block(const float* x, int64_t stride, const bf16* const (&tiles)[2], int first, int64_t from, int64_t to,
           float* sums) {
    constexpr int EACH = TILE / W;  // vectors of a tile
    vf sum[Rows][Vecs];
    const uint32_t* at[Vecs];
    for (int v = 0; v < Vecs; v++) {
        at[v] = reinterpret_cast<const uint32_t*>(tiles[(first + v) / EACH]) + (first + v) % EACH * W;
        for (int r = 0; r < Rows; r++) sum[r][v] = from ? load(sums + r * PANEL + (first + v) * W) : vf{};
    }
    for (int64_t pair = from * DEPTH / 2; pair < to * DEPTH / 2; pair++) {
        if constexpr (Fetch)
            for (int v = 0; v < Vecs; v += EACH) __builtin_prefetch(at[v] + pair * TILE + AHEAD);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vf w[Vecs];
#pragma GCC unroll 8
            for (int v = 0; v < Vecs; v++) {
                const vu both = load_bits<vu>(at[v] + pair * TILE);
                w[v] = (vf)(odd ? both & 0xffff0000u : both << 16);
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) {
                const vf spread = splat(x[r * stride + 2 * pair + odd]);
#pragma GCC unroll 8
                for (int v = 0; v < Vecs; v++) sum[r][v] += spread * w[v];
            }
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) store(sums + r * PANEL + (first + v) * W, sum[r][v]);
}

// All columns of a panel: one or two rows have enough registers for four vectors at once, more rows for two.
template <int Rows, bool Fetch>
void rows_of_panel(const float* x, int64_t stride, const bf16* const (&tiles)[2], int64_t from, int64_t to,
                   float* sums) {
    constexpr int VECS = std::min(VECTORS, Rows <= 2 ? 4 : 2);
    for (int v = 0; v < VECTORS; v += VECS) block<Rows, VECS, Fetch>(x, stride, tiles, v, from, to, sums);
}

template <bool Fetch>
void some_rows(int64_t rows, const float* x, int64_t stride, const bf16* const (&tiles)[2], int64_t from, int64_t to,
               float* sums) {
    switch (rows) {
        case 1: return rows_of_panel<1, Fetch>(x, stride, tiles, from, to, sums);
        case 2: return rows_of_panel<2, Fetch>(x, stride, tiles, from, to, sums);
        case 3: return rows_of_panel<3, Fetch>(x, stride, tiles, from, to, sums);
        case 4: return rows_of_panel<4, Fetch>(x, stride, tiles, from, to, sums);
        case 5: return rows_of_panel<5, Fetch>(x, stride, tiles, from, to, sums);
        default: return rows_of_panel<MOST_AT_ONCE, Fetch>(x, stride, tiles, from, to, sums);
    }
}

thread_local Buffer wide, between, products, largest;

// write(sums of 32 columns, row, panel) for this thread's panels.
template <class Write>
void product(const float* x, int64_t rows, const Columns& columns, int64_t panels, const Write& write) {
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads(), deep = columns.deep;
    float* sums = products.fit<float>(rows * PANEL);
    for (int64_t panel = panels * id / team; panel < panels * (id + 1) / team; panel++) {
        const bf16* const tiles[] = {columns.tile(panel, 0), columns.tile(panel, 1)};
        const int64_t chunk = rows > MOST_AT_ONCE ? CHUNK : deep;
        for (int64_t from = 0; from < deep; from += chunk)
            for (int64_t r = 0; r < rows; r += MOST_AT_ONCE) {
                auto some = r == 0 ? some_rows<true> : some_rows<false>;
                some(std::min<int64_t>(rows - r, MOST_AT_ONCE), x + r * deep * DEPTH, deep * DEPTH, tiles, from,
                     std::min(from + chunk, deep), sums + r * PANEL);
            }
        for (int64_t r = 0; r < rows; r++) write(sums + r * PANEL, r, panel);
    }
}

void widen_all(const bf16* x, int64_t stride, int64_t rows, int64_t depth, const Norm& norm, float* to) {
    const int64_t deep = parts(depth, DEPTH) * DEPTH;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) widen(x + r * stride, depth, deep, norm, true, to + r * deep);
}

// 16 columns of the gate and the 16 that they multiply, rounded to bfloat16, as floats.
template <class Act>
struct Gated {
    float* to;
    int64_t stride;

    void operator()(const float* sums, int64_t row, int64_t panel) const {
        bf16 y[TILE];
        for (int c = 0; c < TILE; c += W) store(y + c, Act::of(load(sums + c)) * load(sums + TILE + c));
        float* at = to + row * stride + panel * TILE;
        for (int c = 0; c < TILE; c += W) store(at + c, load(y + c));
    }
};

// f(first row, rows) for at most MOST_ROWS rows at a time, split evenly.
template <class F>
void in_parts(int64_t rows, const F& f) {
    const int64_t count = parts(rows, MOST_ROWS), each = parts(parts(rows, count), MOST_AT_ONCE) * MOST_AT_ONCE;
    for (int64_t row = 0; row < rows; row += each) f(row, std::min(each, rows - row));
}

struct Floats {};

template <class Unit>
void linear(const Linear& call) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.depth, DEPTH), panels = parts(call.columns, PANEL);
    const Columns columns{static_cast<const bf16*>(call.weight), deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        float* x = wide.fit<float>(rows * deep * DEPTH);
#pragma omp parallel num_threads(call.num_threads)
        {
            widen_all(row_of(call.x, row, call.x_row), call.x_row, rows, call.depth, norm, x);
            auto run = [&](auto* out) {
                product(x, rows, columns, panels,
                        Plain<std::remove_pointer_t<decltype(out)>>{
                            static_cast<const bf16*>(call.bias), row_of(call.residual, row, call.residual_row),
                            out + row * call.out_row, call.columns, call.residual_row, call.out_row});
            };
            call.out_dtype == 0 ? run(static_cast<float*>(call.out)) : run(static_cast<bf16*>(call.out));
        }
    });
}

// The largest of each row's sums and its column, the first of equals; column 0 and NaN if every sum is NaN.
template <class Unit>
void argmax(const Linear& call, int64_t* columns_out, float* sums_out) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.depth, DEPTH), panels = parts(call.columns, PANEL);
    const Columns columns{static_cast<const bf16*>(call.weight), deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        float* x = wide.fit<float>(rows * deep * DEPTH);
        Largest* found = largest.fit<Largest>(call.num_threads * rows);
        for (int64_t i = 0; i < call.num_threads * rows; i++) found[i] = {call.columns, -INFINITY};
#pragma omp parallel num_threads(call.num_threads)
        {
            widen_all(row_of(call.x, row, call.x_row), call.x_row, rows, call.depth, norm, x);
            product(x, rows, columns, panels,
                    Best{found + omp_get_thread_num() * rows, static_cast<const bf16*>(call.bias), call.columns});
        }
        for (int64_t r = 0; r < rows; r++) {
            const Largest best = largest_of(found + r, call.num_threads, rows, call.columns);
            columns_out[row + r] = best.column;
            sums_out[row + r] = best.sum;
        }
    });
}

template <class Unit, class Act>
void mlp(const Mlp& call) {
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t deep = parts(call.size, DEPTH), inner_deep = parts(call.inner, DEPTH);
    const int64_t gates = call.inner / TILE, panels = parts(call.size, PANEL), stride = inner_deep * DEPTH;
    const Columns up{static_cast<const bf16*>(call.up), deep, 1, gates};
    const Columns down{static_cast<const bf16*>(call.down), inner_deep, 2, 1};
    in_parts(call.rows, [&](int64_t row, int64_t rows) {
        float* x = wide.fit<float>(rows * deep * DEPTH);
        float* inner = between.fit<float>(rows * stride);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = gates * TILE; d < stride; d++) inner[r * stride + d] = 0.f;
#pragma omp parallel num_threads(call.num_threads)
        {
            widen_all(row_of(call.x, row, call.x_row), call.x_row, rows, call.size, norm, x);
            product(x, rows, up, gates, Gated<Act>{inner, stride});
#pragma omp barrier
            product(inner, rows, down, panels,
                    Plain<bf16>{nullptr, row_of(call.residual, row, call.residual_row),
                                static_cast<bf16*>(call.out) + row * call.out_row, call.size, call.residual_row,
                                call.out_row});
        }
    });
}

template <class F>
void on_best_unit(const F& f) {
    f(Floats{});
}
