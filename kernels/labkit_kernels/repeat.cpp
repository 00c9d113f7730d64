// Makes recorded calls one after the other, without going back to Python between them.
#include <cstdint>

struct Call {
    void (*function)(const int64_t* words);  // see repeat.h
    const int64_t* words;
};

extern "C" void repeat(const Call* calls, int64_t number) {
    for (int64_t i = 0; i < number; i++) calls[i].function(calls[i].words);
}
