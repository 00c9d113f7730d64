"""The fake runner shows wrong plans, and the simulator's times follow its formula."""

import numpy as np
import pytest

import labkit as lk
from labkit.core.plan import Join, Plan, TableChanges
from labkit.runner.fake import next_token


def plan(tokens: list[int], blocks: list[int], start: int = 0, step: int = 0, **fields) -> Plan:
    """One row computing `tokens` from `start` on, its table being `blocks`."""
    n = len(blocks)
    ints = {name: np.array(value) for name, value in {"rows": [0], "start": [start], "count": [len(tokens)]}.items()}
    changes = TableChanges(np.zeros(n, int), np.zeros(n, int), np.arange(n), np.array(blocks))
    join = Join(0, "q", np.array(tokens), len(tokens), lk.SamplingParams(), 0, None, ())
    options = {"joins": (join,) if step == 0 else (), "table_changes": changes, **fields}
    return Plan(
        step, 0, **ints, num_decode=0, tokens=np.array(tokens, np.int32), indptr=np.array([0, len(tokens)]),
        feed=np.zeros(0, int), sample_query=np.array([len(tokens) - 1]), sample_row=np.array([0]), **options,
    )  # fmt: skip


def fake() -> lk.FakeRunner:
    runner = lk.FakeRunner(seed=4, vocab_size=100)
    runner.open(lk.Layout(num_blocks=8, block_size=2, num_rows=2, num_host_blocks=2))
    return runner


def test_the_token_is_a_pure_function_of_seed_and_context():
    context = np.array([5, 6, 7], np.int32)
    token = fake().launch(plan([5, 6, 7], [3, 1])).result().tokens[0]
    assert token == next_token(4, 0, context, 100)
    assert len({next_token(seed, 0, context, 10**6) for seed in range(20)}) == 20


def test_a_wrong_table_a_missed_copy_and_a_wrong_swap_show_as_wrong_tokens():
    def second(**fields) -> int:
        runner = fake()
        runner.launch(plan([5, 6, 7], [3, 1]))
        return int(runner.launch(plan([8], fields.pop("blocks"), start=3, step=1, **fields)).result().tokens[0])

    right = second(blocks=[3, 1])
    assert right == next_token(4, 0, np.array([5, 6, 7, 8]), 100)
    assert second(blocks=[3, 2]) != right  # block 2 was never written
    assert second(blocks=[3, 2], copies=np.array([[1, 2]])) == right
    assert second(blocks=[3, 2], swap_out=np.array([[1, 1]]), swap_in=np.array([[1, 2]])) == right
    assert second(blocks=[3, 2], swap_out=np.array([[3, 1]]), swap_in=np.array([[1, 2]])) != right


def test_writing_into_the_scratch_block_is_caught():
    with pytest.raises(AssertionError, match="into the scratch block"):
        fake().launch(plan([1, 2, 3], [4]))


def test_simulated_tokens_depend_on_request_and_place_not_on_the_batch():
    def outputs(rows: int) -> list[list[int]]:
        sched = lk.Scheduler(lk.BlockManager(200, 4), max_num_seqs=rows)
        eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(seed=2), clock=lk.VirtualClock())
        requests = [eng.submit([i, 1, 2], lk.SamplingParams(max_tokens=9, n=2)) for i in range(4)]
        eng.run()
        return [one.output_ids for request in requests for one in (request, *request.samples)]

    assert outputs(8) == outputs(3)
    assert len({tuple(tokens) for tokens in outputs(8)}) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.FakeRunner(sead=1), "FakeRunner has no option 'sead'; did you mean 'seed'"),
        (lambda: lk.FakeRunner(vocab_size=0), "vocab_size must be at least 1"),
        (lambda: lk.SimRunner(constant=-1), "constant must lie in [0, inf], got -1"),
        (lambda: lk.SimRunner(per_tok=1), "SimRunner has no option 'per_tok'; did you mean 'per_token'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert message in str(caught.value)
