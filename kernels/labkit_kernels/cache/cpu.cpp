// Stores keys and values in blocks and copies blocks, on a CPU, in runs of one head or one block. torch does the same
// with one index per slot, which costs more than the copy itself when a step stores a handful of tokens.

#include <cstdint>
#include <cstring>

#include "../codes.h"
#include "../repeat.h"

namespace {

constexpr int64_t LEAST_WORK = 1 << 18;  // bytes below which one thread is faster than waking another

struct Side {
    const char* in;  // [tokens, heads, size]
    char* cache;     // [blocks, heads, block size, size]
    int64_t size, token, head, to_block, to_head, to_place;  // bytes
};

inline void store(const Side& s, int64_t token, int64_t heads, int64_t block, int64_t place) {
    const char* from = s.in + token * s.token;
    char* to = s.cache + block * s.to_block + place * s.to_place;
    for (int64_t h = 0; h < heads; h++) std::memcpy(to + h * s.to_head, from + h * s.head, s.size);
}

// The same into a cache of codes C, whose scales follow the codes of each head of a block.
template <class T, class C>
void store_scaled(const Side& s, int64_t token, int64_t heads, int64_t block, int64_t place, int64_t block_size) {
    const int64_t size = s.size / sizeof(T);
    for (int64_t h = 0; h < heads; h++) {
        auto from = reinterpret_cast<const T*>(s.in + token * s.token + h * s.head);
        auto to = reinterpret_cast<uint8_t*>(s.cache + block * s.to_block + h * s.to_head);
        const float scale = labkit::store_codes<C>(from, size, to + place * size);
        std::memcpy(to + block_size * size + place * sizeof(float), &scale, sizeof(float));
    }
}

template <class T>
void store_codes(const Side& s, int64_t token, int64_t heads, int64_t block, int64_t place, int64_t block_size,
                 int code) {
    switch (code) {
        case 1: return store_scaled<T, labkit::int8>(s, token, heads, block, place, block_size);
        case 2: return store_scaled<T, labkit::e4m3>(s, token, heads, block, place, block_size);
        default: return store_scaled<T, labkit::e5m2>(s, token, heads, block, place, block_size);
    }
}

}  // namespace

// lies: for keys, then for values: size, and the strides token, head, block, head and place, in bytes
// dtype: of keys and values, float32 0 or bfloat16 1; code: of the cache, 0 for the same dtype
extern "C" void store_kv(const char* k, const char* v, char* k_cache, char* v_cache, const int64_t* slots,
                         const int64_t* lies, int64_t tokens, int64_t heads, int64_t block_size, int dtype, int code,
                         int threads) {
    const Side sides[] = {{k, k_cache, lies[0], lies[1], lies[2], lies[3], lies[4], lies[5]},
                          {v, v_cache, lies[6], lies[7], lies[8], lies[9], lies[10], lies[11]}};
    int64_t work = tokens * heads * (sides[0].size + sides[1].size);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && work >= LEAST_WORK)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t block = slots[t] / block_size, place = slots[t] % block_size;
        for (const Side& side : sides) {
            if (code == 0) store(side, t, heads, block, place);
            else if (dtype == 0) store_codes<float>(side, t, heads, block, place, block_size, code);
            else store_codes<labkit::bf16>(side, t, heads, block, place, block_size, code);
        }
    }
}

// size: bytes of a block; strides: bytes from block to block, one a cache
extern "C" void copy_blocks(char* const* caches, const int64_t* strides, const int64_t* sizes, const int64_t* pairs,
                            int64_t num_caches, int64_t num_pairs, int threads) {
    int64_t work = num_caches ? num_caches * num_pairs * sizes[0] : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && work >= LEAST_WORK)
    for (int64_t n = 0; n < num_caches * num_pairs; n++) {
        int64_t i = n / num_pairs, p = n % num_pairs;
        std::memcpy(caches[i] + pairs[2 * p + 1] * strides[i], caches[i] + pairs[2 * p] * strides[i], sizes[i]);
    }
}

LABKIT_REPEATABLE(store_kv)
