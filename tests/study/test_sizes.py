"""lk.study.sizing: the fewest replicas that meet an objective, and a reason for every candidate that does not."""

import pytest

import labkit as lk
from labkit.bench.workload import Ask, Workload
from labkit.study.clusters.results import metrics_of

MIX = lk.workloads.poisson(40, prompt=(100, 400), output=(8, 32))
SLO = {"ttft": 0.25, "tpot": 0.025}


def size(workload=MIX, **options):
    return lk.study.sizing(workload, **{"model": "llama-3.1-8b", "rate": 100.0, "slo": SLO, "tp": [1], **options})


@pytest.fixture(scope="module")
def found():
    return size(machines=["H100", "A100", "L4"], tp=[1, 3])


def test_the_cheapest_comes_first_and_every_other_has_a_reason(found):
    frame = found.frame()
    assert len(frame) == len(found) == 6
    gpus = frame["gpus"].dropna().tolist()
    assert gpus and gpus == sorted(gpus) and found.best.gpus == gpus[0]
    assert (frame["gpus"].isna() == frame["reason"].notna()).all()
    good = frame[frame["reason"].isna()]
    assert (good["attained"] >= 0.9).all() and (good["gpus"] == good["replicas"] * good["tp"]).all()
    assert ((1 - good["ttft_p90"] / SLO["ttft"]) == good["ttft_margin"]).all()
    reasons = dict(zip(zip(frame["machine"], frame["tp"], strict=True), frame["reason"], strict=True))
    assert reasons["H100", 3] == "tp=3 does not divide the 32 heads of llama-3.1-8b"
    assert "too slow even for one request at a time: tpot is" in reasons["L4", 1]
    by_machine = {(one.machine, one.tp): one.replicas for one in found.feasible}
    assert by_machine["H100", 1] <= by_machine["A100", 1], "a slower machine needs no fewer"


def test_one_replica_less_is_too_few(found):
    one = next(one for one in found.feasible if one.replicas > 1)
    cost = lk.study.AnalyticCost.of("llama-3.1-8b", one.machine, tp=one.tp)
    attained = []
    for number in (one.replicas, one.replicas - 1):
        share = MIX.asks[-1].arrival / (39 / 100.0) / number  # of the rate that one replica gets
        asks = tuple(Ask(ask.prompt, ask.num_output, ask.arrival / share) for ask in MIX.asks)
        served = lk.study.Cluster(1, runner=lk.SimRunner(cost=cost), num_blocks=one.kv_tokens // 16, rows=256)
        served.serve(Workload("share", asks))
        attained.append(metrics_of(served, SLO)["attained"])
    assert attained[0] == one.attained >= 0.9 > attained[1]


def test_reasons_name_what_does_not_fit():
    big = size(model="llama-3.1-70b", machines=["H100"])
    assert "has no memory for keys and values: 131.4 GiB of weights" in big.sizes[0].reason
    assert big.best is None and "none of them meets the objective" in repr(big)
    long = size(Workload("long", (Ask(tuple(range(40_000)), 10),)), machines=["L4"])
    assert long.sizes[0].reason == "the longest request has 40010 tokens, and keys and values of 30960 fit"
    longer = size(Workload("longer", (Ask(tuple(range(200_000)), 10),)), machines=["H200"])
    assert "llama-3.1-8b at most 131072" in longer.sizes[0].reason
    few = size(machines=["A100"], rate=1000.0, most=2)
    assert few.sizes[0].reason.startswith("2 replicas are not enough: ")


def test_fewer_rows_make_tokens_faster_and_need_more_replicas():
    found = size(machines=["A100"], rows=[2, 64], slo={"e2e": 2.0}, rate=60.0)
    needed = {one.rows: one.replicas for one in found.sizes}
    assert needed[2] > needed[64] >= 1
    assert found.sizes[0].rows == 64 and found.sizes[0].batch > found.sizes[1].batch


def test_processes_find_the_same(found):
    again = size(machines=["H100", "A100", "L4"], tp=[1, 3], workers=2)
    assert again.sizes == found.sizes


def test_it_shows_itself(found):
    html = found._repr_html_()
    assert "H100, tp=1" in html and "tp=3 does not divide" in html
    pytest.importorskip("plotly")
    assert len(found.plot().data[0].y) == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "llama-4"}, ValueError, "unknown model 'llama-4'"),
        ({"machines": ["H1000"]}, ValueError, "did you mean 'H100'"),
        ({"machines": []}, ValueError, "need one value each"),
        ({"rate": 0.0}, ValueError, "rate must lie in"),
        ({"tp": [0]}, ValueError, "tp must be at least 1"),
        ({"attain": 1.5}, ValueError, "attain must lie in"),
        ({"num_blocks": 5}, TypeError, "sizing has no option 'num_blocks'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        size(**options)
