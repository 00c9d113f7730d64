// SHA-256 of blocks, maps from digests, and the ghosts of evicted ones.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SHA__
#include <immintrin.h>
#endif

using i64 = int64_t;
using i32 = int32_t;
using u64 = uint64_t;
using u32 = uint32_t;

struct Digest {
    u64 word[4];
    bool operator==(const Digest& other) const { return !memcmp(word, other.word, 32); }
};

static const u32 ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#ifdef __SHA__
// The processor's own instructions take about 60 ns for 64 bytes, plain C++ four times as long.
inline void compress(u32* state, const uint8_t* data, i64 blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bll, 0x0405060700010203ll);
    __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)state), 0xB1);
    __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)(state + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
    for (; blocks > 0; blocks--, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i word[4];
        for (int i = 0; i < 4; i++)
            word[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(data + 16 * i)), swap);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m128i& now = word[i & 3];
            if (i >= 4) {
                const __m128i& last = word[(i + 3) & 3];
                now = _mm_sha256msg1_epu32(now, word[(i + 1) & 3]);
                now = _mm_add_epi32(now, _mm_alignr_epi8(last, word[(i + 2) & 3], 4));
                now = _mm_sha256msg2_epu32(now, last);
            }
            __m128i sum = _mm_add_epi32(now, _mm_loadu_si128((const __m128i*)(ROUND + 4 * i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    low = _mm_shuffle_epi32(abef, 0x1B);
    high = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i*)state, _mm_blend_epi16(low, high, 0xF0));
    _mm_storeu_si128((__m128i*)(state + 4), _mm_alignr_epi8(high, low, 8));
}
#else
inline u32 turn(u32 x, int by) { return x >> by | x << (32 - by); }

inline void compress(u32* state, const uint8_t* data, i64 blocks) {
    for (; blocks > 0; blocks--, data += 64) {
        u32 w[64], s[8];
        for (int i = 0; i < 16; i++)
            w[i] = (u32)data[4 * i] << 24 | (u32)data[4 * i + 1] << 16 | (u32)data[4 * i + 2] << 8 | data[4 * i + 3];
        for (int i = 16; i < 64; i++)
            w[i] = w[i - 16] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                   (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
        memcpy(s, state, 32);
        for (int i = 0; i < 64; i++) {
            u32 one = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) +
                      ROUND[i] + w[i];
            u32 two = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) +
                      ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            memmove(s + 1, s, 28);
            s[4] += one;
            s[0] = one + two;
        }
        for (int i = 0; i < 8; i++) state[i] += s[i];
    }
}
#endif

// The hash of a block: of its parent's hash and its tokens.
class Hasher {
    std::vector<uint8_t> message;
    i64 blocks;

  public:
    explicit Hasher(i64 block_size) {
        u64 length = 32 + 4 * block_size;
        blocks = (length + 9 + 63) / 64;
        message.assign(64 * blocks, 0);
        message[length] = 0x80;
        for (int i = 0; i < 8; i++) message[64 * blocks - 1 - i] = length * 8 >> (8 * i);
        size = block_size;
    }
    i64 size;

    Digest operator()(const Digest& parent, const i32* tokens) {
        memcpy(message.data(), parent.word, 32);
        memcpy(message.data() + 32, tokens, 4 * size);
        u32 state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
        compress(state, message.data(), blocks);
        Digest found;
        for (int i = 0; i < 8; i++) state[i] = __builtin_bswap32(state[i]);
        memcpy(found.word, state, 32);
        return found;
    }
};

// digest -> number; open addressing, removal shifts the following entries back
class Map {
    struct Entry {
        Digest key;
        i64 value = -1;  // -1: empty
    };
    std::vector<Entry> entries = std::vector<Entry>(1024);
    u64 mask = 1023;

    u64 find_place(const Digest& key) const {
        u64 at = key.word[0] & mask;
        while (entries[at].value >= 0 && !(entries[at].key == key)) at = (at + 1) & mask;
        return at;
    }

  public:
    i64 used = 0;

    i64 get(const Digest& key) const { return entries[find_place(key)].value; }

    void set(const Digest& key, i64 value) {
        Entry& entry = entries[find_place(key)];
        if (entry.value >= 0) {
            entry.value = value;
            return;
        }
        entry.key = key;
        entry.value = value;
        if (2 * ++used > (i64)mask) {
            std::vector<Entry> old(2 * (mask + 1));
            old.swap(entries);
            mask = entries.size() - 1;
            for (const Entry& one : old)
                if (one.value >= 0) entries[find_place(one.key)] = one;
        }
    }

    void erase(const Digest& key) {
        u64 at = find_place(key);
        if (entries[at].value < 0) return;
        used--;
        for (u64 next = (at + 1) & mask; entries[next].value >= 0; next = (next + 1) & mask)
            if (((next - (entries[next].key.word[0] & mask)) & mask) >= ((next - at) & mask)) {
                entries[at] = entries[next];
                at = next;
            }
        entries[at].value = -1;
    }
};

// Evicted digests, the oldest first, with the step and the request that they were evicted in and for.
class Ghosts {
    struct Ghost {
        Digest key;
        i64 step, index;
    };
    std::vector<Ghost> all;  // one is dead if the map has another place for it, or none
    u64 first = 0;
    Map place_of;

    bool alive(u64 at) const { return place_of.get(all[at].key) == (i64)at; }

  public:
    i64 size() const { return place_of.used; }

    void add(const Digest& key, i64 step, i64 index) {
        place_of.set(key, all.size());
        all.push_back({key, step, index});
    }
    void erase(const Digest& key) { place_of.erase(key); }

    void drop_oldest(i64 num) {
        for (; num > 0; first++)
            if (alive(first)) {
                place_of.erase(all[first].key);
                num--;
            }
    }
    void compact(u64 most) {
        if (all.size() <= most) return;
        std::vector<Ghost> kept;
        for (u64 at = first; at < all.size(); at++)
            if (alive(at)) kept.push_back(all[at]);
        all.swap(kept);
        first = 0;
        for (u64 at = 0; at < all.size(); at++) place_of.set(all[at].key, at);
    }
    template <class F>
    void each(F f) const {
        for (u64 at = first; at < all.size(); at++)
            if (alive(at)) f(all[at].key, all[at].step, all[at].index);
    }
};
