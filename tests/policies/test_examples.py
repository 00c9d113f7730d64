"""The examples of `lk.policies` do what they say: in an engine, in the simulator and in a replay alike."""

import random
import warnings

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.views import RequestView
from tests.harness import engine, params
from tests.policies.test_check import EXAMPLES, decisions

COST = {"constant": 0.02, "per_token": 1e-4, "per_context": 0.0}


def simulated(rows=4, num_blocks=400, **policies):
    sched = lk.Scheduler(lk.BlockManager(num_blocks), max_num_seqs=rows, max_num_batched_tokens=128, **policies)
    return lk.Engine(scheduler=sched, runner=lk.SimRunner(**COST), clock=lk.VirtualClock())


def traffic(num=32, seed=0):
    names = {"tenant": "aab", "session": "uvwxyz", "kind": ["chat", "code"], "deadline": [0.5, 5.0]}
    drawn = random.Random(seed)
    return lk.workloads.bursty(num, rate=20, output=(4, 32), seed=seed).with_extra(
        lambda i, ask: {name: drawn.choice(values) for name, values in names.items()}
    )


def submit_all(eng, workload):
    for i, ask in enumerate(workload.asks):
        eng.submit(ask.prompt, params(ask.num_output, extra_args=ask.extra), arrival=ask.arrival, id=f"r{i}")


@pytest.mark.parametrize("name", [*EXAMPLES, "DecodesFirst"])
def test_an_example_does_the_same_in_an_engine_in_a_simulation_and_in_a_replay(name):
    policies = {"step_budget": lk.policies.DecodesFirst(32)} if name == "DecodesFirst" else decisions(name)
    eng, workload = simulated(**policies), traffic()
    submit_all(eng, workload)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eng.run()
        taken = [eng.request(f"r{i}") for i in range(len(workload.asks))]
        times = [[(r.first_token_at - r.arrival) / 1e9, (r.finished_at - r.arrival) / 1e9] for r in taken]
        again = {"step_budget": lk.policies.DecodesFirst(32)} if name == "DecodesFirst" else decisions(name)
        sim = lk.study.simulate(
            workload, cost=eng.runner.cost, num_blocks=400, rows=4, budget=128, **again
        )  # fmt: skip
        replay = lk.study.what_if(eng, cost=eng.runner.cost, rows=8).before
    for found in (sim, replay):
        assert np.allclose(found.frame().sort_values("request")[["ttft", "e2e"]], times, atol=2e-9)
    plain = simulated()
    submit_all(plain, workload)
    plain.run()
    assert [plain.request(r.id).finished_at for r in taken] != [r.finished_at for r in taken], "it changed nothing"
    assert all(
        one.num_calls and not one.num_overruled for one in eng.policies.decisions.values() if one.kind != "victim"
    )


def test_policies_are_copied_for_each_run_of_an_experiment_and_stay_one_object():
    fair = lk.policies.VTC()
    mix = traffic().with_extra(lambda i, ask: {"tenant": "ab"[i % 2]})
    exp = lk.Experiment(mix, {"rows": [2, 4]}, order=fair, victim=fair.victim)
    study = exp.run(progress=False)
    assert not study.failed and fair.service == {}
    assert set(study.requests()["tenant"]) == {"a", "b"}


def pressed(seed):
    """An engine under VTC with random settings, whose tenants send more than it serves, and the bound of the paper."""
    rng = random.Random(seed)
    size, num_blocks = rng.choice([4, 16]), rng.randrange(30, 120)
    most = size * num_blocks // 4
    fair = lk.policies.VTC(prompt=rng.choice([1.0, 0.5]), output=rng.choice([1.0, 2.0, 5.0]))
    sched = lk.Scheduler(
        lk.BlockManager(num_blocks, size, prefix_caching=False), order=fair, victim=fair.victim, watermark=0.0,
        max_num_seqs=rng.choice([3, 16, 64]), max_num_batched_tokens=rng.choice([8, 64, 512]), log=lk.EventLog(keep=8),
        preemption="recompute",
    )  # fmt: skip
    eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(**COST), clock=lk.VirtualClock())
    longest = 0
    for tenant in "abc"[: rng.randrange(2, 4)]:
        begin = rng.choice([0.0, 0.0, 2.0])
        high = rng.randrange(2, most)
        for _ in range(rng.randrange(20, 40)):
            prompt = rng.randrange(1, high)
            longest = max(longest, prompt)
            eng.submit([7] * prompt, params(rng.randrange(1, most), extra_args={"tenant": tenant}), arrival=begin)
    return eng, fair, max(fair.prompt * longest, fair.output * size * num_blocks)


def served_so_far(eng, fair, tenants):
    """Counted apart from the policy: from the requests themselves."""
    total = dict.fromkeys(tenants, 0.0)
    for request in [*eng.scheduler.requests.values(), *eng.scheduler.ended.values()]:
        if request.admitted_at is not None:
            tenant = request.params.extra_args["tenant"]
            total[tenant] += fair.prompt * request.num_prompt + fair.output * request.num_output
    return total


@pytest.mark.parametrize("life", range(3))
def test_service_of_tenants_who_always_wait_differs_by_no_more_than_the_paper_says(life):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    eng, fair, bound = pressed(seed)
    tenants = sorted({r.params.extra_args["tenant"] for r in eng.arriving.values()} | set(fair.service))
    pairs = [(a, b) for a in tenants for b in tenants if a < b]
    low, high, looks = {}, {}, 0
    while eng.step() is not None:
        if eng.scheduler.step % 3:
            continue
        waiting = {r.params.extra_args["tenant"] for r in eng.scheduler.queue if r.admitted_at is None}
        if len(waiting) < 2 and looks > 5:
            break
        total = served_so_far(eng, fair, tenants)
        for a, b in pairs:
            if not {a, b} <= waiting:
                low.pop((a, b), None), high.pop((a, b), None)
                continue
            looks += 1
            gap = total[a] - total[b]
            low[a, b], high[a, b] = min(low.get((a, b), gap), gap), max(high.get((a, b), gap), gap)
            assert high[a, b] - low[a, b] <= 2 * bound, (seed, a, b, low, high, bound)
    assert looks > 3 and not any(one.num_overruled for one in eng.policies.decisions.values())


def test_without_it_the_tenant_who_sends_more_gets_more():
    shares = {}
    for order in ("fcfs", lk.policies.VTC()):
        eng = simulated(rows=8, order=order)
        for i in range(90):
            eng.submit([7] * 20, params(20, extra_args={"tenant": "b" if i % 4 else "a"}))
        while sum(r.admitted_at is None for r in eng.scheduler.queue) > 45:
            eng.step()
        got = [r.params.extra_args["tenant"] for r in eng.scheduler.ended.values()]
        shares[str(order)] = got.count("b") / got.count("a")
    by_arrival, fair = shares.values()
    assert 2.5 < by_arrival < 3.5 and 0.75 < fair < 1.34


def test_a_tenant_that_paused_does_not_catch_up():
    fair = lk.policies.VTC()
    eng = simulated(rows=2, order=fair)
    for i in range(40):
        eng.submit([7] * 20, params(10, extra_args={"tenant": "busy"}), id=f"busy {i}")
    for _ in range(100):
        eng.step()
    before = fair.service["busy"]
    for i in range(8):
        eng.submit([7] * 20, params(10, extra_args={"tenant": "late"}), id=f"late {i}")
    assert fair.service["late"] == before > 300
    shares = lk.policies.VTC(shares={"paid": 2.0})
    eng = simulated(rows=2, order=shares)
    for i in range(60):
        eng.submit([7] * 20, params(10, extra_args={"tenant": "paid" if i % 2 else "free"}))
    for _ in range(150):
        eng.step()
    got = [r.params.extra_args["tenant"] for r in eng.scheduler.ended.values()]
    assert 1.6 < got.count("paid") / got.count("free") < 2.5


def finished(eng):
    return [r.id for r in sorted(eng.scheduler.ended.values(), key=lambda r: r.finished_at)]


def test_session_affinity_goes_on_with_warm_sessions_and_forgets_nobody():
    eng = engine(max_num_seqs=1, order=lk.policies.SessionAffinity(window=60, patience=0.05), prefix_caching=False)
    first = eng.submit([1] * 4, params(4, extra_args={"session": "s"}), id="first")
    eng.submit([2] * 4, params(4, extra_args={"session": "t"}), id="cold")
    eng.submit([3] * 4, params(4, extra_args={"session": "s"}), id="warm")
    eng.submit([4] * 4, params(4), id="none")
    eng.run()
    assert finished(eng)[:2] == ["first", "warm"] and first.ended
    order = lk.policies.SessionAffinity(patience=1.0)
    order.served["s"] = 0
    early, late = (
        RequestView(lk.Request(i, np.arange(3, dtype=np.int32), params(extra_args={"session": s}), arrival=a))
        for i, s, a in (("early", "t", 0), ("late", "s", 10))
    )
    assert order(late, 10**8) < order(early, 10**8) and order(early, 2 * 10**9) <= order(late, 2 * 10**9)


def test_the_shortest_prefill_overtakes_a_long_one_half_way():
    shortest = lk.policies.ResidualShortestPrefill(aging=0)
    ends = {}
    for name, policies in {"default": {}, "shortest": {"order": shortest, "chunk": shortest.chunk}}.items():
        eng = simulated(rows=4, **policies)
        long = eng.submit([7] * 1500, params(4), id="long")
        for _ in range(3):
            eng.step()
        short = eng.submit([8] * 100, params(4), id="short")
        eng.run()
        ends[name] = short.first_token_at - short.arrival, long.first_token_at
    assert ends["shortest"][0] < ends["default"][0], ends


def test_predicted_lengths_are_learned_by_kind():
    by_length = lk.policies.PredictedLength(guess=50, aging=0, rate=0.5)
    eng = simulated(rows=1, order=by_length, victim=by_length.victim)
    for i in range(6):
        eng.submit([7] * 8, params(60 if i % 2 else 5, extra_args={"kind": "long" if i % 2 else "short"}))
    eng.run()
    assert by_length.mean["long"] > 40 > 10 > by_length.mean["short"]
    eng.submit([1] * 8, params(60, extra_args={"kind": "long"}), id="a")
    eng.submit([2] * 8, params(60, extra_args={"kind": "long"}), id="b")
    eng.submit([3] * 8, params(60, extra_args={"expected_tokens": 2}), id="c")
    eng.submit([4] * 8, params(5, extra_args={"kind": "short"}), id="d")
    eng.run()
    assert finished(eng)[-4:] in (["c", "d", "a", "b"], ["a", "c", "d", "b"])


def test_the_earliest_deadline_goes_first():
    slo = lk.policies.EarliestDeadline(default=9.0)
    eng = simulated(rows=1, order=slo, victim=slo.victim)
    for i, deadline in enumerate([None, 5.0, 1.0, 3.0]):
        extra = {} if deadline is None else {"deadline": deadline}
        eng.submit([i] * 8, params(3, extra_args=extra), id=f"{deadline}")
    eng.run()
    assert finished(eng) == ["1.0", "3.0", "5.0", "None"]
    late = lk.policies.EarliestDeadline(give_up=0.0)
    old, new = (
        RequestView(lk.Request(i, np.arange(3, dtype=np.int32), params(), arrival=a))
        for i, a in (("old", 0), ("new", 10**9))
    )
    assert late.dynamic and late(old, 0) < late(new, 0) and late(new, 15 * 10**8) < late(old, 15 * 10**8)


def test_decodes_first_bounds_the_time_between_tokens():
    between = {}
    for name, policies in {"default": {}, "decodes": {"step_budget": lk.policies.DecodesFirst(prefill=16)}}.items():
        eng = simulated(rows=8, **policies)
        talking = eng.submit([1] * 8, params(100), id="talking")
        for i in range(5):
            eng.submit([2 + i] * 300, params(2), arrival=0.2 * (i + 1))
        eng.run()
        steps = [e.duration for e in eng.log.events("Step") if e.decode_tokens]
        between[name] = max(steps) / 1e9
        assert talking.finish_reason == "length"
    assert between["decodes"] < 0.0225 < 0.03 < between["default"], between
