// A function in a second form, which takes its arguments as words of 8 bytes: repeat.cpp calls such functions one after
// the other without knowing their types. A number narrower than a word lies in its first bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace labkit {

template <class T>
T word(const int64_t* from) {
    static_assert(sizeof(T) <= sizeof *from);
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class... T, std::size_t... i>
void call_with(void (*function)(T...), const int64_t* words, std::index_sequence<i...>) {
    function(word<T>(words + i)...);
}

template <class... T>
void call_with(void (*function)(T...), const int64_t* words) {
    call_with(function, words, std::index_sequence_for<T...>{});
}

}  // namespace labkit

#define LABKIT_REPEATABLE(name) \
    extern "C" void name##_with(const int64_t* words) { labkit::call_with(name, words); }
