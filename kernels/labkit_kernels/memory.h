// Working memory of linear layers, how their columns are grouped, and where their rows are.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace labkit {

constexpr int LINE = 64;                   // bytes of a cache line
constexpr int PANEL = 32;                  // columns that are multiplied together: two vectors

inline int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Working memory of the calling thread, kept between calls.
struct Buffer {
    char* at = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(at); }
    template <class T>
    T* fit(int64_t count) {
        size_t need = (count * sizeof(T) + LINE - 1) / LINE * LINE;
        if (need > size) {
            std::free(at);
            size = need + need / 4 / LINE * LINE;
            at = static_cast<char*>(std::aligned_alloc(LINE, size));
        }
        return reinterpret_cast<T*>(at);
    }
};

inline const bf16* row_of(const void* from, int64_t row, int64_t stride) {
    return from ? static_cast<const bf16*>(from) + row * stride : nullptr;
}

}  // namespace labkit
