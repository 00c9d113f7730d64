// The attention that keys get, on a CPU, for a few queries: each key is read once for each query and head. With many
// queries torch's products are faster, see cpu.py.

#include <cmath>
#include <cstdint>
#include <vector>

#include "../simd.h"

namespace {

using namespace labkit;

constexpr int64_t LEAST_WORK = 1 << 16;  // products below which one thread is faster than waking another

struct Keys {
    const int32_t* table;
    int64_t block_size, block, slot;  // strides in elements
};

// W scores at a time: each key's products are summed in a vector, and a transpose turns W of them into one.
template <class T>
void scores(const T* q, const T* k, const Keys& keys, int64_t length, int64_t size, float scale, float* out) {
    for (int64_t first = 0; first < length; first += W) {
        vf sums[W];
        float rest[W] = {};
        for (int64_t i = 0; i < W; i++) {
            sums[i] = splat(0.f);
            int64_t at = first + i;
            if (at >= length) continue;
            const T* key = k + keys.table[at / keys.block_size] * keys.block + at % keys.block_size * keys.slot;
            int64_t d = 0;
            for (; d + W <= size; d += W) sums[i] += load(q + d) * load(key + d);
            for (; d < size; d++) rest[i] += to_float(q[d]) * to_float(key[d]);
        }
        transpose(sums);
        vf total = load(rest);
        for (int i = 0; i < W; i++) total += sums[i];
        store(out + first, total * scale);
    }
}

// Adds softmax(scores) to mass. Scores are in powers of two.
void add_softmax(float* s, float* mass, int64_t length) {
    vf most = splat(-INFINITY);
    for (int64_t i = length; i % W; i++) s[i] = -INFINITY;
    for (int64_t i = 0; i < length; i += W) most = max(most, load(s + i));
    const float top = reduce_max(most);
    vf sum = splat(0.f);
    for (int64_t i = 0; i < length; i += W) {
        vf p = exp2v(load(s + i) - top);
        sum += p;
        store(s + i, p);
    }
    const float scale = 1.f / reduce_sum(sum);
    for (int64_t i = 0; i < length; i++) mass[i] += s[i] * scale;
}

template <class T>
void attention_mass(const T* q, const T* k, const int32_t* table, const int32_t* query_start, const int32_t* seq_len,
                    float* out, int64_t sequences, int64_t heads, int64_t group, int64_t size, int64_t longest,
                    int64_t block_size, int64_t q_token, int64_t q_head, int64_t k_block, int64_t k_head,
                    int64_t k_slot, int64_t table_row, float scale, int threads) {
    const int64_t work = sequences * heads * group * longest * size;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && work >= LEAST_WORK)
    for (int64_t n = 0; n < sequences * heads; n++) {
        const int64_t i = n / heads, h = n % heads, end = query_start[i + 1];
        const Keys keys{table + i * table_row, block_size, k_block, k_slot};
        std::vector<float> s(longest + W);
        for (int64_t t = query_start[i]; t < end; t++) {
            const int64_t seen = seq_len[i] - (end - 1 - t);
            if (seen <= 0) continue;
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                scores(q + t * q_token + g * q_head, k + h * k_head, keys, seen, size, scale, s.data());
                add_softmax(s.data(), out + n * longest, seen);
            }
        }
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. out [sequences, heads, longest] is zero.
extern "C" void attention_mass(const void* q, const void* k, const void* table, const void* query_start,
                               const void* seq_len, void* out, int64_t sequences, int64_t heads, int64_t group,
                               int64_t size, int64_t longest, int64_t block_size, int64_t q_token, int64_t q_head,
                               int64_t k_block, int64_t k_head, int64_t k_slot, int64_t table_row, double scale,
                               int dtype, int threads) {
    auto run = [&](auto t) {
        using T = decltype(t);
        attention_mass((const T*)q, (const T*)k, (const int32_t*)table, (const int32_t*)query_start,
                       (const int32_t*)seq_len, (float*)out, sequences, heads, group, size, longest, block_size, q_token,
                       q_head, k_block, k_head, k_slot, table_row, (float)(scale * M_LOG2E), threads);
    };
    dtype == 0 ? run(float{}) : run(bf16{});
}
