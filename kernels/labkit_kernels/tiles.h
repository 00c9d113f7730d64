// Tile registers of x86 (AMX): eight of 16 rows x 64 bytes, and their product of bfloat16 pairs. Linux enables them
// for a process on request.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define LABKIT_TILES 1
#else
#define LABKIT_TILES 0
#endif

namespace amx {

using labkit::bf16;

constexpr int TILE = 16;           // rows of a tile register; each holds 32 bfloat16 or 16 float32
constexpr int DEPTH = 32;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// The kernel hands out AMX on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool available() {
    static const bool granted = __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

// Tiles are configured while one of these lives, in the thread that made it.
struct Tiles {
    Tiles() {
        static const TileConfig config = [] {
            TileConfig c;
            for (int i = 0; i < 8; i++) {
                c.bytes[i] = 64;
                c.rows[i] = TILE;
            }
            return c;
        }();
        // Through a memory clobber: some compilers otherwise drop the stores that fill the configuration.
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// 32 values of a row of which so many are left, then zeros.
inline __m512i load_row(const bf16* at, int64_t left) {
    if (left >= DEPTH) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi16((1u << left) - 1, at);
}

}  // namespace amx
