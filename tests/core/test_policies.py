"""Functions that decide: what they see and may not change, what happens when they fail, what they hear of."""

import io
import random
import threading
import warnings

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling import policy
from labkit.core.scheduling.views import Progress, RequestView
from tests.harness import assert_right, engine, params, run


def text(log) -> str:
    log.save(file := io.StringIO())
    return file.getvalue()


def served(num=24, seed=0, length=30, **options):
    """An engine that has served random requests, and these."""
    rng = np.random.default_rng(seed)
    options = {"blocks": 20, "max_num_seqs": 6, "max_num_batched_tokens": 24, "log": lk.EventLog(keep=None), **options}
    eng = engine(**options)
    requests = [
        eng.submit(
            rng.integers(0, 50, rng.integers(1, length)).tolist(), params(int(rng.integers(1, 20))), id=f"r{i}",
            arrival=0.02 * int(rng.integers(0, 8)),
        )
        for i in range(num)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(eng)
    assert_right(eng, *requests)
    assert all(request.finish_reason == "length" for request in requests)
    eng.scheduler.check_idle()
    return eng


SAME = {
    "order": lambda request, now: request.arrival,
    "admission": lambda request, view: True,
    "step_budget": lambda view: view.budget,
    "victim": lambda request, now: (request.priority, request.arrival, request.serial),
}


def test_policies_that_say_what_the_default_does_give_the_same_log():
    plain, asked = served(), served(**SAME)
    assert text(plain.log) == text(asked.log)
    assert not plain.policies and repr(plain.policies) == "Policies(all built in)"
    assert set(asked.policies.decisions) == set(SAME)
    assert all(one.num_calls for one in asked.policies.decisions.values())


def test_built_in_policies_are_called_as_they_are():
    eng = engine(order="sjf", victim="most_computed")
    assert eng.scheduler.queue.order is policy.sjf and eng.scheduler.victim is policy.most_computed
    assert not eng.policies and eng.policies.of_step is False


def attempts(view, names):
    for name in names:
        with pytest.raises(AttributeError, match=r"a policy reads|does not see|object has no"):
            setattr(view, name, 1)
        with pytest.raises(AttributeError):
            delattr(view, name)


def test_what_a_policy_sees_cannot_be_changed():
    seen = []

    def look(request, view):
        attempts(request, ["priority", "_request", "new", "extra"])
        attempts(view, ["left", "budget", "new"])
        for array in (request.prompt, request.tokens):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        with pytest.raises(TypeError, match=r"cannot be changed|does not support item assignment"):
            request.params.extra_args["tenant"] = "b"
        with pytest.raises(TypeError):
            request.extra["tenant"] = "b"
        for hidden in ("tables", "hashes", "host_blocks", "samples"):
            with pytest.raises(AttributeError, match="does not see"):
                getattr(request, hidden)
        assert view.left <= view.budget == 24 and view.free_rows > 0 and view.free_blocks <= view.num_blocks == 64
        assert request in view.waiting and request not in view.running and len({*view.waiting}) == view.num_waiting
        assert view.num_running == view.num_decoding + view.num_prefilling == len(view.running)
        assert request.prefill_left == request.num_tokens - request.num_computed > 0
        seen.append((request.id, request.extra["tenant"], view.step, view.context, repr(request), repr(view)))
        return True

    eng = engine(admission=look, max_num_batched_tokens=24, prefix_caching=False)
    for i in range(6):
        eng.submit([i] * 12, params(3, extra_args={"tenant": "a"}), id=f"r{i}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(eng)
    assert [name for name, *_ in seen] == [f"r{i}" for i in range(6)] and seen[-1][3] > 0


@pytest.mark.parametrize("kind", ["admission", "chunk", "step_budget", "victim", "order", "progress", "admitted"])
@pytest.mark.parametrize("fails", ["raises", "wrong type", "writes"])
def test_a_policy_that_fails_is_overruled_and_told_of_once(kind, fails):
    """Every third call, so that the default decides only in between."""
    calls = [0]

    def moody(*given):
        calls[0] += 1
        if calls[0] % 3 or (kind == "order" and given[0].serial < 0):  # at submission it is refused
            return {"admission": True, "chunk": 4, "step_budget": 20}.get(kind, 0)
        if fails == "raises":
            raise KeyError("no such tenant")
        if fails == "writes":
            given[0].priority = 3
        return "soon"

    class Hears:
        def __call__(self, request, now):
            return request.arrival

    if kind in ("progress", "admitted"):
        setattr(Hears, kind, lambda self, *given: moody(*given))
        options = {"order": Hears()}
    else:
        moody.dynamic = True
        options = {kind: moody}
    eng = served(**options)
    found = eng.policies.heard[kind][0] if kind in eng.policies.heard else eng.policies.decisions[kind]
    assert calls[0] > 40 or kind in ("victim", "admitted")
    if fails == "wrong type" and kind in ("progress", "admitted"):
        assert not found.num_overruled  # nobody asks what they return
        return
    told = eng.log.events("Overruled")
    assert found.num_overruled >= 2 or kind == "victim", found
    assert [event.decision for event in told] == [kind]
    error = {"raises": "no such tenant", "wrong type": "soon", "writes": "attribute|cannot set"}[fails]
    assert any(part in told[0].error for part in error.split("|")) and told[0].error in repr(eng.policies)


def test_an_order_that_fails_at_submission_refuses_that_request_alone():
    eng = engine(order=lambda request, now: request.extra["deadline"])
    with pytest.raises(KeyError, match="deadline"):
        eng.submit([1], params())
    request = eng.submit([1, 2], params(extra_args={"deadline": 3}))
    run(eng)
    assert eng.scheduler.num_submitted == 1 and request.finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"admission": lambda request, view: False},
        {"chunk": lambda request, view: 0},
        {"step_budget": lambda view: 0},
        {"admission": lambda request, view: False, "chunk": lambda request, view: 0, "step_budget": lambda view: 0},
    ],
    ids=lambda options: "+".join(options),
)
def test_policies_cannot_stop_the_engine(options):
    eng = served(num=8, **options)
    told = eng.log.events("Overruled")
    assert {event.decision for event in told} == set(options)
    assert all("left the engine idle" in event.error for event in told)
    if "step_budget" not in options:
        assert any("policy" in eng.log.why(f"r{i}").limits() for i in range(8))


def test_who_is_held_waits_for_arrivals_before_the_policy_is_overruled():
    """Admit only in pairs: a policy may keep an idle engine waiting for what is to come."""
    eng = engine(admission=lambda request, view: view.num_waiting + view.num_prefilling >= 2, prefix_caching=False)
    requests = [eng.submit([i] * 5, params(3), arrival=0.5 * i) for i in range(4)]
    run(eng)
    assert [request.admitted_at // 10**8 for request in requests] == [5, 5, 15, 15]
    assert not eng.log.events("Overruled")


def test_a_request_that_is_passed_over_lets_others_go_first():
    closed = {"late"}
    eng = engine(admission=lambda request, view: request.id not in closed, max_num_seqs=2, prefix_caching=False)
    late = eng.submit([9] * 8, params(2), id="late")
    others = [eng.submit([i] * 8, params(4)) for i in range(4)]
    for _ in range(8):
        eng.step()
        eng.check()
    assert all(other.ended for other in others) or late.admitted_at is None
    assert late.admitted_at is None and eng.log.why("late").limits()["policy"] >= 2
    closed.clear()
    run(eng)
    assert late.finish_reason == "length" and not eng.log.events("Overruled")


def test_chunks_are_of_the_size_that_the_policy_says():
    sizes = []

    def chunk(request, view):
        sizes.append(min(3, view.left, request.prefill_left))
        return 3

    eng = served(chunk=chunk, length=60, num=8, prefix_caching=False)
    assert eng.log.frame("Scheduled")["num_tokens"].max() <= 3
    assert sum(event.prefill_tokens for event in eng.log.events("Step")) >= sum(len(r.prompt) for r in ended(eng))
    with pytest.raises(ValueError, match="needs chunked_prefill"):
        engine(chunk=chunk, chunked_prefill=False)
    with pytest.raises(ValueError, match="chunk must be None or f"):
        engine(chunk=7)


def ended(eng):
    return list(eng.scheduler.ended.values())


def test_a_step_has_no_more_tokens_than_its_budget():
    allowed = []

    def budget(view):
        allowed.append(max(1, view.num_decoding // 2) + 3)
        return allowed[-1]

    eng = served(step_budget=budget)
    steps = eng.log.events("Step")
    assert all(one.prefill_tokens + one.decode_tokens <= max(allowed) for one in steps)
    assert max(one.prefill_tokens + one.decode_tokens for one in steps) > 3
    assert eng.log.events("Held")


class Growing:
    """Service by group, as columns; its keys only grow."""

    growing = True

    def __init__(self):
        self.service, self.group_of, self.steps, self.gone = {0: 0, 1: 0, 2: 0}, {}, [], []

    def __call__(self, request, now):
        return (self.service[request.num_prompt % 3], request.arrival)

    def admitted(self, request, now):
        self.group_of[request.serial] = request.num_prompt % 3
        self.service[request.num_prompt % 3] += request.num_prompt

    def progress(self, step):
        assert isinstance(step, Progress)
        for serial, tokens in zip(step.serials.tolist(), step.output_tokens.tolist(), strict=True):
            if serial in self.group_of:  # else it was admitted before this order was set
                self.service[self.group_of[serial]] += 2 * tokens
        self.steps.append(step)
        self.gone += [one.id for one in step.ended]


def first_by_all_keys(eng, chosen):
    """Compare the queue's choice with the least of all keys, each time somebody is taken from it."""
    queue = eng.scheduler.queue
    pop = queue.pop

    def checked():
        keys = [(queue.order.function(RequestView(one), 0), one.serial) for one in queue]
        request = pop()
        chosen.append((queue.order.function(RequestView(request), 0), request.serial) == min(keys))
        return request

    queue.pop = checked


@pytest.mark.parametrize("seed", range(3))
def test_an_order_whose_keys_grow_chooses_as_if_it_was_asked_for_all_before_every_choice(seed):
    rng, order, chosen = np.random.default_rng(seed), Growing(), []
    eng = engine(order=order, max_num_seqs=4, max_num_batched_tokens=32, blocks=40)
    first_by_all_keys(eng, chosen)
    requests = [eng.submit(rng.integers(0, 50, rng.integers(1, 20)).tolist(), params(6)) for _ in range(120)]
    run(eng)
    assert_right(eng, *requests)
    assert len(chosen) >= 120 and all(chosen)
    produced = sum(int(step.output_tokens.sum()) for step in order.steps)
    assert produced == sum(request.num_output for request in requests)
    assert sum(int(step.prompt_tokens.sum()) for step in order.steps) >= sum(
        request.num_prompt - request.num_cached for request in requests
    )
    assert sorted(order.gone) == sorted(request.id for request in requests if request.id in order.gone)
    assert len(order.gone) >= len(requests) - 4  # those of the last step are told with the next one


def test_one_object_that_makes_several_decisions_hears_of_a_step_once():
    order = Growing()
    eng = served(order=order, victim=order.__call__)
    assert len(order.steps) == len(eng.log.events("Step"))
    assert len(eng.policies.heard["progress"]) == 1


def test_policies_change_live_and_come_back_with_a_snapshot():
    eng = engine(max_num_batched_tokens=24)
    requests = [eng.submit([i] * 30, params(5)) for i in range(6)]
    eng.step()
    order = Growing()
    eng.control(order=order, admission=lambda request, view: True, chunk=lambda request, view: 2, step_budget=None)
    assert [e.setting for e in eng.log.events("Control")] == ["order", "admission", "chunk", "step_budget"]
    eng.step()
    snapshot = eng.snapshot()
    run(eng)
    first = text(eng.log)
    eng.restore(snapshot)
    assert eng.scheduler.queue.order is eng.policies.decisions["order"]
    run(eng)
    assert text(eng.log) == first and all(request.finish_reason == "length" for request in requests)
    eng.control(order="fcfs", admission=None, chunk=None)
    assert not eng.policies and not eng.policies.of_step
    with pytest.raises(ValueError, match="admission must be None or f"):
        eng.control(admission="all")


def test_a_fork_of_the_engine_has_policies_of_its_own():
    eng = engine(order=Growing())
    eng.submit([1] * 9, params(5))
    other = eng.fork()
    run(other)
    mine, theirs = (one.policies.decisions["order"].function for one in (eng, other))
    assert mine.steps == [] and len(theirs.steps) == 5


def test_a_policy_whose_object_cannot_be_copied_is_shared():
    order = Growing()
    order.lock = threading.Lock()
    eng = engine(order=order)
    assert eng.policies.fresh()["order"] is order


def test_what_a_policy_costs_is_measured():
    eng = served(admission=lambda request, view: sum(range(2000)) > 0)
    decision = eng.policies.decisions["admission"]
    assert decision.num_calls > 20 and decision.spent > decision.slowest > 1000
    assert "us each, slowest" in repr(eng.policies)


def test_a_policy_that_takes_long_is_warned_of_once():
    ticks = iter(range(0, 10**15, 400_000_000))
    eng = engine(admission=lambda request, view: True)
    eng.policies.meter = lambda: next(ticks)
    for i in range(4):
        eng.submit([i], params(3))
    with pytest.warns(UserWarning, match=r"'<lambda>' takes 400 ms a call, 1\.2 s so far: nothing") as caught:
        run(eng)
    assert len(caught) == 1


@pytest.mark.parametrize("lag", [0, 2])
def test_random_policies_break_no_law(lag):
    """Policies that say anything, and sometimes fail, with little memory, forks, swaps and aborts."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for life in range(5):
        rng = random.Random(seed + life)

        def wild(choices, rng=rng):
            def decide(*given):
                what = rng.choice(choices)
                if what == "raise":
                    raise RuntimeError("moody")
                return what

            return decide

        order = wild([0, 1, (2), "raise"]) if rng.random() < 0.5 else Growing()
        if not isinstance(order, Growing):
            order.dynamic = True
        eng = engine(
            blocks=rng.randrange(16, 40), host=rng.choice([0, 16]), max_num_seqs=rng.choice([2, 5]), order=order,
            max_num_batched_tokens=rng.choice([3, 16, 64]), max_in_flight=lag,
            admission=wild([True, True, False, "raise", None]), chunk=wild([0, 1, 5, 100, "raise", -1]),
            step_budget=wild([0, 2, 8, 1000, "raise", 1.5]), victim=wild([0, 1, 2, "raise", "soon"]),
        )  # fmt: skip
        requests = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(60):
                if rng.random() < 0.4:
                    try:
                        requests.append(eng.submit(
                            [rng.randrange(4) for _ in range(rng.randrange(1, 25))],
                            params(rng.randrange(1, 12), n=rng.choice([1, 1, 3]), seed=rng.choice([None, 4])),
                        ))  # fmt: skip
                    except RuntimeError as error:
                        assert str(error) == "moody"
                if requests and rng.random() < 0.05:
                    eng.abort(rng.choice(requests))
                eng.step()
                eng.check()
            run(eng)
        eng.scheduler.check_idle()
        assert_right(eng, *requests)
