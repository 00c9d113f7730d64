"""Metrics, compared with values computed by hand from a scripted run."""

import json

import pytest

from labkit.bench import limit, metrics, workload
from labkit.bench.metrics import Timed


def test_latencies_are_those_of_the_client():
    requests = [
        Timed(arrival=0.0, first=1.0, done=3.0, num_prompt=5, num_output=5, gaps=(0.5, 0.5, 0.5, 0.5)),
        Timed(arrival=2.0, first=2.5, done=2.5, num_prompt=5, num_output=1),
    ]
    found = metrics.latencies(requests, {"ttft": 0.6, "tpot": 0.1})
    assert found["ttft"]["p50"] == 0.75 and found["ttft"]["mean"] == 0.75
    assert found["tpot"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}, "a request of one token has none"
    assert found["itl"]["p99"] == 0.5
    assert found["e2e"]["p50"] == pytest.approx(1.75)
    assert found["goodput"] == pytest.approx(1 / 3)  # the second one, in three seconds


def test_a_ratio_comes_with_an_interval():
    found = metrics.ratio([2.0, 2.1, 1.9, 2.0, 2.0], [1.0, 1.05, 0.95, 1.0, 1.0])
    assert found["ratio"] == 2.0 and 1.7 < found["low"] < 2.0 < found["high"] < 2.4
    assert metrics.ratio([1.0], [2.0])["low"] == 0.5


def result(rate: float, ttft: float) -> dict:
    run = {"seconds": [1.0], "metrics": {"output_tokens_per_second": rate, "ttft": {"p50": ttft}, "steps": 3}}
    return {"labkit_bench": 1, "kind": "throughput", "runs": {"x": run}}


def test_results_are_read_from_a_file_a_text_and_a_terminal(tmp_path):
    made = result(10.0, 0.5)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made))
    assert metrics.parse_benchmark_output(path) == made
    assert metrics.parse_benchmark_output(str(path)) == made
    assert metrics.parse_benchmark_output("some {lines}\n" + json.dumps(made) + "\nmore") == made
    for bad in ("{}", "{nothing", json.dumps(made | {"labkit_bench": 99})):
        with pytest.raises(ValueError, match="not a result of labkit bench"):
            metrics.parse_benchmark_output(bad)


def test_improvement_is_times_better_whichever_way_the_metric_goes():
    found = metrics.calculate_performance_improvement(result(30.0, 0.2), result(10.0, 0.5))
    assert found["output_tokens_per_second"] == 3.0 and found["ttft.p50"] == 2.5
    assert metrics.calculate_performance_improvement({"tpot": {"p50": 1.0}}, {"tpot": {"p50": 2.0}}) == {"tpot.p50": 2}


def test_slo_is_parsed():
    assert metrics.parse_slo("ttft=0.5,tpot=0.05") == {"ttft": 0.5, "tpot": 0.05}
    with pytest.raises(ValueError, match="--slo must look like"):
        metrics.parse_slo("speed=3")


def test_the_limit_is_bytes_over_bandwidth_or_flops_over_peak():
    machine = limit.Machine("toy", bandwidth=100.0, peak=1000.0)
    cost = limit.Cost(layers=50, head=10, bytes_a_weight=2, kv_bytes=4, attention=0)
    # one row: (50 + 10) * 2 bytes of weights, 4 for each of 5 keys and the new one; 2 * 60 flops
    assert cost.step(machine, tokens=1, sampled=1, context=5) == (120 + 24) / 100
    assert cost.step(machine, tokens=1000, sampled=0, context=0) == 2 * 50 * 1000 / 1000
    batches = [(0, 1, 1, 5, 9.9), (1000, 0, 0, 0, 9.9)]
    assert cost.batches(machine, batches, 1) == pytest.approx(1.44 + 100.0)


def test_the_ideal_schedule_pays_for_every_step_by_itself():
    machine = limit.Machine("toy", bandwidth=100.0, peak=1000.0)
    cost = limit.Cost(layers=50, head=10, bytes_a_weight=2, kv_bytes=4, attention=3)
    asks = [workload.Ask((1,) * 30, 3), workload.Ask((1,) * 10, 2)]
    prompts = (2 * 50 * 40 + 2 * 10 * 2 + 3 * (465 + 55)) / 1000  # bound by its flops
    both, one = (120 + 4 * (31 + 11 + 2)) / 100, (120 + 4 * (32 + 1)) / 100  # bound by their bytes
    assert cost.ideal(machine, asks) == pytest.approx(prompts + both + one)


def test_a_quantized_model_has_a_limit_of_its_own():
    machine = limit.Machine("one", bandwidth=1.0, peak=1e9)
    cost = limit.Cost(layers=80, head=16, bytes_a_weight=2, kv_bytes=0, attention=0)
    assert cost.step(machine, 1, 1, 0) == 2 * 96
    assert cost.rounded("int8").step(machine, 1, 1, 0) == 96
    assert cost.rounded("int4-g32").step(machine, 1, 1, 0) == 80 * 4.5 / 8 + 16
    assert cost.rounded("fp8").step(machine, 1, 1, 0) == 2 * 96, "multiplied as bfloat16"


def test_the_limits_of_workload_n_are_those_that_others_compute():
    """With an H200's datasheet; the two ways of counting differ by a thousandth."""
    sheet = limit.Machine("H200", *limit.DATASHEET["H200"])
    asks = workload.workload_n(vocab_size=151_936).asks

    def cost(layers, hidden, inner, heads, keys, size):
        layer = hidden * size * (heads + 2 * keys) + heads * size * hidden + 3 * hidden * inner
        return limit.Cost(layers * layer, hidden * 151_936, 2, 4 * layers * keys * size, 4 * layers * heads * size)

    qwen3, qwen25 = cost(28, 1024, 3072, 16, 8, 128), cost(24, 896, 4864, 14, 2, 64)
    assert 133_966 / qwen3.ideal(sheet, asks) == pytest.approx(40_854, rel=2e-3)
    assert 133_966 / qwen25.ideal(sheet, asks) == pytest.approx(213_428, rel=2e-3)
