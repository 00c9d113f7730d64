// Samples one token from each row of logits. Takes pointers and strides, no torch headers.
//
// A row is read once into float32 and never sorted as a whole. A filter's threshold is found by bisection: counting
// how many logits (or how much probability) lie above a value is one pass at vector speed. The first few passes go
// over the row, later ones over the candidates between the last two values, and the last few thousand candidates are
// sorted. Only tokens that pass the filters are hashed. A greedy row is one pass.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../simd.h"
#include "../threads.h"

namespace {

using labkit::bf16;
using labkit::vf;
using labkit::vi;
using labkit::vu;
using labkit::W;

constexpr int64_t FEW = 2048;      // candidates that are sorted rather than halved
constexpr int PASSES = 7;          // halvings by passes over the row, before candidates are gathered
constexpr int64_t CHUNK = 4 * W;   // looked at together: mostly none of them passes
constexpr int64_t LEAST_WORK = 1 << 18;  // logits (16 a drawn one) below which another thread is not worth waking
constexpr float LOG2E = 1.4426950408889634f;

struct Call {
    const void* logits;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* key;
    int64_t* out;
    int64_t row_stride, num_rows, vocab_size, num_threads;
};

struct Scratch {
    std::vector<float> scaled, kept, weights, values, shares;
    std::vector<int32_t> ids;
};

vu mix(vu x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// -log of a draw from the exponential distribution, a hash of (key, id): `reference.exponential`, number for number.
vf gumbel(vu ids, int64_t key) {
    const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
    vu hashed = mix(mix((ids * 0x9e3779b1u) ^ low) ^ high);
    vf uniform = (__builtin_convertvector(hashed, vf) + 0.5f) * 0x1p-32f;
    uniform = labkit::min(uniform, labkit::splat(1.f - 0x1p-24f));
    vf rest = 1.f - uniform, lost = 1.f - rest;  // log1p: what rounding did to `rest` is divided out
    vf draw = lost == 0.f ? uniform : -labkit::logv(rest) * uniform / (lost == 0.f ? labkit::splat(1.f) : lost);
    return -labkit::logv(draw);
}

// The largest of values[0 .. n), n a multiple of W, and the first place it stands at; ids: the places' names, or null.
struct Best {
    float value;
    int64_t id;
};

template <class Value>
Best first_largest(int64_t n, const Value& value) {
    vf best = labkit::splat(-INFINITY);
    vi block = {};
    for (int64_t i = 0; i < n; i += W) {
        vf x = value(i);
        block = x > best ? (vi{} + static_cast<int32_t>(i)) : block;
        best = labkit::max(best, x);
    }
    Best found{-INFINITY, 0};
    bool any = false;
    for (int j = 0; j < W; j++)
        if (best[j] > found.value || (any && best[j] == found.value && block[j] + j < found.id)) {
            found = {best[j], block[j] + j};
            any = true;
        }
    return found;
}

// Sum of `weights` (null: 1 each) over values >= threshold.
double mass(const float* values, const float* weights, int64_t n, float threshold) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 64 * W) {  // short float sums, one long double sum
        vf sum = {};
        const int64_t end = std::min(n, begin + 64 * W);
        for (int64_t i = begin; i < end; i += W) {
            vf weight = weights ? labkit::load(weights + i) : labkit::splat(1.f);
            sum += labkit::load(values + i) >= threshold ? weight : vf{};
        }
        total += labkit::reduce_sum(sum);
    }
    return total;
}

bool any_from(const float* values, float threshold) {
    vf largest = labkit::load(values);
    for (int64_t j = W; j < CHUNK; j += W) largest = labkit::max(largest, labkit::load(values + j));
    int found = 0;
    vi above = largest >= threshold;
    for (int j = 0; j < W; j++) found |= above[j];
    return found != 0;
}

// The largest value at and above which `need` lies; minus infinity if all of it is less. Values are padded to whole
// chunks with minus infinity.
float border(const float* values, const float* weights, int64_t n, double need, float largest, Scratch& s) {
    float above = INFINITY, below = largest;  // mass from `above` up is less than `need`, from `below` up it is not
    double base = 0, enclosed = 0;
    for (float step = 0.5f;; step *= 2) {
        const double found = mass(values, weights, n, below);
        enclosed = found - base;
        if (found >= need) break;
        if (!(step < 1e30f)) return -INFINITY;
        above = below;
        base = found;
        below = largest - step;
    }
    for (int i = 0; i < PASSES && (weights || enclosed > FEW); i++) {
        const float middle = below + (std::min(above, largest) - below) / 2;
        const double found = mass(values, weights, n, middle);
        enclosed = found >= need ? found - base : enclosed - (found - base);
        if (found >= need) {
            below = middle;
        } else {
            above = middle;
            base = found;
        }
    }
    auto& candidates = s.values;
    auto& shares = s.shares;
    candidates.clear();
    shares.clear();
    for (int64_t begin = 0; begin < n; begin += CHUNK)
        if (any_from(values + begin, below))
            for (int64_t i = begin; i < begin + CHUNK; i++)
                if (values[i] >= below && values[i] < above) {
                    candidates.push_back(values[i]);
                    shares.push_back(weights ? weights[i] : 1.f);
                }
    while (static_cast<int64_t>(candidates.size()) > FEW) {
        const float middle = below + (std::min(above, largest) - below) / 2;
        if (!(middle > below && middle < above)) break;
        double from_middle = base;
        for (size_t i = 0; i < candidates.size(); i++) from_middle += candidates[i] >= middle ? shares[i] : 0.f;
        const bool enough = from_middle >= need;
        size_t left = 0;
        for (size_t i = 0; i < candidates.size(); i++)
            if ((candidates[i] >= middle) == enough) {
                candidates[left] = candidates[i];
                shares[left++] = shares[i];
            }
        candidates.resize(left);
        shares.resize(left);
        if (enough) below = middle;
        else above = middle, base = from_middle;
    }
    std::vector<int32_t>& order = s.ids;
    order.resize(candidates.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return candidates[a] > candidates[b]; });
    double sum = base;
    for (int32_t i : order) {
        sum += shares[i];
        if (sum >= need) return candidates[i];
    }
    return below;
}

// What passes a threshold, in order, padded to whole chunks. Returns how many, padding included.
int64_t keep(const float* values, int64_t n, float threshold, std::vector<float>& kept, std::vector<int32_t>& ids) {
    kept.clear();
    ids.clear();
    for (int64_t begin = 0; begin < n; begin += CHUNK)
        if (any_from(values + begin, threshold))
            for (int64_t i = begin; i < begin + CHUNK; i++)
                if (values[i] >= threshold) {
                    kept.push_back(values[i]);
                    ids.push_back(i);
                }
    while (kept.size() % CHUNK) {
        kept.push_back(-INFINITY);
        ids.push_back(0);
    }
    return kept.size();
}

template <class T>
int64_t draw(const Call& call, int64_t row, Scratch& s) {
    const T* logits = static_cast<const T*>(call.logits) + row * call.row_stride;
    const int64_t vocab = call.vocab_size, whole = vocab / W * W;
    const float temperature = call.temperature[row];
    if (temperature == 0.f) {
        Best best = first_largest(whole, [&](int64_t i) { return labkit::load(logits + i); });
        for (int64_t i = whole; i < vocab; i++)
            if (labkit::to_float(logits[i]) > best.value) best = {labkit::to_float(logits[i]), i};
        return best.id;
    }
    const int64_t padded = (vocab + CHUNK - 1) / CHUNK * CHUNK;
    if (static_cast<int64_t>(s.scaled.size()) < padded) s.scaled.resize(padded);
    float* scaled = s.scaled.data();
    vf largest_lanes = labkit::splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += W) {
        vf x = labkit::load(logits + i) / temperature;
        labkit::store(scaled + i, x);
        largest_lanes = labkit::max(largest_lanes, x);
    }
    float largest = labkit::reduce_max(largest_lanes);
    for (int64_t i = whole; i < padded; i++) {
        scaled[i] = i < vocab ? labkit::to_float(logits[i]) / temperature : -INFINITY;
        largest = std::max(largest, scaled[i]);
    }
    if (!(largest > -INFINITY)) return 0;

    float threshold = -INFINITY;
    if (call.min_p[row] > 0.f) threshold = largest + std::log(call.min_p[row]);
    const int64_t k = call.top_k[row];
    if (k > 0 && k < vocab) threshold = std::max(threshold, border(scaled, nullptr, padded, k, largest, s));
    const float* values = scaled;
    int64_t n = padded;
    bool compact = threshold > -INFINITY;
    std::vector<int32_t> ids;
    if (compact) {
        n = keep(scaled, padded, threshold, s.kept, ids);
        values = s.kept.data();
    }
    if (call.top_p[row] < 1.f) {
        s.weights.resize(std::max<size_t>(s.weights.size(), n));
        for (int64_t i = 0; i < n; i += W)
            labkit::store(s.weights.data() + i, labkit::exp2v((labkit::load(values + i) - largest) * LOG2E));
        const double need = call.top_p[row] * mass(values, s.weights.data(), n, -INFINITY);
        const float least = border(values, s.weights.data(), n, need, largest, s);
        if (least > threshold) {
            std::vector<int32_t> chosen;
            std::vector<float> kept;
            const int64_t m = keep(values, n, least, kept, chosen);
            for (int64_t i = 0; i < m && compact; i++) chosen[i] = ids[chosen[i]];
            s.kept.swap(kept);
            ids.swap(chosen);
            values = s.kept.data();
            n = m;
            compact = true;
        }
    }
    vu lanes;
    for (int j = 0; j < W; j++) lanes[j] = j;
    const int64_t key = call.key[row];
    if (compact) {
        const Best best = first_largest(n, [&](int64_t i) {
            return labkit::load(values + i) + gumbel(labkit::load_bits<vu>(ids.data() + i), key);
        });
        return ids[best.id];
    }
    return first_largest(n, [&](int64_t i) {
               return labkit::load(values + i) + gumbel(lanes + static_cast<uint32_t>(i), key);
           })
        .id;
}

template <class T>
void run(const Call& call) {
    int64_t work = 0;
    for (int64_t row = 0; row < call.num_rows; row++)
        work += call.vocab_size * (call.temperature[row] == 0.f ? 1 : 16);
    const int64_t threads = std::max<int64_t>(1, std::min({work / LEAST_WORK, call.num_threads, call.num_rows}));
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        static thread_local Scratch scratch;
        for (int64_t row = next++; row < call.num_rows; row = next++) call.out[row] = draw<T>(call, row, scratch);
    };
    if (threads == 1) {
        loop();
    } else {
#pragma omp parallel num_threads(threads)
        loop();
    }
}

}  // namespace

extern "C" void sample_float32(const Call* call) { run<float>(*call); }
extern "C" void sample_bfloat16(const Call* call) { run<bf16>(*call); }
