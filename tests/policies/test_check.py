"""`lk.policies.check`: the examples pass, and each way to break the contract is found and named, within seconds."""

import random
import threading
import time

import pytest

import labkit as lk
from labkit.policies.days import disorder

EXAMPLES = {
    "VTC": ("order", "victim"), "SessionAffinity": ("order",), "ResidualShortestPrefill": ("order", "chunk"),
    "PredictedLength": ("order", "victim"), "EarliestDeadline": ("order", "victim"),
}  # fmt: skip


def decisions(name, *args, **options):
    """An example's policies, as keywords."""
    policy = getattr(lk.policies, name)(*args, **options)
    return {kind: policy if kind == "order" else getattr(policy, kind) for kind in EXAMPLES[name]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_break_nothing(name):
    days = ("stream",) if name != "VTC" else ("crowded", "stream", "quiet", "changes", "ahead")
    report = lk.policies.check(**decisions(name), only=days)
    assert report.ok and not report.problems, report
    assert report.parts == days and report.num_steps > 300
    assert f"order={name}" in repr(report) and "nothing broke" in repr(report) and "us each" in repr(report)


def test_decodes_first_breaks_nothing():
    assert lk.policies.check(step_budget=lk.policies.DecodesFirst(prefill=8), only=["crowded"]).ok


def by_tenant(request, now):
    return request.extra["tenant"] == "b"


class Falls:
    growing = True

    def __call__(self, request, now):
        return -now


class Forgets:
    """It keeps state by request, and does not know those that came before it was set."""

    def __init__(self):
        self.known = {}

    def __call__(self, request, now):
        return request.arrival

    def admitted(self, request, now):
        self.known[request.serial] = 0

    def progress(self, step):
        for serial in step.serials.tolist():
            self.known[serial] += 1


def spend(milliseconds):
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        pass


def forever(*given):
    while True:
        pass


def patient(*given):
    try:
        forever()
    except Exception:
        forever()


def nested(request, view):
    request.params.extra_args["path"].append(1)
    return True


BROKEN = [
    ("starves", "order", {"order": lambda request, now: -request.arrival}),
    ("starves", "order", {"order": lambda request, now: request.num_prompt}),
    ("starves", "admission", {"admission": lambda request, view: request.num_prompt < 40}),
    ("stalls", "chunk", {"chunk": lambda request, view: 0 if request.id == "r4" and request.num_computed else 8}),
    ("idle", "admission", {"admission": lambda request, view: False}),
    ("idle", "step_budget", {"step_budget": lambda view: 0}),
    ("idle", "admission", {"admission": lambda request, view: view.num_running > 0}),
    ("unordered", "order", {"order": lambda request, now: random.random()}),
    ("unordered", "order", {"order": lambda request, now: float("nan")}),
    ("unordered", "order", {"order": lambda request, now: (1, 2) if request.num_prompt % 2 else 1}),
    ("unordered", "victim", {"victim": lambda request, now: "late"}),
    ("stale keys", "order", {"order": lambda request, now: request.arrival - (now - request.arrival) ** 2}),
    ("stale keys", "order", {"order": Falls()}),
    ("raises", "order", {"order": lambda request, now: request.extra["deadlin"]}),
    ("raises", "progress", {"order": Forgets()}),
    ("raises", "victim", {"victim": lambda request, now: 1 / 0}),
    ("raises", "chunk", {"chunk": lambda request: 5}),
    ("wrong type", "admission", {"admission": lambda request, view: "yes"}),
    ("wrong type", "chunk", {"chunk": lambda request, view: 4.0}),
    ("wrong type", "step_budget", {"step_budget": lambda view: -1}),
    ("writes", "order", {"order": lambda request, now: setattr(request, "priority", 0) or 0}),
    ("writes", "admission", {"admission": lambda request, view: request.prompt.sort() is None}),
    ("writes", "admission", {"admission": lambda request, view: request.params.extra_args.update(tenant="a") is None}),
    ("writes", "step_budget", {"step_budget": lambda view: setattr(view, "left", 7) or 7}),
    ("writes", "admission", {"admission": nested, "extra": {"path": [[]]}}),
    ("slow", "step_budget", {"step_budget": lambda view: spend(5) or view.budget}),
    ("never returns", "admission", {"admission": forever}),
    ("never returns", "chunk", {"chunk": patient}),
]


@pytest.mark.parametrize(
    ("kind", "decision", "given"), BROKEN, ids=[f"{k} {d} {i}" for i, (k, d, _) in enumerate(BROKEN)]
)
def test_a_policy_that_breaks_its_contract_is_caught_in_five_seconds(kind, decision, given):
    before = time.process_time()
    days = {"starves": "stream", "stalls": "stream", "unordered": "crowded", "stale keys": "crowded"}.get(kind, "quiet")
    days = {"victim": "crowded", "progress": "changes"}.get(decision, days)
    report = lk.policies.check(**given, only=[days])
    spent = time.process_time() - before
    assert (kind, decision) in {(problem.kind, problem.decision) for problem in report.problems}, report
    assert not report.ok and kind in report.kinds and f"{kind} " in repr(report)
    assert spent < 5, f"{spent:.1f} s of processor time"


def test_a_policy_in_a_loop_ends_with_the_check():
    lk.policies.check(admission=forever)
    end = time.monotonic() + 20
    while any(thread.name == "labkit policies.check" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_checked_stays_as_it_was():
    fair = lk.policies.VTC()
    lk.policies.check(order=fair, victim=fair.victim, only=["quiet"])
    assert fair.service == {} and fair.waiting == {}


def test_the_same_seed_gives_the_same_report():
    reports = [
        lk.policies.check(order=lambda request, now: request.num_prompt, only=["stream"], seed=4) for _ in range(2)
    ]
    assert reports[0].problems == reports[1].problems and reports[0].num_steps == reports[1].num_steps


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="takes the policies to run"):
        lk.policies.check()
    with pytest.raises(TypeError, match="did you mean 'order'"):
        lk.policies.check(ordr=by_tenant)
    with pytest.raises(ValueError, match="admission must be a function"):
        lk.policies.check(admission=True)
    with pytest.raises(TypeError, match="did you mean 'stream'"):
        lk.policies.check(order=by_tenant, only=["steam"])
    with pytest.raises(TypeError, match=r"extra\['tenant'\] is a list"):
        lk.policies.check(order=by_tenant, extra={"tenant": "ab"})
    fair = lk.policies.VTC()
    fair.lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot be copied"):
        lk.policies.check(order=fair)


def test_keys_in_no_order_are_found():
    class Odd(float):
        def __lt__(self, other):
            return (float(self) + 1) % 3 == float(other)

    assert disorder([1, 2, 3]) is None and disorder([(1, 2), (1, 3)]) is None
    assert "not exactly one" in disorder([float("nan"), 1.0])
    assert "but not" in disorder([Odd(0), Odd(1), Odd(2)])
