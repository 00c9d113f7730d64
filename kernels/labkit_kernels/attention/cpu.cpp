// Paged attention over keys and values in the dtype of the queries.

#include "../repeat.h"
#include "attend.h"

extern "C" void paged_attention_float32(const Call* call) { run<float, float>(*call); }
extern "C" void paged_attention_bfloat16(const Call* call) { run<bf16, bf16>(*call); }

LABKIT_REPEATABLE(paged_attention_float32)
LABKIT_REPEATABLE(paged_attention_bfloat16)
