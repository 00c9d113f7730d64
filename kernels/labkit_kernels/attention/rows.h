// Finds rows of keys and values through a block table and converts them to float32. Part of attend.h.

// The addresses of keys `begin`.. of this sequence. Past `count` the last row is repeated: its score is masked, and
// unwritten memory is never read.
template <class T>
inline void find_rows(const void* cache, int64_t block_stride, int64_t head_stride, int64_t slot_stride,
                      const int32_t* table, int64_t block_size, int head, int begin, int count, Rows& rows) {
    const T* base = static_cast<const T*>(cache) + head * head_stride;
    int block = begin / block_size, slot = begin % block_size;
    for (int i = 0; i < count;) {
        const T* at = base + table[block] * block_stride + slot * slot_stride;
        int stop = std::min<int64_t>(count, i + block_size - slot);
        for (; i < stop; i++, at += slot_stride) rows.at[i] = at;
        block++;
        slot = 0;
    }
    for (int i = count; i < KEYS; i++) rows.at[i] = rows.at[count - 1];
}

// The scales of a tile lie in pieces, one in each block: f(address, index of the first key, keys) for each. `base`: the
// scales of this head in block 0; strides in bytes.
template <class F>
inline void each_piece(const char* base, int64_t block_stride, const int32_t* table, int64_t block_size, int begin,
                       int count, const F& f) {
    int block = begin / block_size, slot = begin % block_size;
    for (int i = 0; i < count; block++, slot = 0) {
        const int n = std::min<int64_t>(count - i, block_size - slot);
        f(base + table[block] * block_stride + slot * sizeof(float), i, n);
        i += n;
    }
}

// Zero past `count`: the scores there are masked, and must not become nan.
inline void read_scales(const char* base, int64_t block_stride, const int32_t* table, int64_t block_size, int begin,
                        int count, float* to) {
    each_piece(base, block_stride, table, block_size, begin, count,
               [=](const char* at, int i, int n) {
                   int j = 0;
                   for (; j + 16 <= n; j += 16) std::memcpy(to + i + j, at + 4 * j, 64);  // no call of a function
                   for (; j < n; j++) std::memcpy(to + i + j, at + 4 * j, 4);
               });
    std::fill(to + count, to + KEYS, 0.f);
}

inline void prefetch_scales(const char* base, int64_t block_stride, const int32_t* table, int64_t block_size, int begin,
                            int count) {
    each_piece(base, block_stride, table, block_size, begin, count, [](const char* at, int, int n) {
        for (int64_t byte = 0; byte < n * int64_t{sizeof(float)}; byte += 64) __builtin_prefetch(at + byte, 0, 2);
    });
}

// Prefetches a cache line of a row that is needed one tile later. Prefetches are spread out: a burst of them would fill
// the line buffers and stall the processor.
inline void prefetch(const void* row, int64_t byte) {
    __builtin_prefetch(static_cast<const char*>(row) + byte, 0, 2);
}

// to[size][KEYS] = the transposed tile.
template <class T>
inline void transpose_keys(const Rows& rows, int count, int64_t size, float* to, const Rows& next_keys,
                           const Rows& next_values) {
    int columns = (count + W - 1) / W * W;
    for (int k = 0; k < columns; k += W) {
        int64_t d = 0;
        for (; d + W <= size; d += W) {
            vf tile[W];
            for (int i = 0; i < W; i++) tile[i] = labkit::load(static_cast<const T*>(rows.at[k + i]) + d);
            if (d * sizeof(T) % 64 == 0)
                for (int i = 0; i < W; i++) {
                    prefetch(next_keys.at[k + i], d * sizeof(T));
                    prefetch(next_values.at[k + i], d * sizeof(T));
                }
            labkit::transpose(tile);
            for (int i = 0; i < W; i++) labkit::store(to + (d + i) * KEYS + k, tile[i]);
        }
        for (; d < size; d++)
            for (int i = 0; i < W; i++)
                to[d * KEYS + k + i] = labkit::to_float(static_cast<const T*>(rows.at[k + i])[d]);
    }
}

// Pointers to the values as float rows of whole vectors: into the cache if it has that form, else to a copy.
template <class T>
inline void float_rows(const Rows& rows, int count, int64_t size, float* to, const float** at) {
    int64_t wide = padded(size);
    for (int i = 0; i < count; i++) {
        const T* from = static_cast<const T*>(rows.at[i]);
        if constexpr (std::is_same_v<T, float>) {
            if (wide == size) {
                at[i] = from;
                continue;
            }
        }
        float* row = to + i * wide;
        int64_t d = 0;
        for (; d + W <= size; d += W) labkit::store(row + d, labkit::load(from + d));
        for (; d < size; d++) row[d] = labkit::to_float(from[d]);
        for (; d < wide; d++) row[d] = 0.f;
        at[i] = row;
    }
}
