"""Requests that the simulator serves in a second, and block touches of cache replays: python tools/simulator_speed.py

Seconds are processor time of this process, the least of several repeats, so that other work on the machine counts less.
Chat traffic as in docs/simulator.md: 256 rows, prompts of 200 tokens, answers of 100 to 300, 8,192 blocks. What makes
the requests is part of the time. `--policies` compares the examples of `lk.policies` with first come, first served, in
C++ and in Python, in turns. `--million` serves a million of them and shows that memory does not grow.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np

import labkit as lk
from labkit.core.events.log import NoLog
from labkit.runner.cost import LinearCost
from labkit.study.caches.foresight import Clairvoyant
from labkit.study.caches.replaying import KINDS, Batch, PythonReplay, new_replay
from labkit.study.incoming import Arrivals, Incoming
from labkit.study.served import Served
from labkit.study.simulation import Simulator
from labkit.study.steps.native import ENDLESS
from labkit.study.traces.trace import Columns

HOW = ("C++", "FastForward", "step by step")
LINEAR = LinearCost(constant=2e-3, per_token=1e-5, per_context=1e-8)


def chats(num: int, rate: float, seed: int = 0) -> Iterator[Incoming]:
    """Drawn a thousand at a time."""
    rng, at = np.random.default_rng(seed), 0.0
    for first in range(0, num, 1000):
        times = at + np.cumsum(rng.exponential(1 / rate, 1000))
        prompts = rng.integers(0, 32_000, (1000, 200)).astype(np.int32)
        outputs = rng.integers(100, 301, 1000).tolist()
        at = float(times[-1])
        for i, (time_of, prompt, output) in enumerate(zip(times.tolist(), prompts, outputs, strict=True), first):
            if i < num:
                yield Incoming(time_of, i, prompt, output)


def policies() -> dict[str, dict[str, object]]:
    """Settings by name; the objects are new for each call."""
    p = lk.policies
    vtc, shortest, length, deadline = p.VTC(), p.ResidualShortestPrefill(), p.PredictedLength(), p.EarliestDeadline()
    return {
        "fcfs": {},
        "DecodesFirst": {"step_budget": p.DecodesFirst()},
        "EarliestDeadline": {"order": deadline, "victim": deadline.victim},
        "PredictedLength": {"order": length, "victim": length.victim},
        "ResidualShortestPrefill": {"order": shortest, "chunk": shortest.chunk},
        "SessionAffinity": {"order": p.SessionAffinity()},
        "VTC": {"order": vtc, "victim": vtc.victim},
    }


def told(num: int, rate: float) -> Iterator[Incoming]:
    """Chats that tell policies what these ask for."""
    for one in chats(num, rate, seed=1):
        i = one.index
        extra = {"tenant": i % 3, "session": i % 97, "kind": "ab"[i % 2], "deadline": 0.5 + i % 5}
        yield one._replace(extra=extra)


def simulated(num: int, rate: float, caching: bool, cost: object, how: str = "C++", policy: str = "") -> float:
    """Requests a second."""
    runner = lk.SimRunner(cost=cost)
    blocks = lk.BlockManager(num_blocks=8192, prefix_caching=caching)
    scheduler = lk.Scheduler(
        blocks, log=NoLog(), max_num_seqs=256, max_num_batched_tokens=8192, **(policies()[policy] if policy else {})
    )
    simulator = Simulator(scheduler, runner, Served(False))
    if how == "step by step":
        simulator.forward.step = lambda now: None
    begin = time.process_time()
    simulator.run(Arrivals(told(num, rate) if policy else chats(num, rate)), ENDLESS if how == "C++" else 0)
    assert simulator.served.num == num
    return num / (time.process_time() - begin)


def compare_policies(num: int, repeats: int) -> None:
    print(f"{'requests/s, the best of ' + str(repeats):44}{'C++':>10}{'FastForward':>13}{'step by step':>14}")
    simulated(100, 120, True, LINEAR, "C++", "VTC")  # builds and imports
    for rate in (120, 200):  # with and without a queue that grows; its length is part of what a dynamic order costs
        for name in policies():
            rates = [[simulated(num, rate, True, LINEAR, how, name) for how in HOW] for _ in range(repeats)]
            cpp, ahead, steps = (max(one) for one in zip(*rates, strict=True))
            print(f"{f'{name}, {rate}/s':44}{cpp:>10,.0f}{ahead:>13,.0f}{steps:>14,.0f}", flush=True)


def touches(policy: object, num: int = 40_000, capacity: int = 10_000) -> tuple[float, float]:
    """Block touches a second of a policy object in a cache study, in C++ and in Python."""
    rng = np.random.default_rng(0)
    heads = [tuple(range(1000 * i, 1000 * i + 12)) for i in range(400)]
    batch, first = [], 10**6
    for head in rng.zipf(1.2, num) % len(heads):
        fresh = int(rng.integers(4, 30))
        batch.append((*heads[head], *range(first, first + fresh)))
        first += fresh
    rates = []
    for make, some in ((new_replay, num), (PythonReplay, num // 8)):
        ends = np.cumsum([0, *map(len, batch[:some])])
        flat = np.array([digest for one in batch[:some] for digest in one], np.int64)
        zeros, arrival = np.zeros(some, np.int64), np.arange(some, dtype=np.float64)
        given, asked = Batch(Columns(arrival, zeros, zeros, ends, flat, zeros, (None,) * some)), np.ones(some, bool)
        given.requests  # noqa: B018 - lists for Python are not part of its time
        replay = make(policy(), capacity, False)
        begin = time.process_time()
        replay.add(given, asked)
        rates.append(len(flat) / (time.process_time() - begin))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", action="store_true", help="only the examples of lk.policies")
    parser.add_argument("--million", action="store_true", help="also serve a million requests, and show the memory")
    asked = parser.parse_args()
    if asked.policies:
        return compare_policies(asked.requests, asked.repeats)
    h100 = lk.study.AnalyticCost.of("llama-3.1-8b", "H100")
    begin = time.process_time()
    for _ in chats(asked.requests, 800):
        pass
    took = (time.process_time() - begin) / asked.requests
    print(f"making a request takes {took * 1e6:.1f} us, of which the simulator knows nothing")
    print(f"{'requests/s, the best of ' + str(asked.repeats):44}{'C++':>10}{'FastForward':>13}{'step by step':>14}")
    for cost, name in ((LINEAR, "linear cost"), (h100, "8B on H100")):
        for caching in (True, False):
            for rate in (800, 200):
                best = max(simulated(asked.requests, rate, caching, cost) for _ in range(asked.repeats))
                line = f"{name}, prefix cache {'on' if caching else 'off'}, {rate}/s"
                slow = [f"{simulated(1500, rate, caching, cost, how):,.0f}" for how in ("FastForward", "step by step")]
                print(f"{line:44}{best:>10,.0f}{slow[0]:>13}{slow[1]:>14}", flush=True)
    print(f"\n{'block touches/s, 10,000 blocks':44}{'C++':>10}{'Python':>13}")
    for policy in KINDS:
        if policy is not Clairvoyant:  # needs the future, see lk.study.prefix
            rates = [touches(policy) for _ in range(asked.repeats)]
            fast, slow = (max(one[i] for one in rates) for i in (0, 1))
            print(f"{policy.name:44}{fast:>10,.0f}{slow:>13,.0f}", flush=True)
    if asked.million:
        for num in (100_000, 1_000_000):
            rate = simulated(num, 100, True, LINEAR)  # more than 160 a second would wait in ever longer queues
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{num:,} requests in {num / rate:.1f} s: {rate:,.0f} requests/s, at most {memory:.0f} MiB so far")


if __name__ == "__main__":
    main()
