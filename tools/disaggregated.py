"""How much long prompts disturb running answers: two engines that do everything, against one that computes prompts and
one that decodes, in processor time; and what the simulator says of both.

Each engine has one thread, and its clock is the processor time of this process, so engines are run one after the other
and other processes do not count. A request reaches the decode engine when its prompt is computed and exported; taking
the blocks in counts as time of the decode engine.

    python tools/disaggregated.py --rate 6 --num 40 --rounds 2
"""

from __future__ import annotations

import argparse
import time
from collections import deque

import numpy as np

import labkit as lk
from labkit.clock import ProcessClock

OPTIONS = {"dtype": "bfloat16", "num_threads": 1, "max_num_seqs": 32, "max_model_len": 1024, "num_blocks": 1024}


def engine(**more):
    """What an engine does once, such as recording steps of every size, is not measured."""
    made = lk.Engine(**OPTIONS, **more)
    made.generate([list(range(5 + i, 200 + i)) for i in range(16)], params(24))
    made.generate(list(range(5, 900)), params(4))
    if made.blocks.offload is not None:
        made.import_blocks(made.export_blocks(list(range(5, 900))))
        made.blocks.evict()
        made.generate(list(range(5, 900)), params(4))
    made.reset_prefix_cache()
    made.clock = ProcessClock()
    return made


class Times:
    """When each request's tokens came."""

    def __init__(self) -> None:
        self.of: dict[int, list[float]] = {}

    def note(self, eng, outputs) -> None:
        now = eng.clock.now() / 1e9
        for serial in outputs.serials.tolist():
            self.of.setdefault(serial, []).append(now)


def serve(eng, asks, blocks=None):
    """Serve (index, arrival, prompt, number of tokens) with one engine; of each, the seconds to the first token and the
    gaps between tokens. `blocks` are taken in when their request arrives."""
    times, due, found = Times(), deque(sorted(asks, key=lambda ask: ask[1])), {}
    eng.listen(lambda outputs: times.note(eng, outputs))
    while due or eng.scheduler.has_work:
        while due and due[0][1] <= eng.clock.now() / 1e9:
            index, arrival, prompt, num = due.popleft()
            if blocks is not None:
                eng.import_blocks(blocks.pop(index))
            found[index] = arrival, eng.submit(list(prompt), params(num))
        if eng.scheduler.has_work:
            eng.step()
        elif due:
            eng.clock.wait_until(int(due[0][1] * 1e9) + 1)
    eng.check()
    return {i: (times.of[h.serial][0] - arrival, np.diff(times.of[h.serial])) for i, (arrival, h) in found.items()}


def params(num):
    return lk.SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)


def together(asks, **more):
    found = {}
    for part in (asks[::2], asks[1::2]):
        eng = engine(**more)
        found |= serve(eng, part)
        eng.close()
    return found


def apart(asks, costs):
    first, blocks, ready = engine(), {}, {}
    handles = {}

    def hand_over(outputs):
        for handle in outputs.ended:
            begin = time.process_time()
            index = handles[handle.id]
            blocks[index] = first.export_blocks(handle.prompt)
            costs["out"].append((blocks[index].num_bytes, len(blocks[index]), time.process_time() - begin))
            ready[index] = first.clock.now() / 1e9

    first.listen(hand_over)
    for index, arrival, prompt, _ in asks:
        handles[str(index)] = index
        first.submit(list(prompt), params(1), arrival=arrival, id=str(index))
    first.run()
    first.close()
    second = engine(num_host_blocks=1024, kv_offloading=True, kv_loading="load")
    take_in = second.import_blocks

    def timed(given):
        begin = time.process_time()
        done = take_in(given)
        costs["in"].append((given.num_bytes, len(given), time.process_time() - begin))
        return done

    second.import_blocks = timed
    found = serve(second, [(i, ready[i], prompt, num) for i, _, prompt, num in asks], blocks)
    second.close()
    return {i: (ttft + ready[i] - asks[i][1], gaps) for i, (ttft, gaps) in found.items()}


def figures(found):
    ttft = np.array([first for first, _ in found.values()])
    gaps = np.concatenate([gaps for _, gaps in found.values()])
    tpot = np.array([gaps.mean() for _, gaps in found.values()])
    pause = np.array([gaps.max() for _, gaps in found.values()])  # the longest between two tokens of a request
    return {
        "ttft_p50": np.median(ttft), "ttft_p90": np.quantile(ttft, 0.9), "itl_p50": np.median(gaps),
        "itl_p99": np.quantile(gaps, 0.99), "tpot_p50": np.median(tpot), "tpot_p90": np.quantile(tpot, 0.9),
        "pause_p50": np.median(pause), "pause_p90": np.quantile(pause, 0.9),
    }  # fmt: skip


def show(name, figures):
    print(f"{name:28}", " ".join(f"{key} {1e3 * value:7.1f}" for key, value in figures.items()), "ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second, over both engines")
    parser.add_argument("--num", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs=2, default=(300, 900))
    parser.add_argument("--output", type=int, nargs=2, default=(40, 100))
    parser.add_argument("--no-simulator", action="store_true")
    given = parser.parse_args()
    work = lk.workloads.poisson(given.num, given.rate, prompt=given.prompt, output=given.output, seed=1)
    asks = [(i, ask.arrival, ask.prompt, ask.num_output) for i, ask in enumerate(work.asks)]
    costs = {"out": [], "in": []}
    for _ in range(given.rounds):
        show("two engines", figures(together(asks)))
        show("two engines, chunks of 128", figures(together(asks, max_prefill_chunk=128)))
        show("one prefill, one decode", figures(apart(asks, costs)))
    for what, rows in costs.items():
        num_bytes, num_blocks, seconds = map(sum, zip(*rows, strict=True))
        print(f"{what:4} {num_bytes / seconds / 1e6:.0f} MB/s, {1e6 * seconds / num_blocks:.1f} us a block", flush=True)
    if given.no_simulator:
        return
    eng = engine()
    size, per_token = eng.blocks.block_size, eng.block_form.num_bytes / eng.blocks.block_size
    fitted = lk.calibrate(eng, num=24)
    eng.close()
    seconds = sum(row[2] for rows in costs.values() for row in rows)
    bandwidth = sum(row[0] for row in costs["out"]) / seconds
    place = lk.study.Disaggregated(1, 1, per_token, bandwidth=bandwidth, latency=1e-4, first_token="decode")
    study = lk.study.cluster(
        work, [2, place], ["round_robin"], runner=fitted.runner, num_blocks=OPTIONS["num_blocks"], block_size=size,
        max_num_seqs=OPTIONS["max_num_seqs"],
    )  # fmt: skip
    print("simulated, seconds:")
    frame = study.frame().set_index("replicas")
    print(frame[[name for name in frame.columns if name.startswith(("ttft", "tpot", "itl"))]].T.to_string())


if __name__ == "__main__":
    main()
