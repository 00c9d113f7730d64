// Sums, gathers and messages among the processes of one host, through memory that all of them have mapped.
//
// A sum in one step: each rank copies its numbers to a buffer of its own, says so in a counter, waits for the counters of
// the others, and adds up all buffers in the order of ranks, in float32, so that every rank has the same bits. From LONG
// numbers on in two: each rank adds up its part of them, and reads the others' parts where they have put them. It has to
// wait twice, and each number is added once instead of once by each rank; the bits are the same.
// There are two sets of buffers: a rank that writes into a set has seen that all others have read what was in it. Whoever
// waits spins for a few microseconds, then yields, because ranks may share a core, and looks at the clock and at `broken`
// now and then.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <sched.h>
#include <unistd.h>

namespace {

constexpr int SPINS = 400, LOOKS = 64;
constexpr int64_t LINE = 64, PAGE = 4096, LONG = 32768;
enum { OK = 0, LATE = 1, BROKEN = 2 };

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

std::atomic<int64_t>& counter(char* base, int64_t i) { return *reinterpret_cast<std::atomic<int64_t>*>(base + i * LINE); }

// Waits until `value` is at least `least`.
int wait(const std::atomic<int64_t>& value, int64_t least, const std::atomic<int64_t>& broken, double seconds,
         double* waited) {
    if (value.load(std::memory_order_acquire) >= least) return OK;
    const double begin = now();
    int result = OK;
    for (int64_t i = 0;; i++) {
        if (value.load(std::memory_order_acquire) >= least) break;
        if (i < SPINS) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            continue;
        }
        sched_yield();
        if (i % LOOKS) continue;
        if (broken.load(std::memory_order_relaxed)) { result = BROKEN; break; }
        const double spent = now() - begin;
        if (spent > seconds) { result = LATE; break; }
        if (spent > 0.002) usleep(50);
    }
    *waited += now() - begin;
    return result;
}

float wide(float x) { return x; }
float wide(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
void narrow(float x, float* y) { *y = x; }
void narrow(float x, uint16_t* y) {  // to bfloat16, to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *y = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// out = the sum over ranks of from[rank], plus `residual`; and the same in `copy`, if it is given.
template <class T>
void add(const T* const* from, int ranks, const T* residual, T* out, T* copy, int64_t n) {
    constexpr int64_t STEP = 1024;
#pragma omp parallel for if (n > 65536)
    for (int64_t first = 0; first < n; first += STEP) {
        const int64_t num = n - first < STEP ? n - first : STEP;
        float sum[STEP];
        for (int rank = 0; rank < ranks; rank++) {
            const T* x = from[rank] + first;
            if (rank == 0)
                for (int64_t i = 0; i < num; i++) sum[i] = wide(x[i]);
            else
                for (int64_t i = 0; i < num; i++) sum[i] += wide(x[i]);
        }
        if (residual)
            for (int64_t i = 0; i < num; i++) sum[i] += wide(residual[first + i]);
        for (int64_t i = 0; i < num; i++) narrow(sum[i], out + first + i);
        if (copy) memcpy(copy + first, out + first, num * sizeof(T));
    }
}

struct Group {  // the memory of a group: a page of counters (0: broken, 1 + rank: arrived), then 2 x ranks buffers
    char* base;
    int rank, ranks;
    int64_t size;
    char* buffer(int64_t turn, int of) const { return base + PAGE + ((turn & 1) * ranks + of) * size; }
    int meet(int64_t turn, double seconds, double* waited, int* missing) const {
        counter(base, 1 + rank).store(turn, std::memory_order_release);
        for (int other = 0; other < ranks; other++) {
            if (other == rank) continue;
            *missing = other;
            if (const int failed = wait(counter(base, 1 + other), turn, counter(base, 0), seconds, waited)) return failed;
        }
        return OK;
    }
};

struct Wait {
    double seconds;
    double* waited;
    int* missing;
};

template <class T>
int one_step(const Group& group, int64_t* turn, const T* x, const T* residual, T* out, int64_t n, Wait how) {
    const T* from[PAGE / LINE];
    for (int of = 0; of < group.ranks; of++) from[of] = reinterpret_cast<const T*>(group.buffer(*turn + 1, of));
    memcpy(group.buffer(++*turn, group.rank), x, n * sizeof(T));
    if (const int failed = group.meet(*turn, how.seconds, how.waited, how.missing)) return failed;
    add(from, group.ranks, residual, out, static_cast<T*>(nullptr), n);
    return OK;
}

template <class T>
int two_steps(const Group& group, int64_t* turn, const T* x, const T* residual, T* out, int64_t n, Wait how) {
    const auto part = [&](int of) { return of == group.ranks ? n : n * of / group.ranks / 32 * 32; };
    const auto buffer = [&](int64_t at, int of) { return reinterpret_cast<T*>(group.buffer(at, of)); };
    const int64_t begin = part(group.rank), end = part(group.rank + 1);
    const T* from[PAGE / LINE];
    ++*turn;
    T* mine = buffer(*turn, group.rank);
    memcpy(mine, x, begin * sizeof(T));
    memcpy(mine + end, x + end, (n - end) * sizeof(T));
    for (int of = 0; of < group.ranks; of++) from[of] = (of == group.rank ? x : buffer(*turn, of)) + begin;
    if (const int failed = group.meet(*turn, how.seconds, how.waited, how.missing)) return failed;
    ++*turn;
    add(from, group.ranks, residual ? residual + begin : nullptr, out + begin, buffer(*turn, group.rank) + begin,
        end - begin);
    if (const int failed = group.meet(*turn, how.seconds, how.waited, how.missing)) return failed;
    for (int of = 0; of < group.ranks; of++)
        if (of != group.rank)
            memcpy(out + part(of), buffer(*turn, of) + part(of), (part(of + 1) - part(of)) * sizeof(T));
    return OK;
}

template <class T>
int reduce(const Group& group, int64_t* turn, const T* x, const T* residual, T* out, int64_t n, Wait how) {
    const int64_t most = group.size / int64_t(sizeof(T));
    const auto sum = n < LONG ? one_step<T> : two_steps<T>;
    for (int64_t first = 0; first < n; first += most) {
        const int64_t num = n - first < most ? n - first : most;
        const T* more = residual ? residual + first : nullptr;
        if (const int failed = sum(group, turn, x + first, more, out + first, num, how)) return failed;
    }
    return OK;
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16. `out` may be `x` or `residual`. Returns 0, 1 (a rank, *missing, was late) or 2 (broken).
int all_reduce(char* base, int rank, int ranks, int64_t size, int64_t* turn, int dtype, const void* x,
               const void* residual, void* out, int64_t n, double seconds, double* waited, int* missing) {
    const Group group{base, rank, ranks, size};
    if (dtype == 0)
        return reduce(group, turn, static_cast<const float*>(x), static_cast<const float*>(residual),
                      static_cast<float*>(out), n, {seconds, waited, missing});
    return reduce(group, turn, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(residual),
                  static_cast<uint16_t*>(out), n, {seconds, waited, missing});
}

// out[i] = the bytes of rank i.
int all_gather(char* base, int rank, int ranks, int64_t size, int64_t* turn, const char* x, char* out, int64_t bytes,
               double seconds, double* waited, int* missing) {
    const Group group{base, rank, ranks, size};
    for (int64_t first = 0; first < bytes; first += size) {
        const int64_t num = bytes - first < size ? bytes - first : size;
        ++*turn;
        memcpy(group.buffer(*turn, rank), x + first, num);
        if (const int failed = group.meet(*turn, seconds, waited, missing)) return failed;
        for (int of = 0; of < ranks; of++) memcpy(out + of * bytes + first, group.buffer(*turn, of), num);
    }
    return OK;
}

// A pipe: a page of counters (0: broken, 1: pieces written, 2: pieces read), then `pieces` pieces of `size` bytes.
int pipe_send(char* base, int64_t pieces, int64_t size, const char* x, int64_t bytes, double seconds, double* waited) {
    auto &written = counter(base, 1), &read = counter(base, 2);
    for (int64_t first = 0; first < bytes; first += size) {
        const int64_t at = written.load(std::memory_order_relaxed);
        if (const int failed = wait(read, at - pieces + 1, counter(base, 0), seconds, waited)) return failed;
        memcpy(base + PAGE + (at % pieces) * size, x + first, bytes - first < size ? bytes - first : size);
        written.store(at + 1, std::memory_order_release);
    }
    return OK;
}

int pipe_receive(char* base, int64_t pieces, int64_t size, char* out, int64_t bytes, double seconds, double* waited) {
    auto &written = counter(base, 1), &read = counter(base, 2);
    for (int64_t first = 0; first < bytes; first += size) {
        const int64_t at = read.load(std::memory_order_relaxed);
        if (const int failed = wait(written, at + 1, counter(base, 0), seconds, waited)) return failed;
        memcpy(out + first, base + PAGE + (at % pieces) * size, bytes - first < size ? bytes - first : size);
        read.store(at + 1, std::memory_order_release);
    }
    return OK;
}

}  // extern "C"
