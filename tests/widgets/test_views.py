"""Every view, for empty, small, huge and hostile objects: bounded size, fast, escaped. A repr never raises."""

import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import labkit as lk
from labkit.core import shown
from labkit.core.events.diff import Diff
from labkit.core.events.types import Batch
from labkit.core.plan import NO_CHANGES, Join
from labkit.engine.closing import LeakReport
from labkit.engine.profile import Part, Profile
from labkit.widgets import views
from tests.harness import engine, params, run

HOSTILE = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
VOID = {"rect", "line", "path", "circle", "polygon", "br"}
AUTO = {"p", "td", "th", "tr", "thead", "tbody"}  # HTML closes these by itself


class Checker(HTMLParser):
    """Tags that open and do not close, and what must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "img", "iframe", "link"), tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href"), (tag, name, value)
        if (tag not in AUTO and tag not in VOID) or (tag in VOID and tag != "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        if tag not in AUTO:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def html_of(thing) -> str:
    bundle = thing._repr_mimebundle_()
    assert bundle["text/plain"] == repr(thing)
    html = bundle["text/html"]
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open, checker.open
    assert html.startswith('<div class="lk">') and html.count("<style>") == 1
    assert "url(" not in html and "http" not in html and "@import" not in html
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"<[^>]*>", "", html)), "a number that is none"
    return html


def watched(eng) -> list[lk.Plan]:
    """The plans of an engine, as they are launched."""
    plans: list[lk.Plan] = []
    launch = eng.runner.launch
    eng.runner.launch = lambda plan: (plans.append(plan), launch(plan))[1]
    return plans


def everything(eng) -> list:
    """One of each object of a used engine."""
    plans = watched(eng)
    found: list = [eng, eng.scheduler, eng.blocks, eng.blocks.prefix, eng.blocks.stats(), eng.blocks.eviction, eng.log]
    outputs = eng.step()
    found += [eng.snapshot(), *plans, *([outputs] if outputs is not None else [])]
    for request in list(eng.scheduler.requests.values())[:3] + list(eng.scheduler.ended.values())[:3]:
        found += [request, eng.log.why(request), lk.explain.waiting(eng, request), lk.explain.preemption(eng, request)]
        found.append(lk.explain.lookup(eng, request))
    for name in list(eng.blocks.tables.row_of)[:3]:
        found.append(eng.blocks.table(name))
    found += [lk.explain.run(eng), lk.explain.preemption(eng), lk.diff(eng, eng.fork())]
    found += [eng.blocks.lookup(range(50)), eng.blocks.explain(range(50)), lk.explain.lookup(eng.blocks, range(50))]
    return found


def loaded(names=str, **options) -> lk.Engine:
    eng = engine(**{"blocks": 14, "host": 8, "max_num_seqs": 4, "max_num_batched_tokens": 12, **options})
    for i in range(7):
        eng.submit([i % 2] * 5 + [i] * 4, params(12), id=names(f"r{i}"), arrival=0.002 * i)
    return eng


def test_empty_objects_have_pictures():
    for thing in everything(engine()):
        html_of(thing)
    bm = lk.BlockManager(1, 1)
    for thing in (bm, bm.stats(), bm.prefix, bm.eviction, bm.allocate("a", []), lk.EventLog()):
        html_of(thing)


def test_objects_of_a_busy_engine_have_pictures_at_every_step():
    eng = loaded()
    while eng.step():
        for thing in everything(eng):
            html_of(thing)
    assert eng.scheduler.num_preempted and eng.blocks.num_evicted, "the run has what is to be shown"


@pytest.mark.parametrize(
    "eviction", ["lru", "fifo", "lfu", "slru", "s3-fifo", "ttl", "cost", lambda block: -block.depth]
)
def test_every_eviction_policy_shows_who_goes_next(eviction):
    eng = loaded(eviction=eviction)
    for _ in range(20):
        eng.step()
    bm = eng.blocks
    shown_queues = bm.eviction.queues()
    assert sorted(block for queue in shown_queues.values() for block in queue) == sorted(bm.eviction.candidates())
    assert f"{len(bm.eviction)} candidates" in html_of(bm.eviction)
    if getattr(eviction, "__name__", eviction) in ("lru", "fifo", "lfu", "ttl") and len(bm.eviction):
        (queue,) = shown_queues.values()
        free = [block for block in queue if not bm.prefix.children[block]]
        assert bm.eviction.evict(1) == [free[0] if eviction != "lru" and eviction != "ttl" else queue[0]]


def test_hostile_text_is_escaped():
    eng = loaded(names=lambda name: name + HOSTILE, tokenizer=lk.ByteTokenizer())
    for _ in range(12):
        eng.step()
    for thing in everything(eng):
        html = html_of(thing)
        assert "<script" not in html and "<img" not in html
    bm = lk.BlockManager(8, 4)
    bm.allocate(HOSTILE, range(9))
    assert "&lt;script&gt;" in html_of(bm.table(HOSTILE)) and "<script" not in html_of(bm)
    text = engine(tokenizer=lk.ByteTokenizer(), vocab=256, blocks=200)
    handle = text.submit(list(HOSTILE.encode()), params(3))
    run(text)
    assert "&lt;script&gt;" in html_of(handle)


def test_a_hostile_log_is_escaped():
    log, step = lk.EventLog(), (1,) * 12
    for number, events in enumerate(
        [
            [("Submitted", HOSTILE, 4, 4, 0, None), ("Submitted", "b", 4, 4, 0, HOSTILE)],
            [("Held", HOSTILE, HOSTILE, True), ("Held", "b", HOSTILE, False)],
            [("Admitted", HOSTILE, 0, 0, HOSTILE), ("Control", HOSTILE, HOSTILE), ("Failed", HOSTILE, 1)],
            [("Preempted", HOSTILE, HOSTILE, HOSTILE, 3), ("SwappedOut", HOSTILE, 2)],
            [("Resumed", HOSTILE, 0, 1), ("Forked", "b", HOSTILE, 1), ("Held", "b", HOSTILE, False)],
            [("Finished", HOSTILE, HOSTILE, 3), ("Rejected", "b", HOSTILE)],
        ]
    ):
        for event in events:
            log.add(event)
        log.flush(number, number * 10, step)
    other = lk.EventLog()
    other.add(("Submitted", HOSTILE, 4, 4, 0, None))
    other.flush(0, 0, step)
    things = [log, log.why(HOSTILE), log.why("b"), lk.explain.run(log), lk.explain.preemption(log), lk.diff(log, other)]
    for thing in [*things, *(lk.explain.waiting(log, id) for id in (HOSTILE, "b"))]:
        html_of(thing)


def huge() -> lk.Engine:
    bm = lk.BlockManager(10_000, 16)
    eng = lk.Engine(
        scheduler=lk.Scheduler(bm, max_num_seqs=2000, max_num_batched_tokens=8192),
        runner=lk.SimRunner(),
        clock=lk.VirtualClock(),
    )
    rng = random.Random(0)
    for i in range(5000):
        prompt = [i % 7] * 32 + [rng.randrange(99) for _ in range(rng.randint(5, 90))]
        eng.submit(prompt, params(40), id=f"request-{i}", priority=i % 3)
    for _ in range(60):
        eng.step()
    return eng


@pytest.mark.alone
def test_huge_objects_have_small_and_quick_pictures():
    eng = huge()
    things = [eng, eng.scheduler, eng.blocks, eng.blocks.prefix, eng.blocks.stats(), eng.blocks.eviction, eng.log]
    other = eng.fork()
    other.control(order="sjf")
    for _ in range(20):
        other.step()
    things += [lk.explain.run(eng), lk.explain.preemption(eng), lk.diff(eng, other)]
    plans = watched(eng)
    things += [eng.step(), *plans]
    for thing in things:
        size = len(html_of(thing).encode())
        assert size < 200_000, f"{type(thing).__name__}: {size:,} bytes"
        took = min(_seconds(thing) for _ in range(5))
        print(f"{type(thing).__name__}: {size:,} bytes, {took * 1e3:.1f} ms")
        assert took < (0.5 if isinstance(thing, Diff) else 0.1), (
            f"{type(thing).__name__}: {took:.3f} s"
        )  # two logs folded
    long_one = lk.BlockManager(10_000, 16)
    table = long_one.allocate("long", range(120_000))
    assert len(html_of(table)) < 200_000 and len(html_of(lk.explain.lookup(long_one, range(120_000)))) < 200_000
    deep = lk.BlockManager(10_000, 16)
    for i in range(2000):
        deep.allocate(f"{i}", [0] * (16 * (i % 200)) + [i] * 20)
        deep.free(f"{i}")
    assert len(html_of(deep.prefix)) < 200_000 and len(html_of(deep)) < 200_000


def _seconds(thing) -> float:
    begin = time.perf_counter()
    thing._repr_mimebundle_()
    return time.perf_counter() - begin


def test_a_pool_too_large_for_a_cell_a_block_says_what_a_cell_stands_for():
    small, large = lk.BlockManager(512, 4), lk.BlockManager(513, 4)
    large.allocate("a", range(20))
    assert "stands for" not in html_of(small)
    html = html_of(large)
    assert "each cell stands for 2 blocks" in html and "blocks 1-2: 2 used" in html and "blocks 5-6: 1 used" in html
    assert html.count("<title>blocks ") >= 257


def test_a_table_shows_places_sharing_and_copies():
    bm = lk.BlockManager(64, 16)
    bm.allocate("a", range(40))
    b = bm.fork("a", "b")
    before = html_of(b)
    assert "shared with &#x27;a&#x27;" in before and "gets its own copy" in before and "copied from" not in before
    bm.append("b", [7])
    after = html_of(b)
    assert "copied from block 3" in after and "9 of 16" not in after and "from 3" in after
    assert "block 1, held 2×" in after and "block 4, held 1×" in after
    assert "copied" not in html_of(bm.table("a"))
    bm.free("b")
    assert "freed" in html_of(b) and not bm.copies


def test_the_prefix_tree_says_who_is_held_and_who_is_cached():
    bm = lk.BlockManager(64, 4)
    bm.allocate("a", [1] * 8 + [2] * 8)
    bm.allocate("b", [1] * 8 + [3] * 8)
    bm.free("b")
    html = html_of(bm.prefix)
    assert html.count("<g><title>blocks") == 3, "a trunk and two branches"
    assert "held: 2" in html and "cached: 2" in html and "3 3 3 3" in html


def test_a_plan_is_drawn_against_its_budget():
    eng = engine(blocks=64, size=4, max_num_batched_tokens=10)
    plans = watched(eng)
    eng.submit(list(range(14)), params(4), id="first")
    eng.submit(list(range(14)), params(4), id="second")
    run(eng)
    assert plans[0].budget == 10
    html = html_of(plans[0])
    assert "10 of 10 tokens of the budget" in html and "first (row 0)" in html
    last = html_of(plans[-1])
    assert "of 10 tokens of the budget" in last and "computed before" in last


def test_what_is_left_after_closing_is_said():
    assert "nothing left" in html_of(LeakReport(None, 0, 0, 2))
    html = html_of(LeakReport("Worker(busy)", 2**20, 0, 0))
    assert "left behind" in html and "1 MiB" in html and "Worker(busy)" in html


def test_a_profile_and_a_layer_have_pictures():
    torch = pytest.importorskip("torch")
    from labkit.loading.dense import DenseLinear, InvariantLinear

    parts = [Part("forward", "rms_norm", "cpu", 17, 0.2), Part("commit", "", "", 2, 0.1)]
    html = html_of(Profile(parts, 2, 2, 0.3))
    assert "66.7%" in html and "rms_norm" in html
    html = html_of(DenseLinear(torch.zeros(64, 16, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)))
    assert "16 → 64" in html and "bfloat16" in html and "2.12 KiB" in html
    assert "whatever its batch" in html_of(InvariantLinear(torch.zeros(1, 3)))


def test_a_drawer_that_fails_leaves_the_text(monkeypatch):
    bm = lk.BlockManager(4, 4)
    monkeypatch.setattr(shown, "_drawers", [lambda thing: 1 / 0])
    assert bm._repr_mimebundle_() == {"text/plain": f"{bm!r}\n(no picture: ZeroDivisionError: division by zero)"}
    assert bm._repr_html_() is None

    class Broken(shown.Shown):
        def __repr__(self) -> str:
            raise KeyError("no")

    assert Broken()._repr_mimebundle_() == {"text/plain": "<Broken: its repr failed: KeyError: 'no'>"}
    monkeypatch.setattr(shown, "_drawers", [])
    assert bm._repr_mimebundle_() == {"text/plain": repr(bm)}


def test_what_has_no_view_shows_its_text():
    assert views.draw(SimpleNamespace()) is None
    for place in views._VIEWS.values():
        module, function = place.split(".")
        assert callable(getattr(__import__(f"labkit.widgets.{module}", fromlist=[function]), function))


def test_a_subclass_is_drawn_like_its_base():
    class Mine(lk.BlockManager):
        pass

    assert "BlockManager 8×4" in html_of(Mine(8, 4))


def test_a_picture_changes_nothing():
    eng = loaded()
    for _ in range(15):
        eng.step()
    twin = eng.fork()
    for thing in everything(eng):
        html_of(thing)
    twin.step()
    eng.check()
    assert lk.diff(eng, twin).same
    run(eng)
    run(twin)
    assert lk.diff(eng, twin).same


def test_the_core_draws_without_widgets_torch_or_pandas_being_loaded():
    script = (
        "import sys, labkit as lk\n"
        "bm = lk.BlockManager(8, 4); sched = lk.Scheduler(bm)\n"
        "assert not [name for name in sys.modules if name.startswith('labkit.widgets')]\n"
        "assert 'text/html' in sched._repr_mimebundle_()\n"
        "heavy = {'torch', 'pandas', 'IPython', 'labkit.engine.engine'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "thing, text",
    [
        (lk.Result([1, 2], 0.5), "Result(2 tokens, 0.5 s)"),
        (lk.BlockManager(8, 4).pool, "BlockPool(8 blocks: 8 hold nothing, 0 are held)"),
        (lk.BlockManager(8, 4).prefix, "PrefixCache(0 hashes, 0 duplicates, 0 ghosts)"),
        (lk.EventLog(), "EventLog(0 events, 0 steps)"),
        (Batch(3, 5_000_000, (("Cleared",),), None), "Batch(step 3, 0.005000 s: 1 events)"),
        (Join(2, "r", [1, 2], 2, None, 0, None, ()), "Join('r' takes row 2 with 2 tokens)"),
        (NO_CHANGES, "TableChanges(0 blocks in 0 rows)"),
        (lk.ByteTokenizer(), "ByteTokenizer(vocab 256)"),
        (engine().scheduler.queue, "WaitingQueue(fcfs: 0 waiting)"),
        (engine().scheduler.pending, "PendingPrefixes(0 blocks being computed, 0 requests parked)"),
        (engine().snapshot(), "Snapshot(step 0, 0.000000 s)"),
    ],
)
def test_reprs_are_one_stable_line(thing, text):
    assert repr(thing) == text


def test_pictures_are_drawn_while_the_engine_runs():
    sched = lk.Scheduler(lk.BlockManager(120, 4, num_host_blocks=20), max_num_seqs=16, max_num_batched_tokens=64)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seconds=0))
    with eng:
        handles = [eng.submit([i % 5] * 8 + [i] * 5, params(30), id=f"r{i}") for i in range(400)]
        things = [eng, sched, eng.blocks, eng.blocks.prefix, eng.blocks.eviction, eng.log, handles[200]]
        shown_well = num_drawn = 0
        while not handles[-1].ended:
            bundles = [thing._repr_mimebundle_() for thing in [*things, lk.explain.run(eng)]]
            num_drawn += len(bundles)
            shown_well += sum("text/html" in bundle for bundle in bundles)
    assert num_drawn and shown_well >= 0.9 * num_drawn, "what changed under the hand shows its text"


def test_after_time_travel_the_tree_still_counts_who_holds_what():
    eng = loaded()
    for _ in range(10):
        eng.step()
    snap, before = eng.snapshot(), html_of(eng.blocks.prefix)
    for _ in range(8):
        eng.step()
    assert html_of(eng.blocks.prefix) != before
    eng.restore(snap)
    assert html_of(eng.blocks.prefix) == before == html_of(eng.fork().blocks.prefix)
    eng.run()
    assert "held: " not in html_of(eng.blocks.prefix) and "cached: " in html_of(eng.blocks.prefix)
