"""Who is preempted: named policies, functions, functions that fail, a fair order that stays fair."""

import io
import math
import warnings

import numpy as np
import pytest

import labkit as lk
from labkit.core.events.types import Preempted
from labkit.core.scheduling import policy, preempt
from tests.harness import assert_right, engine, params, run


def text(log) -> str:
    log.save(file := io.StringIO())
    return file.getvalue()


def crowded(seed=0, num=18, **options):
    """An engine whose pool is too small for its rows, and its requests."""
    rng = np.random.default_rng(seed)
    options = {"blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 20, "log": lk.EventLog(keep=None), **options}
    eng = engine(**options)
    made = [
        eng.submit(
            rng.integers(0, 50, rng.integers(2, 30)).tolist(), params(int(rng.integers(4, 40))), id=f"r{i}",
            arrival=0.02 * int(rng.integers(0, 6)), priority=int(rng.integers(0, 2)),
        )
        for i in range(num)
    ]  # fmt: skip
    return eng, made


def served(**options):
    eng, requests = crowded(**options)
    run(eng)
    assert_right(eng, *requests)
    assert all(request.finish_reason == "length" for request in requests)
    assert eng.scheduler.num_preempted > 2
    return eng


@pytest.mark.parametrize("seed", range(3))
def test_the_default_is_what_its_function_says(seed):
    by_columns, by_calls = served(seed=seed), served(seed=seed, victim=lambda r, now: policy.latest(r, now))
    assert text(by_columns.log) == text(by_calls.log)


@pytest.mark.parametrize("victim", ["order", "least_computed", "most_computed"])
@pytest.mark.parametrize("order", ["sjf", "lpm", "priority"])
def test_named_policies_take_whom_they_say(victim, order, monkeypatch):
    chosen = []
    original = preempt.choose

    def choose(s, rows, now):
        row = original(s, rows, now)
        chosen.append((s, s.row_request[row], [s.row_request[r] for r in rows.tolist()], now))
        largest = {
            "order": lambda r: s.queue.last(r, now),
            "least_computed": lambda r: -r.num_tokens,
            "most_computed": lambda r: r.num_tokens,
        }[victim]
        best = max(largest(r) for r in chosen[-1][2])
        equals = [r for r in chosen[-1][2] if largest(r) == best]
        assert chosen[-1][1] is max(equals, key=lambda r: policy.latest(r, now))
        return row

    monkeypatch.setattr(preempt, "choose", choose)
    served(victim=victim, order=order)
    assert any(len(among) > 2 for _, _, among, _ in chosen)


@pytest.mark.parametrize(
    ("bad", "says"),  # and the decision is the default's
    [
        (lambda r, now: 1 / 0, "division by zero"),
        (lambda r, now: math.nan, "nan for 'r"),
        (lambda r, now: "late", "'late' for 'r"),
        (lambda r, now: (1, 2) if r.serial % 2 else 1, "for 'r"),
        (lambda r: 1, "positional"),
    ],
    ids=["raises", "nan", "text", "mixed", "signature"],
)
def test_a_policy_that_fails_is_named_and_the_default_decides(bad, says):
    bad.__name__ = "mine"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        served(victim=bad)
    told = [str(one.message) for one in caught]
    assert told and all("victim policy 'mine' was overruled" in one for one in told), told
    assert says in told[0] and "took the latest" in told[0]


def test_a_policy_is_asked_only_when_one_must_be_preempted():
    def never(request, now):
        raise AssertionError("nobody is preempted")

    eng, _ = crowded(blocks=400, victim=never)
    run(eng)
    assert eng.scheduler.num_preempted == 0


def test_it_can_change_while_the_engine_runs():
    eng, _ = crowded()
    for victim in ("most_computed", policy.least_computed, "latest"):
        eng.control(victim=victim)
        for _ in range(4):
            eng.step()
    told = [(e.setting, e.value) for e in eng.log.events("Control")]
    assert told == [("victim", "most_computed"), ("victim", "least_computed"), ("victim", "latest")]
    with pytest.raises(ValueError, match="did you mean 'latest'"):
        eng.control(victim="lates")
    with pytest.raises(ValueError, match="victim must be a name or"):
        lk.Scheduler(lk.BlockManager(4), victim=3)
    run(eng)


def test_a_snapshot_and_what_if_keep_it():
    eng, _ = crowded(victim="most_computed")
    snapshot = eng.snapshot()
    eng.control(victim="latest")
    eng.restore(snapshot)
    assert eng.scheduler.victim is policy.most_computed
    sim = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(20, prefix_caching=False), victim="most_computed", max_num_seqs=8),
        runner=lk.SimRunner(), clock=lk.VirtualClock(),
    )  # fmt: skip
    for i in range(10):
        sim.submit([1] * 20, lk.SamplingParams(max_tokens=60, ignore_eos=True), id=f"r{i}")
    sim.run()
    found = lk.study.what_if(sim, victim="latest")
    victims = [{e.request for e in log.events(Preempted)} for log in (sim.log, found.after.log)]
    assert victims[0] != victims[1] and found.before.log.events(Preempted) == sim.log.events(Preempted)


class Counter:
    """VTC: the client with the least service first. 1 for a token of input, 2 for one of output."""

    dynamic = True

    def __init__(self):
        self.service, self.running, self.tokens = {"a": 0, "b": 0}, {}, {}

    def __call__(self, request, now):
        self.tokens[request.id] = request.num_prompt
        return (self.service[request.id[0]], request.arrival)

    def listen(self, batches):
        for batch in batches:
            for event in batch.events:
                if event[0] == "Admitted":
                    self.service[event[1][0]] += self.tokens[event[1]]
                if event[0] in ("Admitted", "Resumed"):
                    self.running[event[1]] = True
                elif event[0] in ("Finished", "Preempted"):
                    self.running.pop(event[1], None)
            if batch.row is not None:
                for name in self.running:
                    self.service[name[0]] += 2


def overloaded(victim, seed, steps=330):
    """Both clients send more than their share: the largest difference of service while both wait, each client's
    service, and the number of preemptions."""
    rng = np.random.default_rng(seed)
    order = Counter()
    eng = engine(blocks=224, max_num_seqs=64, max_num_batched_tokens=256, order=order, victim=victim,
                 prefix_caching=False, runner=lk.SimRunner(constant=0.02))  # fmt: skip
    eng.log.subscribe(order.listen)
    for client, rate in {"a": 16, "b": 32}.items():
        for i in range(10 * rate):
            prompt, most = [7] * int(rng.integers(14, 19)), int(rng.integers(30, 35))
            eng.submit(prompt, params(most), id=f"{client}:{i}", arrival=i / rate)
    largest = 0
    for _ in range(steps):
        eng.step()
        if {request.id[0] for request in eng.scheduler.queue} == {"a", "b"}:
            largest = max(largest, abs(order.service["a"] - order.service["b"]))
    return largest, order.service, eng.scheduler.num_preempted


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fair_order_stays_fair_when_the_victim_is_last_in_order(seed):
    bound = 2 * max(18, 2 * 224 * 4)  # of VTC's paper: the longest input, and the tokens that fit into memory
    largest, service, preempted = overloaded("order", seed)
    _, unfair, _ = overloaded("latest", seed)
    print(seed, bound, largest, service, unfair, preempted)
    assert preempted > 100 and largest <= bound
    assert 0.95 < service["b"] / service["a"] < 1.05 < unfair["b"] / unfair["a"]
