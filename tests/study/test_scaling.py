"""What ranks take is predicted from one process, and stated beside what they took."""

import time

import pytest

import labkit as lk
from labkit.parallel.balance import Balance, RankLoad
from labkit.parallel.ranks import Ranks
from labkit.runner.cost import StepWork
from labkit.study.analytic import AnalyticCost
from labkit.study.scaling import _fit, _run


class Paced(lk.FakeRunner):
    """Takes as long as a cost model says, as if `sizes` ranks computed."""

    dtype_name = "float32"

    def __init__(self, cost, sizes=None):
        super().__init__(seed=0)
        self.cost, self.steps = cost, 0
        if sizes is not None:
            self.workers, self.balance = self, self._balance
            self.ranks = Ranks(*sizes)

    def launch(self, plan):
        self.steps += 1
        pending = super().launch(plan)
        end = time.perf_counter() + self.cost.seconds(StepWork.of(plan))
        while time.perf_counter() < end:
            pass
        return pending

    def call(self, name, **given):
        return [1e-6 * given["rows"] if name == "exchange" else None] * self.ranks.num

    def _balance(self):
        loads = [RankLoad(i, i // self.ranks.tensor, 0, 4, 1, 1, 1, 1.0, 0.0, 18 * self.steps, 1024 * self.steps)
                 for i in range(self.ranks.num)]  # fmt: skip
        return Balance(loads, self.steps)


def engine(cost, sizes=None):
    blocks = lk.BlockManager(num_blocks=512)
    return lk.Engine(scheduler=lk.Scheduler(blocks), runner=Paced(cost, sizes))


SLOW = lk.study.Machine("slow", 1e10, {"bfloat16": 2e11}, 2**34, link=1e9, is_cpu=True)


def test_one_process_calibrates_the_model_and_ranks_are_predicted_with_it():
    one, two = (AnalyticCost.of("tiny", SLOW, tp=tp) for tp in (1, 2))
    engines = {"one": engine(one), "two": engine(two, (2, 1))}
    found = lk.study.ranks(engines, rows=(1, 8), tokens=4, repeats=2)
    assert len(found.rows) == len(found.frame()) == 8
    row = found.row("two", "decode", 8)
    assert (row.tensor, row.exchanges, row.expected, row.kib) == (2, 18, 18, 1.0)
    assert row.measured > two.seconds(StepWork(decodes=8, context=8 * 66, sampled=8))
    assert row.error == row.predicted / row.measured - 1 and "two" in found._repr_html_() and "decode" in repr(found)
    with pytest.raises(ValueError, match="one of the engines must be one process"):
        lk.study.ranks({"two": engines["two"]})


def test_the_calibrated_model_repeats_what_it_was_calibrated_with():
    runs = _run(engine(AnalyticCost.of("tiny", SLOW)), 4, 64, 8)
    shape = lk.study.ModelShape.of("tiny", dtype="float32", kv_dtype="float32")
    cost = AnalyticCost(shape, *_fit(shape, runs)[:1], efficiency=_fit(shape, runs)[1])
    for timed in runs:
        assert cost.seconds(timed.work) == pytest.approx(timed.seconds, rel=0.5)
