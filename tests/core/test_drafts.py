"""Speculative decoding: guesses that are verified beside a row's own token change how many steps it takes, never which
tokens come of it."""

import warnings

import numpy as np
import pytest

import labkit as lk
from tests.harness import Recording, Scripted, assert_right, engine, params, run


def lookup(tokens, size: int = 4):
    """What followed the last time that the latest token occurred."""
    at = np.flatnonzero(tokens[:-1] == tokens[-1])
    return tokens[at[-1] + 1 : at[-1] + 1 + size] if len(at) else []


def oracle(tokens, size: int = 3, seed: int = 1, vocab: int = 50):
    """The fake model itself, so that every guess is right."""
    from labkit.runner.fake import next_token

    context = tokens.tolist()
    for _ in range(size):
        context.append(next_token(seed, 0, np.array(context), vocab))
    return context[len(tokens) :]


def answers(draft, **options):
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=3, eos_token_id=2))
    eng = engine(blocks=40, size=4, host=20, runner=runner, draft=draft, max_num_seqs=6, **options)
    requests = []
    for i in range(10):
        asked = params(40, ignore_eos=i % 2 == 0, stop_token_ids=[1] if i % 5 == 0 else [], n=1 + i % 2)
        requests.append(eng.submit([i % 3] * (3 + i), asked))
    run(eng)
    eng.scheduler.check_idle()
    assert_right(eng, *requests)
    found = [(one.finish_reason, one.output_ids) for request in requests for one in (request, *request.samples)]
    return found, runner, eng


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_tokens_are_those_without_drafts_and_take_fewer_steps(preemption):
    plain, slow, _ = answers(None, preemption=preemption)
    drafted, quick, eng = answers(lookup, preemption=preemption)
    assert drafted == plain
    assert len(quick.plans) < len(slow.plans)
    assert eng.scheduler.num_preempted > 0
    events = eng.log.events("Drafted")
    accepted = sum(event.num_accepted for event in events)
    assert 0 < accepted < sum(event.num_drafts for event in events)
    assert sum(plan.num_drafts for plan in quick.plans) >= sum(event.num_drafts for event in events)


def test_right_guesses_make_three_more_tokens_a_step():
    eng = engine(draft=oracle)
    request = eng.submit([1, 2, 3], params(41))
    run(eng)
    assert_right(eng, request)
    steps = eng.log.events("Step")
    assert len(steps) == 1 + 10 and [step.output_tokens for step in steps] == [1] + [4] * 10
    assert [step.decode_tokens for step in steps] == [0] + [4] * 10


def test_a_length_is_never_exceeded_and_a_stop_cuts_what_follows():
    eng = engine(draft=oracle)
    for length in (1, 2, 3, 4, 5):
        request = eng.submit([1, 2, 3], params(length))
        run(eng)
        assert request.num_output == length
    plain = engine()
    whole = plain.submit([1, 2, 3], params(20))
    run(plain)
    stop = whole.output_ids[6]
    eng = engine(draft=oracle)
    request = eng.submit([1, 2, 3], params(20, stop_token_ids=[stop]))
    seen = []
    eng.listen(lambda outputs: seen.extend(outputs.tokens.tolist()))
    run(eng)
    assert request.output_ids == whole.output_ids[: whole.output_ids.index(stop) + 1] == seen
    assert request.finish_reason == "stop"


def test_wrong_guesses_never_enter_the_prefix_cache():
    eng = engine(size=2, draft=lambda tokens: [49] * 8)
    request = eng.submit([1, 2, 3], params(20))
    run(eng)
    assert_right(eng, request)
    stored = [event.tokens for event in eng.log.events("Stored")]
    tokens = request.tokens.tolist()
    assert stored == [tuple(tokens[i : i + 2]) for i in range(0, len(tokens) - 2, 2)]
    again = eng.submit(tokens, params(4))
    run(eng)
    assert again.num_cached == len(tokens) - len(tokens) % 2 - (0 if len(tokens) % 2 else 2)
    assert_right(eng, again)


def test_drafts_take_no_budget_and_no_block_that_somebody_else_needs():
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(blocks=12, size=4, runner=runner, draft=lambda tokens: [1] * 10, max_num_batched_tokens=8)
    for i in range(4):
        eng.submit([i] * 6, params(6))
    run(eng)
    assert all(plan.num_tokens <= 8 for plan in runner.plans)
    assert any(plan.num_drafts for plan in runner.plans) and not eng.scheduler.num_preempted
    waiting = [plan for plan in runner.plans if plan.num_decode and plan.num_prefill_tokens]
    assert waiting and not waiting[0].num_drafts  # the prompts took what there was


class Stateful:
    """A processor whose samples have state that cannot go back."""

    def begin(self):
        return lambda prompt, output, logits: logits


@pytest.mark.parametrize(
    "options", [{"capture": {"hidden": [0]}}, {"logits_processors": [Stateful()]}], ids=["capture", "state"]
)
def test_requests_whose_drafts_cannot_be_taken_back_are_served_without(options):
    runner = lk.FakeRunner(seed=1, vocab_size=50)
    runner.num_layers = 1
    eng = engine(draft=lookup, runner=runner)
    request = eng.submit([1, 1, 1], params(9, **options))
    run(eng)
    assert request.num_output == 9 and not eng.log.events("Drafted")


def test_a_draft_that_fails_is_warned_of_and_does_no_harm():
    def bad(tokens):
        raise KeyError("nothing here")

    eng = engine(draft=bad)
    request = eng.submit([1, 2], params(3))
    with pytest.warns(UserWarning, match="draft bad failed for .*nothing here"):
        run(eng)
    assert_right(eng, request)
    eng = engine(draft=lambda tokens: ["a"])
    eng.submit([1, 2], params(3))
    with pytest.warns(UserWarning, match="a draft is a sequence of token ids"):
        run(eng)


@pytest.mark.parametrize("size", [1, 4])
def test_an_exception_from_a_draft_changes_nothing(size):
    """Also one that is not caught: a warning that is an error, an interrupt."""
    calls = 0

    def bad(tokens):
        nonlocal calls
        calls += 1
        if calls % 5 == 2:
            raise KeyboardInterrupt if calls % 2 else KeyError
        return lookup(tokens)

    eng = engine(size=size, blocks=90, runner=lk.FakeRunner(seed=1, vocab_size=3), draft=bad)
    requests = [eng.submit([i, i, 1], params(20)) for i in range(3)]
    raised = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1000):
            if not eng.scheduler.has_work:
                break
            try:
                eng.step()
            except (KeyboardInterrupt, UserWarning):
                raised += 1
            eng.check()
    assert raised > 5
    assert_right(eng, *requests)
    eng.scheduler.check_idle()


@pytest.mark.parametrize("nothing", [None, [], np.zeros((1, 0), int), [[]], ()], ids=str)
def test_no_guess_has_many_forms(nothing):
    eng = engine(draft=lambda tokens: nothing)
    request = eng.submit([1, 2, 3], params(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(eng)
    assert_right(eng, request)
    assert not eng.log.events("Drafted")


def test_tokens_behind_a_stop_string_are_nobody_s():
    """Neither the listeners nor the counts have drafts that were accepted behind it."""
    eng = lk.Engine(num_blocks=64, dtype="float32")
    whole = eng.generate("x = 1\ny = 2\nz = 3\n", lk.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    eng.close()
    ids = whole.output_ids

    def knows(tokens):
        return ids[len(tokens) - whole.num_prompt :][:8]

    eng = lk.Engine(num_blocks=64, dtype="float32", draft=knows)
    seen = []
    eng.listen(lambda outputs: seen.extend(outputs.tokens.tolist()))
    asked = lk.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=["= "])
    request = eng.generate("x = 1\ny = 2\nz = 3\n", asked)
    assert request.finish_reason == "stop string" and 0 < request.num_output < 9
    assert seen == request.output_ids
    assert sum(step.output_tokens for step in eng.log.events("Step")) == request.num_output
    eng.close()


def test_rejected_drafts_keep_no_block_from_others():
    def preempted(draft):
        eng = engine(blocks=12, size=4, draft=draft, preemption="recompute", max_num_batched_tokens=64)
        requests = [
            eng.submit([i] * prompt, params(num)) for i, (prompt, num) in enumerate([(9, 10), (3, 26), (3, 22)])
        ]
        run(eng)
        assert_right(eng, *requests)
        return eng.scheduler.num_preempted

    wrong = preempted(lambda tokens: [(token + 1) % 50 for token in oracle(tokens, 12)])
    assert wrong == preempted(None) == 0


def test_a_draft_is_not_asked_when_prefills_use_the_budget():
    asked = []
    eng = engine(draft=lambda tokens: asked.append(eng.scheduler.step) or [1], max_num_batched_tokens=8, blocks=200)
    eng.submit([1, 2], params(30))
    eng.step()
    eng.submit([3] * 60, params(2))
    run(eng)
    plans = [step.step for step in eng.log.events("Step") if step.prefill_tokens == 7]
    assert len(plans) > 4 and not set(asked) & set(plans[1:-1]) and asked


def test_ids_outside_the_vocabulary_are_not_sent():
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(runner=runner, draft=lambda tokens: [3, 50, 3])
    eng.submit([1, 2], params(6))
    run(eng)
    assert {plan.num_drafts for plan in runner.plans} == {0, 1}


def test_a_runner_that_knows_no_drafts_draws_one_token_and_all_is_well():
    eng = engine(runner=Scripted([5, 6, 7, 8, 9]), draft=lambda tokens: [1, 2])
    request = eng.submit([1, 2], params(5))
    run(eng)
    assert request.output_ids == [5, 6, 7, 8, 9]
    assert [event.num_accepted for event in eng.log.events("Drafted")] == [0, 0, 0]


def test_what_cannot_be_is_refused():
    bm = lk.BlockManager(8, 4)
    with pytest.raises(
        ValueError, match=r"draft must be a function of token ids or an object with propose.*, got 'ngram'"
    ):
        lk.Scheduler(bm, draft="ngram")
    with pytest.raises(ValueError, match="it needs max_in_flight=0"):
        lk.Scheduler(bm, draft=lookup, max_in_flight=1)


class Wrong:
    """The fake runner, whose results are spoiled."""

    def __init__(self, spoil) -> None:
        self.inner, self.spoil = lk.FakeRunner(seed=1, vocab_size=50), spoil
        self.vocab_size, self.eos_token_ids = 50, ()
        self.open = self.inner.open

    def launch(self, plan):
        done = self.inner.launch(plan)
        return done._replace(value=self.spoil(plan, done.value)) if len(plan.drafts) else done


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"indptr": np.array([0])}, "asks for 1 samples, the result's indptr"),
        ({"tokens": np.arange(9), "indptr": np.array([0, 9])}, "may have 1 to 4 tokens, the result has 9"),
        ({"tokens": np.arange(0), "indptr": np.array([0, 0])}, "may have 1 to 4 tokens, the result has 0"),
        ({"tokens": np.array([7, 7]), "indptr": np.array([0, 2])}, "accepts a draft that is not in the plan"),
        ({"tokens": np.array([7, 7]), "indptr": None}, "asks for 1 samples, the result has shape"),
    ],
)  # fmt: skip
def test_a_result_that_cannot_be_is_named_and_nothing_is_lost(spoiled, message):
    runner = Wrong(lambda plan, result: result._replace(**spoiled))
    eng = engine(runner=runner, draft=oracle)
    request = eng.submit([1, 2, 3], params(9))
    eng.step()
    with pytest.raises(ValueError, match=message):
        eng.step()
    runner.spoil = lambda plan, result: result
    run(eng)
    assert_right(eng, request)
    eng.scheduler.check_idle()


def test_a_row_that_failed_alone_may_have_no_token():
    def fail(plan, result):
        row = int(plan.sample_row[0])
        return result._replace(tokens=result.tokens[:0], indptr=np.array([0, 0]), errors={row: "it broke"})

    eng = engine(runner=Wrong(fail), draft=oracle)
    request = eng.submit([1, 2, 3], params(9))
    run(eng)
    assert request.error == "it broke" and request.num_output == 1
    eng.scheduler.check_idle()


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.0, 1.0), (0.5, 1.75), (1.0, 3.0)])
def test_a_simulated_draft_is_right_as_often_as_asked(acceptance, tokens):
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(4000, 16), draft=lambda tokens: [1, 1]),
        runner=lk.SimRunner(acceptance=acceptance), clock=lk.VirtualClock(),
    )  # fmt: skip
    for i in range(20):
        eng.submit([i] * 9, params(300))
    run(eng)
    each = 1 + sum(event.num_accepted for event in eng.log.events("Drafted")) / len(eng.log.events("Drafted"))
    assert each == pytest.approx(tokens, abs=0.06)


def test_a_plan_with_drafts_says_so():
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(runner=runner, draft=oracle)
    eng.submit([1, 2, 3], params(9))
    run(eng)
    assert repr(runner.plans[1]).startswith("Plan(1: 1 decode rows with 3 drafts, 0 prefills of 0 tokens")
    assert "of which 3 drafts" in runner.plans[1]._repr_html_()
