// Questions to policies, which are Python's, and what they must hear of. Knows numbers only; policies.py answers.

#pragma once

#include <cstdint>
#include <stdexcept>

enum Question : int64_t {  // in the order of `QUESTIONS` in policies.py
    SUBMIT,    // index, rejected -> head
    PUSH,      // serial -> head: the serial of the next of the queue, -1 if it is empty
    PARK,      // -> head; the next of the queue waits for another's prefix
    PASS,      // -> head; a policy holds the next of the queue
    PASSED,    // -> head; those that were held are back in the queue
    SETTLE,    // -> head by keys of now
    REFRESH,   // pairs (serial, cached tokens) that have changed, how many -> head by keys of now
    ADMIT,     // row, cached tokens -> head
    FIRST,     // row: it has its first token
    PREEMPT,   // row
    END,       // row
    PROGRESS,  // triples (serial, prompt tokens, output tokens), how many
    ADMISSION, // serial, budget left -> whether it may begin
    CHUNK,     // serial, budget left, the usual number -> tokens
    STEP,      // -> tokens of the step
    VICTIM,    // rows, how many -> one of them
};

enum Asked : int64_t {  // what is asked at all; any of them: Python knows the order of the queue
    KEYS = 1, DYNAMIC = 2, GROWING = 4, OF_ADMISSION = 8, OF_CHUNK = 16, OF_STEP = 32, OF_VICTIM = 64, OF_PROGRESS = 128
};

struct Board {  // what policies see of a step, up to date when they are asked; in the order of `BOARD` in policies.py
    int64_t now, step, budget, num_decoding, num_prefilling, num_free_rows, available, num_waiting, decoding, prefilling;
};

struct AskingFailed : std::runtime_error {
    AskingFailed() : std::runtime_error("Python has the error") {}
};

class Asking {
  public:
    int64_t (*answer)(int64_t, int64_t, int64_t, int64_t) = nullptr;
    Board* board = nullptr;

    virtual ~Asking() {}
    virtual void show() = 0;  // bring the board up to date

    int64_t ask(Question question, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
        show();
        int64_t found = answer(question, a, b, c);
        if (found == INT64_MIN) throw AskingFailed();
        return found;
    }
};
