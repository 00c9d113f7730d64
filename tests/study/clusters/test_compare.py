"""lk.study.cluster: one tidy table, errors as rows, and the order of routers that others have measured."""

import pytest

import labkit as lk

FAST = lk.SimRunner(constant=0.01, per_token=1e-4, per_context=1e-7)
SHARED = lk.workloads.shared_prefixes(40, prefixes=4, prefix=64, question=(8, 24), output=(4, 16), rate=40)


def test_each_router_place_and_rate_is_a_row():
    apart = lk.study.Disaggregated(1, 1, 1e5)
    study = lk.study.cluster(SHARED, [2, apart], ["random", "precise"], rates=[10.0, 40.0], runner=FAST, num_blocks=64)
    frame = study.frame()
    assert len(frame) == 8 and frame["error"].isna().all()
    assert set(frame["replicas"]) == {2, "1 prefill + 1 decode"} and set(frame["rate"]) == {10.0, 40.0}
    for column in ("output_tokens_per_s", "ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "goodput", "hit_rate"):
        assert frame[column].notna().all(), column
    assert (frame["imbalance"] >= 1).all() and (frame["requests"] == 40).all()
    assert (frame["goodput"] <= frame["requests"] / frame["makespan"] + 1e-9).all()
    assert set(study.requests()["router"]) == {"random", "precise"}
    html = study._repr_html_()
    assert "precise" in html and "goodput" in html
    pytest.importorskip("plotly")
    assert len(study.plot("rate", "goodput").data) == 4


def test_a_table_can_be_saved(tmp_path):
    study = lk.study.cluster(SHARED, 2, ["random", "sticky"], runner=FAST, num_blocks=64)
    study.save(tmp_path / "study.json")
    assert lk.Study.load(tmp_path / "study.json").frame().equals(study.frame())


def test_the_objective_decides_what_is_good():
    frames = [
        lk.study.cluster(SHARED, 2, ["random"], slo=slo, runner=FAST, num_blocks=64).frame()
        for slo in ({"ttft": 1e-9}, {"ttft": 9e9, "tpot": 9e9}, {"ttft": 0.0204})
    ]
    assert [frame["attained"][0] for frame in frames[:2]] == [0.0, 1.0]
    assert 0 < frames[2]["attained"][0] < 1


def test_a_router_that_fails_is_a_row_with_its_error():
    def wrong(request, views, now):
        return "first"

    with pytest.warns(UserWarning, match="1 of 2 runs failed, wrong: RouterError: router 'wrong' returned 'first'"):
        study = lk.study.cluster(SHARED, 2, [wrong, "random"], runner=FAST, num_blocks=64)
    assert len(study.failed) == 1 and study.runs[1].metrics["requests"] == 40


def test_routers_start_afresh_in_every_run():
    router = lk.study.routers.RoundRobin()
    study = lk.study.cluster(SHARED, 3, [router], repeats=2, runner=FAST, num_blocks=64)
    assert [run.requests["replica"][0] for run in study.runs] == [0, 0]
    assert router([], [1, 2], 0.0) == 0, "the given object is not used up"


def test_routers_come_in_the_order_that_llm_d_has_measured():
    """Precise over approximate over load-aware, which is no better than random. As in the published setting, each
    replica's share of the prompts fits into half of its cache, and the approximate index holds six tenths of that."""
    workload = lk.workloads.tenants(180, groups=20, questions=3, prefix=800, question=96, output=60, rate=80)
    routers = lk.study.routers
    weights = {"prefix": 2.0, "queue": 1.0, "kv": 1.0}
    study = lk.study.cluster(
        workload,
        4,
        [
            routers.Random(),
            routers.Scored(**{**weights, "prefix": 0.0}),
            routers.Scored(**weights, capacity=204, most=None),
            routers.Precise(**weights),
        ],
        runner=lk.SimRunner(constant=0.012, per_token=1e-4, per_context=1e-7),
        num_blocks=680,
    )
    measured = {run.label: run.metrics["output_tokens_per_s"] for run in study.runs}
    assert measured["precise"] > 1.08 * measured["llm_d"] and measured["llm_d"] > 1.3 * measured["load_aware"]
    assert 0.85 < measured["load_aware"] / measured["random"] < 1.15
    ttft = [run.metrics["ttft_p90"] for run in study.runs]
    assert ttft[3] < ttft[2] < min(ttft[:2]) / 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routers": "random"}, TypeError, "routers is a list"),
        ({"routers": []}, TypeError, "routers is a list"),
        ({"routers": ["randm"]}, ValueError, "did you mean 'random'"),
        ({"rates": []}, ValueError, "rates is empty"),
        ({"rates": [0.0]}, ValueError, "a rate must lie in"),
        ({"slo": {"tttt": 1.0}}, ValueError, "did you mean 'ttft'"),
        ({"slo": 1.0}, ValueError, "slo= is a dict"),
        ({"num_blocs": 3}, TypeError, "did you mean 'num_blocks'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        lk.study.cluster(SHARED, **options)
