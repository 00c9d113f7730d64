"""How well a simulator, calibrated to one workload on the embedded model, predicts others: python tools/fidelity.py

Each workload has an engine of its own. Time is the processor time of the engine's thread, and the engines take turns
every 0.2 s of it, so that other work on the machine slows all of them alike (--wall: real time, one after the other, on
a machine that is otherwise idle). With --fastest-of N each forward is computed N times, which changes nothing, and the
fastest counts: what neighbours take from the caches and the memory is then neither in the log that is fitted nor in the
figures that are predicted. The rates follow the speed of the machine, measured first. Each round draws its workloads
anew: which requests meet in a step is luck, and one drawing's longest waits would repeat it in every round. The table
has the median error of the rounds, and how far the real figures of the rounds are apart.
"""

import argparse
import io
import pickle
import statistics
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import labkit as lk
from labkit.clock import Clock
from labkit.engine.build import build
from labkit.study.serving import Served, serve

SETTINGS = {"num_blocks": 800, "max_num_seqs": 32, "max_num_batched_tokens": 512}
NAMES = ("output_tokens_per_s", "ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90", "e2e_p50", "hit_rate", "preemptions")
FITTED = "fitted"
TURN = 200_000_000  # ns
RATED = 2700.0  # output tokens/s of the machine for which the rates below were chosen


def workloads(seed: int, speed: float) -> dict[str, lk.Workload]:
    """The first one is calibrated to; `speed` multiplies all rates."""
    poisson, chats, mixed = lk.workloads.poisson, lk.workloads.chats, lk.workloads.mixed
    found = {
        FITTED: mixed(
            chats(24, rate=8, think=0.3, output=(16, 64), seed=seed), poisson(80, rate=15, output=(16, 96), seed=seed)
        ),
        "chats and requests": mixed(
            chats(20, rate=8, think=0.3, output=(16, 64), seed=seed + 100),
            poisson(40, rate=12, output=(16, 64), seed=seed + 100),
        ),
        "requests, 25 a second": poisson(150, rate=25, prompt=(16, 200), output=(16, 64), seed=seed + 200),
        "shared prefixes": lk.workloads.shared_prefixes(100, prefixes=4, prefix=256, rate=20, seed=seed + 300),
    }
    return {
        name: lk.Workload(name, tuple(replace(ask, arrival=ask.arrival / speed) for ask in workload.asks))
        for name, workload in found.items()
    }


class Turns:
    """Threads that run one at a time, each until it has used `TURN` of processor time."""

    def __init__(self, names: list[str]) -> None:
        self.waiting = list(names)
        self.changed = threading.Condition()

    def begin(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def hand_on(self, name: str, again: bool) -> None:
        with self.changed:
            self.waiting.remove(name)
            if again:
                self.waiting.append(name)
            self.changed.notify_all()


class ThreadClock:
    """The processor time of the thread that reads it; waiting is skipped, and so are forwards that do not count. Hands
    the turn on when it is used up."""

    def __init__(self, name: str, turns: Turns, fastest_of: int = 1) -> None:
        self.name, self.turns, self.fastest_of = name, turns, fastest_of
        self.skipped = self.turn_ends = 0

    def now(self) -> int:
        return time.thread_time_ns() + self.skipped

    def watch(self, runner: lk.TorchRunner) -> None:
        """From now on only the fastest of several equal forwards takes time."""
        forward = runner._forward

        def fastest(*given: Any) -> Any:
            took = []
            for _ in range(self.fastest_of):
                begin = time.thread_time_ns()
                out = forward(*given)
                took.append(time.thread_time_ns() - begin)
            self.skipped -= sum(took) - min(took)
            return out

        runner._forward = fastest  # type: ignore[method-assign]

    def advance(self, seconds: float) -> None:
        if time.thread_time_ns() > self.turn_ends:
            self.turns.hand_on(self.name, again=True)
            self.turns.begin(self.name)
            self.turn_ends = time.thread_time_ns() + TURN

    def wait_until(self, when: int) -> None:
        self.skipped += max(0, when - self.now())


def engine(clock: Clock, dtype: str) -> lk.Engine:
    parts = build(None, **SETTINGS, dtype=dtype, log=lk.EventLog(keep=None))
    torch.set_num_threads(1)
    eng = lk.Engine(scheduler=parts.scheduler, runner=parts.runner, tokenizer=parts.tokenizer, clock=clock)
    eng.runner.capture_all(2048)  # first steps are slow
    if isinstance(clock, ThreadClock) and clock.fastest_of > 1:
        clock.watch(parts.runner)
    eng.generate([[1, 2, 3]] * 4, lk.SamplingParams(max_tokens=8, ignore_eos=True))
    return eng


def by_turns(works: dict[str, lk.Workload], dtype: str, fastest_of: int) -> dict[str, tuple[Served, lk.EventLog]]:
    turns = Turns(list(works))
    found = {}

    def run(name: str) -> None:
        turns.begin(name)
        try:
            eng = engine(ThreadClock(name, turns, fastest_of), dtype)
            eng.blocks.reset()
            found[name] = serve(works[name], eng), eng.log
            eng.close()
        finally:
            turns.hand_on(name, again=False)

    threads = [threading.Thread(target=run, args=(name,)) for name in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in works}


def one_after_another(works: dict[str, lk.Workload], dtype: str) -> dict[str, tuple[Served, lk.EventLog]]:
    found = {}
    for name, workload in works.items():
        eng = engine(lk.WallClock(), dtype)
        eng.blocks.reset()
        found[name] = serve(workload, eng), eng.log
        eng.close()
    return found


def measured_speed(dtype: str, fastest_of: int) -> float:
    """This machine's output tokens a processor second, of 32 requests at once."""
    turns = Turns(["speed"])
    eng = engine(ThreadClock("speed", turns, fastest_of), dtype)
    found = serve(lk.workloads.poisson(32, rate=1e6, prompt=(100, 100), output=(64, 64)), eng).metrics
    eng.close()
    return found["output_tokens_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--fastest-of", type=int, default=1, metavar="N")
    parser.add_argument("--speed", type=float, help="multiplies the rates; measured if not given")
    parser.add_argument("--dtype", help="of the model: bfloat16 where the processor multiplies it, else float32")
    parser.add_argument("--keep", type=Path, help="a file for the logs and figures, to look at with --look")
    parser.add_argument("--look", type=Path, help="a file written by --keep, instead of serving")
    args = parser.parse_args()
    if args.wall and args.fastest_of > 1:
        parser.error("--fastest-of is for processor time: leave out --wall")
    if args.look:
        rounds = pickle.loads(args.look.read_bytes())
    else:
        dtype = args.dtype or ("bfloat16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "float32")
        speed = args.speed or measured_speed(dtype, args.fastest_of) / RATED
        print(f"{dtype}, rates times {speed:.2f}", flush=True)
        run = one_after_another if args.wall else partial(by_turns, fastest_of=args.fastest_of)
        rounds = []
        for seed in range(args.rounds):
            works = workloads(seed, speed)
            found = run(works, dtype)
            rounds.append({name: (works[name], served.metrics, saved(log)) for name, (served, log) in found.items()})
            if args.keep:
                args.keep.write_bytes(pickle.dumps(rounds))
    show(rounds)


def saved(log: lk.EventLog) -> str:
    log.save(file := io.StringIO())
    return file.getvalue()


def show(rounds: list) -> None:
    figures = []
    for i, found in enumerate(rounds):
        calibration = lk.calibrate(lk.EventLog.load(io.StringIO(found[FITTED][2])))
        if not i:
            print(calibration.report())
        figures.append(
            {
                name: (real, lk.study.simulate(work, cost=calibration.runner.cost, **SETTINGS).metrics)
                for name, (work, real, _) in found.items()
            }
        )
    print(f"\n{'median error (spread of the real figure)':42}" + "".join(f"{name:>22}" for name in figures[0]))
    for metric in NAMES:
        cells = []
        for name in figures[0]:
            pairs = [found[name] for found in figures]
            real = [one[metric] for one, _ in pairs]
            if not any(real):
                cells.append("none" if not any(other[metric] for _, other in pairs) else "0, not simulated so")
                continue
            errors = [other[metric] / one[metric] - 1 for one, other in pairs if one[metric]]
            spread = (max(real) - min(real)) / statistics.median(real)
            cells.append(f"{statistics.median(errors):+.1%} ({spread:.1%})")
        print(f"{metric:42}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
