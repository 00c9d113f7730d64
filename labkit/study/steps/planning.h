// Which request computes how many tokens in a step, in which blocks; as in planning.py and admission.py.

#pragma once

#include "state.h"

class Planning : public State {
  public:
    using State::State;

    // -- a step: schedule ---------------------------------------------------------------------------------------------

    bool schedule() {
        blocks.step = step;
        chunks.clear();
        cut.clear();
        done.clear();
        preempted = false;
        budget = s.budget;
        if ((s.asks & DYNAMIC) && !queue.empty() && !free_rows.empty() && blocks.available()) refresh();
        if (s.asks & OF_STEP) budget = ask(STEP);
        plan_decodes();
        num_decode = planned.size();
        i64 left = budget - (i64)num_decode;
        num_joined = 0;
        if (!prefilling.empty()) left = plan_prefills(left);
        if (!queue.empty()) left = admit(left);
        if (!cut.empty() && left > 0) give_back(left);
        if (!num_decode && chunks.empty()) return false;
        settle_chunks();
        leaves.clear();
        step++;
        return true;
    }

    // What an order of now needs to know: how much of each waiting prompt is cached. Python hears of what has changed.
    void refresh() {
        scratch.clear();
        for (auto& entry : queue) {
            Request* request = entry.second;
            const std::vector<Digest>& hashes = hashes_of(request);
            blocks.find(hashes, std::max((i64)request->tokens.size() - 1, (i64)0) / s.block_size, hit);
            i64 cached = (i64)hit.size() * s.block_size;
            if (cached == request->cached) continue;
            request->cached = cached;
            scratch.push_back(request->serial);
            scratch.push_back(cached);
        }
        head = ask(REFRESH, (i64)scratch.data(), (i64)scratch.size() / 2);
    }

    void plan_decodes() {
        std::vector<i64>& entering = scratch;
        while (true) {
            planned = decoding;
            if ((i64)planned.size() > budget) take_turns();
            find_entering();
            if (entering.empty()) break;
            size_t num_before = decoding.size();
            while ((i64)entering.size() > blocks.available()) {
                i64 row = victim();
                preempt(row);
                preempted = true;
                planned.erase(std::remove(planned.begin(), planned.end(), row), planned.end());
                find_entering();
            }
            auto& taken = blocks.take((i64)entering.size(), [&](i64 i) { return rows[entering[i]].request->index; });
            for (size_t i = 0; i < entering.size(); i++) append(entering[i], taken[i]);
            if (!planned.empty() || decoding.size() == num_before) break;
        }
        for (i64 row : planned) {
            a.scheduled[row]++;
            a.last_plan[row] = step;
            rows[row].held = NOTHING;
        }
    }

    void find_entering() {
        scratch.clear();
        for (i64 row : planned)
            if (a.scheduled[row] >= a.room[row]) scratch.push_back(row);
    }

    // More decode rows than budget: those that waited longest run.
    void take_turns() {
        std::vector<i64> longest = planned;
        std::stable_sort(longest.begin(), longest.end(), [&](i64 x, i64 y) { return a.last_plan[x] < a.last_plan[y]; });
        for (size_t i = budget; i < longest.size(); i++) rows[longest[i]].held = BUDGET;
        longest.resize(budget);
        auto waits = [&](i64 row) { return std::find(longest.begin(), longest.end(), row) == longest.end(); };
        planned.erase(std::remove_if(planned.begin(), planned.end(), waits), planned.end());
    }

    i64 chunk_size(i64 gap, i64 left, bool contended) const {
        i64 count = std::min({gap, left, s.max_chunk ? s.max_chunk : gap});
        if (contended && count > s.block_size)
            count = std::min(count, std::max((i64)(left * s.prefill_share), s.block_size));
        return count;
    }

    i64 plan_prefills(i64 left) {
        i64 contenders = (i64)prefilling.size() + std::min((i64)queue.size(), (i64)free_rows.size());
        std::vector<i64> order = prefilling;
        std::sort(order.begin(), order.end(), [&](i64 one, i64 other) { return senior(one, other); });
        for (i64 row : order) {
            if (!is_prefilling(row)) continue;  // preempted for a more senior one
            contenders--;
            if (left <= 0) {
                rows[row].held = BUDGET;
                continue;
            }
            i64 start = a.scheduled[row], gap = a.num_tokens[row] - start;
            i64 count = chunk_size(gap, left, contenders > 0);
            if (s.asks & OF_CHUNK) {
                count = std::min({ask(CHUNK, rows[row].request->serial, left, count), gap, left});
                if (!count) {
                    rows[row].held = POLICY;
                    continue;
                }
            }
            i64 fitting = make_fit(row, start, count);
            if (!fitting) {
                rows[row].held = BLOCKS;
                continue;
            }
            chunks.push_back({row, start, fitting, gap});
            if (fitting == count && count < gap && !(s.asks & OF_CHUNK)) cut.push_back(chunks.size() - 1);
            left -= fitting;
        }
        return left;
    }

    bool is_prefilling(i64 row) const {
        for (i64 one : prefilling)
            if (one == row) return true;
        return false;
    }

    i64 make_fit(i64 row, i64 start, i64 count) {
        i64 room = a.room[row];
        while (blocks.available() < blocks.blocks_for(start + count) - room / s.block_size) {
            std::vector<i64> others;  // less senior, and not in this step yet
            for (i64 other : prefilling) {
                bool is_in = false;
                for (const Chunk& chunk : chunks) is_in |= chunk.row == other;
                if (!is_in && senior(row, other)) others.push_back(other);
            }
            if (others.empty()) break;
            preempt(victim_of(others));
            preempted = true;
        }
        count = std::min(count, room + blocks.available() * s.block_size - start);
        if (count > 0) grow(row, start + count);
        return std::max(count, (i64)0);
    }

    void grow(i64 row, i64 length) {
        i64 more = blocks.blocks_for(length) - a.num_blocks[row], index = rows[row].request->index;
        if (more > 0)
            for (i32 block : blocks.take(more, [=](i64) { return index; })) append(row, block);
    }

    void give_back(i64 left) {
        for (size_t at : cut) {
            Chunk& chunk = chunks[at];
            i64 room = a.room[chunk.row] + blocks.available() * s.block_size - chunk.start;
            i64 most = std::min({chunk.gap, chunk.count + left, s.max_chunk ? s.max_chunk : chunk.gap, room});
            if (most <= chunk.count) continue;
            left -= most - chunk.count;
            chunk.count = most;
            grow(chunk.row, chunk.start + chunk.count);
        }
    }

    void settle_chunks() {
        for (const Chunk& chunk : chunks) {
            a.scheduled[chunk.row] = chunk.start + chunk.count;
            a.last_plan[chunk.row] = step;
            rows[chunk.row].held = NOTHING;
            rows[chunk.row].chunk = chunk.count;
            if (chunk.count != chunk.gap) continue;
            rows[chunk.row].chunk = 0;
            done.push_back(chunk.row);
            prefilling.erase(std::find(prefilling.begin(), prefilling.end(), chunk.row));
        }
        decoding.insert(decoding.end(), done.begin(), done.end());
    }

    // -- admission ----------------------------------------------------------------------------------------------------

    i64 admit(i64 left) {
        i64 promised = 0;
        std::vector<Request*> passed;
        for (i64 row : prefilling) promised += blocks.blocks_for(a.num_tokens[row]) - a.num_blocks[row];
        while (!queue.empty()) {
            if (s.asks & GROWING) head = ask(SETTLE);
            Request* request = next();
            i64 used = 0, limit = try_admit(request, left, promised, used);
            if (limit == PENDING) continue;
            if (limit == POLICY) {
                passed.push_back(request);
                pop(request);
                head = ask(PASS);
                continue;
            }
            if (limit) {
                head_index = request->index;
                head_limit = limit;
                break;
            }
            left -= used;
            promised += blocks.blocks_for(a.num_tokens[request->row]) - a.num_blocks[request->row];
        }
        if (!passed.empty() || passed_before) {
            for (Request* request : passed) queue[place_of(request)] = request;
            head = ask(PASSED);
        }
        passed_before = !passed.empty();
        return left;
    }

    i64 try_admit(Request* request, i64 left, i64 promised, i64& used) {
        if (left <= 0) return BUDGET;
        if (preempted) return BLOCKS;
        if (free_rows.empty() || num_running() >= s.max_seqs) return ROWS;
        if ((s.asks & OF_ADMISSION) && !ask(ADMISSION, request->serial, left)) return POLICY;
        bool alone = !num_running();
        if (!alone && still_blocked(request)) return BLOCKS;
        i64 known = request->tokens.size(), usable = std::max(known - 1, (i64)0) / s.block_size;
        const std::vector<Digest>& hashes = hashes_of(request);
        blocks.find(hashes, usable, hit);
        i64 num_hit = hit.size(), revived = 0;
        if (!hashes.empty() && s.prefix_hold && num_hit < usable) {
            i64 row = pending_row.get(hashes[num_hit]);
            if (row >= 0) {
                i64 low = num_hit, high = (i64)hashes.size() - 1;
                while (low < high) {
                    i64 middle = (low + high + 1) / 2;
                    if (pending_row.get(hashes[middle]) == row)
                        low = middle;
                    else
                        high = middle - 1;
                }
                pop(request);
                parked[hashes[low]].push_back(request);
                num_parked++;
                if (s.asks) head = ask(PARK);
                return PENDING;
            }
        }
        for (i32 block : hit) revived += !a.count[block];
        i64 needed = blocks.blocks_for(known) - num_hit + revived;
        if (needed + (alone ? 0 : promised + s.watermark) > blocks.available()) {
            blocked_serial = request->serial;
            blocked_available = blocks.available();
            blocked_missing = num_hit < (i64)hashes.size();
            if (blocked_missing) blocked_hash = hashes[num_hit];
            return BLOCKS;
        }
        i64 gap = known - num_hit * s.block_size, most = -1;
        if (!s.chunked && left < std::min(gap, s.budget)) return BUDGET;
        if (s.asks & OF_CHUNK) {
            bool contended = s.chunked && queue.size() > 1 && free_rows.size() > 1;
            most = std::min({ask(CHUNK, request->serial, left, chunk_size(gap, left, contended)), gap, left});
            if (!most) return POLICY;
        }
        pop(request);
        used = place(request, left, most);
        return NOTHING;
    }

    bool still_blocked(Request* request) const {
        return blocked_serial == request->serial && blocks.available() <= blocked_available &&
               !(blocked_missing && blocks.block_of.get(blocked_hash) >= 0);
    }

    // `most` tokens are computed first, if a policy said how many; -1: none did
    i64 place(Request* request, i64 left, i64 most) {
        i64 row = free_rows.back(), known = request->tokens.size(), num_hit = hit.size();
        free_rows.pop_back();
        placed = 1;
        num_joined++;
        Row& one = rows[row];
        one.request = request;
        one.last = num_hit ? a.hash_of[hit.back()] : s.root;
        request->row = row;
        memcpy(tokens + row * tokens_width, request->tokens.data(), 4 * known);
        a.num_tokens[row] = known;
        blocks.hold(hit);
        for (i32 block : hit) append(row, block);
        a.num_computed[row] = num_hit * s.block_size;
        a.next_full[row] = s.caching ? (num_hit + 1) * s.block_size : NEVER;
        if (!request->preemptions) {
            if (s.caching) {
                num_queries++;
                num_hit_queries += num_hit > 0;
                queried += known;
                hit_tokens += num_hit * s.block_size;
            }
            request->num_cached = num_hit * s.block_size;
            request->admitted = now;
        }
        a.serial[row] = request->serial;
        a.rank[row] = request->priority;
        a.rank[s.num_rows + row] = request->arrival;
        a.rank[2 * s.num_rows + row] = request->serial;
        a.limit[row] = request->limit;
        a.no_stop_before[row] = request->num_prompt;
        a.keys[row] = request->key;
        i64 start = a.num_computed[row], gap = known - start;
        i64 count = most >= 0 ? most : chunk_size(gap, left, s.chunked && !queue.empty() && !free_rows.empty());
        grow(row, start + count);
        a.scheduled[row] = start;
        chunks.push_back({row, start, count, gap});
        if (count < gap && most < 0) cut.push_back(chunks.size() - 1);
        prefilling.push_back(row);
        if (s.asks) head = ask(ADMIT, row, num_hit * s.block_size);
        one.pending.clear();
        one.stored = 0;
        if (s.prefix_hold)
            for (size_t i = start / s.block_size; i < request->hashes.size(); i++) {
                i64 other = pending_row.get(request->hashes[i]);
                if (other < 0) pending_row.set(request->hashes[i], row);
                if (other < 0 || other == row) one.pending.push_back(request->hashes[i]);
            }
        one.known.swap(request->hashes);
        request->hashes.clear();
        request->tokens.clear();
        return count;
    }
};
