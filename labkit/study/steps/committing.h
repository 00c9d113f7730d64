// What happens when a step is over; as in committing.py.

#pragma once

#include "planning.h"

class Steps : public Planning {
  public:
    using Planning::Planning;

    void commit() {
        full.clear();
        for (size_t i = 0; i < num_decode; i++) {
            i64 row = planned[i];
            a.num_computed[row] = a.scheduled[row];
            if (a.scheduled[row] >= a.next_full[row]) full.push_back(row);
        }
        for (const Chunk& chunk : chunks) {
            a.num_computed[chunk.row] = chunk.start + chunk.count;
            if (a.num_computed[chunk.row] >= a.next_full[chunk.row]) full.push_back(chunk.row);
        }
        bool together = full.size() > 8;  // then `FullBlocks` stores rows with several blocks first
        for (int turn = 0; turn < 1 + together; turn++)
            for (i64 row : full) {
                bool several = a.num_computed[row] - a.next_full[row] >= s.block_size;
                if (!together || several == !turn) store(row);
            }
        settle_prefills();
        draw();
        finish();
        if (s.asks & OF_PROGRESS) report();
    }

    void store(i64 row) {
        Row& one = rows[row];
        const i32 *blocks_of = table + row * table_width, *known = tokens + row * tokens_width;
        i64 depth = a.next_full[row] / s.block_size - 1, stop = a.num_computed[row] / s.block_size;
        for (; depth < stop; depth++) {
            const i32* mine = known + depth * s.block_size;
            Digest digest = depth < (i64)one.known.size() ? one.known[depth] : blocks.hash(one.last, mine);
            blocks.store(blocks_of[depth], digest, one.last, depth ? blocks_of[depth - 1] : 0, depth, mine);
            one.last = digest;
        }
        a.next_full[row] = (stop + 1) * s.block_size;
    }

    void settle_prefills() {
        for (const Chunk& chunk : chunks)
            settle_pending(chunk.row, a.num_tokens[chunk.row] / s.block_size - a.num_computed[chunk.row] / s.block_size);
        for (i64 row : done)
            if (rows[row].request->first < 0) {
                rows[row].request->first = now;
                if (s.asks) ask(FIRST, row);
            }
    }

    // What a SimRunner draws: a hash of the request's key and the token's position.
    void draw() {
        planned.insert(planned.end(), done.begin(), done.end());
        for (i64 row : planned) {
            u64 x = a.keys[row] + (u64)a.num_tokens[row] * MIX[2];
            x = (x ^ (x >> 30)) * MIX[0];
            x = (x ^ (x >> 27)) * MIX[1];
            tokens[row * tokens_width + a.num_tokens[row]] = (i32)((x ^ (x >> 31)) % (u64)s.vocab);
            widen(++a.num_tokens[row]);
        }
    }

    void finish() {
        bool any = false;
        for (i64& row : decoding) {
            if (a.num_tokens[row] < a.limit[row]) continue;
            Request* request = rows[row].request;
            i64 num = a.num_tokens[row] - request->num_prompt;
            ended.push_back({request->index, request->arrival, request->admitted, request->first, now, request->num_prompt,
                             request->num_cached, num, request->preemptions});
            if (request->awaited) {
                const i32* all = tokens + row * tokens_width;
                answers.emplace_back(all, all + a.num_tokens[row]);
                answered.push_back(ended.size() - 1);
            }
            if (s.asks) ask(END, row);
            num_finished++;
            num_output += num;
            forget_pending(row);
            close_row(row);
            delete request;
            row = -1;
            any = true;
        }
        if (any) decoding.erase(std::remove(decoding.begin(), decoding.end(), -1), decoding.end());
    }

    // What the step computed, by request.
    void report() {
        i64 size = 0;
        of_step.resize(3 * (planned.size() + chunks.size()));
        auto add = [&](i64 row, i64 prompt, i64 output) {
            i64* one = &of_step[3 * size++];
            one[0] = a.serial[row], one[1] = prompt, one[2] = output;
        };
        for (size_t i = 0; i < num_decode; i++) add(planned[i], 0, 1);
        for (const Chunk& chunk : chunks) add(chunk.row, chunk.count, chunk.count == chunk.gap);
        ask(PROGRESS, (i64)of_step.data(), size);
    }

    // -- what a simulation looks at ------------------------------------------------------------------------------------

    void look(i64 began) {
        volatile double seconds = (double)(now - began) / 1e9, product = (double)blocks.used() * seconds;  // not fused
        busy += seconds;
        used_time += product;
        most_used = std::max(most_used, blocks.used());
        if (!queue.empty()) waiting_time += seconds;
        num_rows += (i64)(num_decode + chunks.size());
        if (step - marked < s.look_every) return;
        points.push_back({now, step, queried, hit_tokens, num_output, blocks.used(), num_waiting(), num_running()});
        marked = step;
    }

    bool adds_up() const {
        return num_submitted == num_running() + num_waiting() + num_finished + num_rejected;
    }
};
