"""Plans for a pipeline: each stage has a batch to work on, and no row is in two of them."""

import random

import pytest

import labkit as lk
from tests.harness import Recording, assert_right, engine, params, run


@pytest.mark.parametrize("seed", range(6))
def test_a_decode_row_is_in_one_plan_in_flight_and_its_token_comes_from_the_host(seed):
    rng = random.Random(seed)
    stages = rng.choice([2, 3, 4])
    eng = engine(
        blocks=rng.choice([30, 80]), host=rng.choice([0, 20]), max_num_batched_tokens=rng.choice([8, 64]),
        runner=Recording(lk.FakeRunner(seed=1, vocab_size=50)), max_in_flight=stages, pipeline_stages=stages,
    )  # fmt: skip
    requests = []
    for _ in range(12):
        prompt = [rng.randrange(50) for _ in range(rng.choice([1, 5, 20]))]
        many = rng.choice([1, 1, 3])
        requests.append(eng.submit(prompt, params(rng.choice([1, 6, 12]), n=many), arrival=rng.random() * 0.02))
    seen = set()
    while eng.step() is not None:
        eng.check()
        flying = [plan for plan, _ in eng.in_flight]
        rows = [row for plan in flying for row in plan.rows[: plan.num_decode].tolist()]
        assert len(rows) == len(set(rows)), f"seed {seed}: {rows}"
        seen.add(len(flying))
    assert all(not len(plan.feed) for plan in eng.runner.plans)
    assert max(seen) >= stages, f"seed {seed}: the stages were never all busy"
    assert_right(eng, *requests)


def test_rows_are_dealt_evenly():
    eng = engine(runner=Recording(lk.FakeRunner(seed=1, vocab_size=50)), max_in_flight=2, pipeline_stages=2, blocks=200)
    for i in range(10):
        eng.submit([i, i + 1], params(30))
    run(eng)
    decodes = [plan.num_decode for plan in eng.runner.plans if plan.num_decode]
    assert max(decodes) <= 6 and sum(decodes) / len(decodes) > 4.5
