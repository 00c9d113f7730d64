// What a layer and a gated MLP do with rows, whichever unit multiplies them: part of cpu.cpp, behind wide.h or bytes.h,
// which quantize rows, multiply them with panels of weights, and say how many rows are taken at a time.
#pragma once

void linear(const Linear& call) {
    const Weight& w = *call.weight;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const Panels panels{w, 2, 1};
    in_parts(call.rows, w.groups * w.group, [&](int64_t row, int64_t rows) {
        const Rows a = rows_for(w, rows, in_tiles(call.rows));
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, w, a);
            auto run = [&](auto* out) {
                product(a, rows, panels, parts(w.columns, PANEL),
                        Plain<std::remove_pointer_t<decltype(out)>>{
                            static_cast<const bf16*>(call.bias), row_of(call.residual, row, call.residual_row),
                            out + row * call.out_row, w.columns, call.residual_row, call.out_row});
            };
            call.out_dtype == 0 ? run(static_cast<float*>(call.out)) : run(static_cast<bf16*>(call.out));
        }
    });
}

template <class Act>
void mlp(const Mlp& call) {
    const Weight &up = *call.up, &down = *call.down;
    const Norm norm{call.norm, call.norm_dtype, static_cast<float>(call.eps)};
    const int64_t inner = down.depth, gates = inner / TILE;
    in_parts(call.rows, down.groups * down.group, [&](int64_t row, int64_t rows) {
        const bool tiled = in_tiles(call.rows);
        // Both products use one working memory, the larger of the two: the first is through when the second begins.
        rows_for(down, rows, tiled);
        const Rows a = rows_for(up, rows, tiled), b = rows_for(down, rows, tiled);
        bf16* between = room.inner.fit<bf16>(rows * inner);
#pragma omp parallel num_threads(call.num_threads)
        {
            quantize_all(row_of(call.x, row, call.x_row), call.x_row, rows, norm, up, a);
            product(a, rows, Panels{up, 1, gates}, gates, GatedRows<Act>{between, inner});
#pragma omp barrier
            quantize_all(between, inner, rows, Norm{}, down, b);
            product(b, rows, Panels{down, 2, 1}, parts(down.columns, PANEL),
                    Plain<bf16>{nullptr, row_of(call.residual, row, call.residual_row),
                                static_cast<bf16*>(call.out) + row * call.out_row, down.columns, call.residual_row,
                                call.out_row});
        }
    });
}
