// Paged attention over keys and values in 8 bits, with scales.

#include "../repeat.h"
#include "attend.h"

namespace {

template <class T>
void run_on(const Call& call) {
    switch (call.code) {
        case 1: return run<T, labkit::int8>(call);
        case 2: return run<T, labkit::e4m3>(call);
        default: return run<T, labkit::e5m2>(call);
    }
}

}  // namespace

extern "C" void paged_attention_float32(const Call* call) { run_on<float>(*call); }
extern "C" void paged_attention_bfloat16(const Call* call) { run_on<bf16>(*call); }

LABKIT_REPEATABLE(paged_attention_float32)
LABKIT_REPEATABLE(paged_attention_bfloat16)
