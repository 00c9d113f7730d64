"""Settings against each other on the same draws: intervals, verdicts, the table and the figure."""

import math
import random

import pytest

import labkit as lk
from labkit.study.compare import Comparison, _verdict
from labkit.study.statistics import interval, t_quantile

MIX = lk.workloads.bursty(20, rate=30, output=(4, 24))


def last(request, now):
    return -request.arrival


@pytest.fixture(scope="module")
def found() -> Comparison:
    return lk.compare(
        {"fcfs": None, "again": "fcfs", "sjf": "sjf", "slow": {"budget": 16}, "mine": last},
        MIX, repeat=3, rows=4, metrics={"worst": lambda requests: max(requests["ttft"])},
    )  # fmt: skip


def test_equal_settings_are_the_same_and_large_differences_are_called(found):
    assert set(found.verdicts("ttft_p90").values()) <= {"same", "noise", "better", "worse"}
    assert {found.verdicts(metric)["again"] for metric in found.study.metrics} == {"same"}
    assert found.verdicts("output_tokens_per_s")["slow"] == "worse" and found.verdicts("worst")["slow"] == "higher"
    slow = next(d for d in found.differences if (d.metric, d.setting) == ("output_tokens_per_s", "slow"))
    assert slow.low <= slow.change <= slow.high < 0 and slow.num == 3
    assert slow.percent(slow.change) == pytest.approx(100 * (slow.mean / slow.base - 1))


def test_the_means_are_those_of_the_runs(found):
    frame = found.study.frame()
    means = frame.groupby("setting")["ttft_p50"].mean()
    row = next(d for d in found.differences if (d.metric, d.setting) == ("ttft_p50", "sjf"))
    assert row.base == pytest.approx(means["fcfs"]) and row.mean == pytest.approx(means["sjf"])
    assert len(frame) == 15 and set(frame["seed"]) == {0, 1, 2} and len(found.frame()) == len(found.differences)


def test_it_prints_a_table_and_draws_the_differences(found):
    text = repr(found)
    assert text.startswith(
        "Comparison(bursts of shape 0.1, 30/s: 20 requests on SimRunner: against 'fcfs', 95% intervals"
    )
    assert "\n                       fcfs" in text and "noise" in text and " worse)" in text and "worst" in text
    assert "<table" in found._repr_html_() and "slow" in found._repr_html_()
    figure = found.plot(["ttft_p50", "output_tokens_per_s"])
    assert [trace.name for trace in figure.data] == ["again", "sjf", "slow", "mine"]
    symbols = dict(zip(figure.data[2].y, figure.data[2].marker.symbol, strict=True))
    assert symbols["output_tokens_per_s · slow"] == "circle"
    assert set(figure.data[0].marker.symbol) == {"circle-open"}
    with pytest.raises(TypeError, match="did you mean"):
        found.plot(["ttft_p51"])


def test_one_draw_has_no_interval():
    one = lk.compare({"fcfs": None, "sjf": "sjf"}, MIX, repeat=1, rows=4)
    assert set(one.verdicts("ttft_p50").values()) <= {"one run", "same"} and "no intervals" in repr(one)


def test_a_setting_that_fails_is_told_of():
    def broken(request, now):
        raise KeyError("tenant")

    with pytest.warns(UserWarning, match="runs failed, mine: "):
        found = lk.compare({"fcfs": None, "mine": broken}, MIX, repeat=2, rows=4)
    assert "mine failed: " in repr(found) and set(found.verdicts("ttft_p50").values()) == {"none"}


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="at least two settings"):
        lk.compare({"fcfs": None}, MIX)
    with pytest.raises(TypeError, match="setting 'mine' is a dict of options, an order or None, got 3"):
        lk.compare({"fcfs": None, "mine": 3}, MIX)
    with pytest.raises(TypeError, match="did you mean 'order'"):
        lk.compare({"fcfs": None, "mine": {"ordr": "sjf"}}, MIX)
    with pytest.raises(TypeError, match=r"metrics\['x'\] must be a function"):
        lk.compare({"fcfs": None, "mine": "sjf"}, MIX, metrics={"x": 3})
    with pytest.raises(ValueError, match="was not drawn from a seed"):
        lk.compare({"fcfs": None, "sjf": "sjf"}, lk.Workload("fixed", MIX.asks), repeat=2)


def test_extra_arguments_reach_the_policy_in_every_draw_and_come_back_as_columns():
    seen = set()

    class Order:
        def __call__(self, request, now):
            return request.extra["tenant"]

    def worst_of_b(requests):
        seen.update(requests["tenant"])
        return max(t for t, name in zip(requests["ttft"], requests["tenant"], strict=True) if name == 1)

    mix = MIX.with_extra(lambda i, ask: {"tenant": i % 2})
    found = lk.compare({"fcfs": None, "a first": Order()}, mix, repeat=3, rows=2, metrics={"worst of b": worst_of_b})
    assert seen == {0, 1} and found.verdicts("worst of b")["a first"] in ("higher", "noise")
    assert mix.reseeded(5).asks[3].extra == {"tenant": 1}


def test_quantiles_are_those_of_the_tables():
    for share, freedom, value in ((0.975, 1, 12.706), (0.975, 4, 2.776), (0.95, 9, 1.833), (0.995, 30, 2.750)):
        assert t_quantile(share, freedom) == pytest.approx(value, rel=2e-3)
    with pytest.raises(ValueError, match="at least two values"):
        interval([1.0])


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = random.Random(5)
    held = 0
    for _ in range(600):
        low, high = interval([rng.gauss(3.0, 2.0) for _ in range(5)])
        held += low <= 3.0 <= high
    assert 0.92 < held / 600 < 0.975


@pytest.mark.parametrize(
    ("metric", "low", "high", "says"),
    [("ttft_p90", -2.0, -1.0, "better"), ("ttft_p90", 1.0, 2.0, "worse"), ("hit_rate", 1.0, 2.0, "better"),
     ("hit_rate", -2.0, -1.0, "worse"), ("mine", 1.0, 2.0, "higher"), ("mine", -2.0, -1.0, "lower"),
     ("mine", -1.0, 1.0, "noise"), ("mine", None, None, "one run")],
)  # fmt: skip
def test_verdicts(metric, low, high, says):
    assert _verdict(metric, [math.pi], low, high) == says
    assert _verdict(metric, [0.0, 0.0], 0.0, 0.0) == "same"
