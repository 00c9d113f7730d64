"""Prefill and decode on different replicas: times include the transfer, and a full decode replica never stalls."""

import numpy as np
import pytest

import labkit as lk
from labkit.bench.workload import Ask, Workload
from labkit.study.clusters.results import columns_of, metrics_of

STEP = lk.SimRunner(constant=0.01, per_token=0.0, per_context=0.0, per_block=0.0)
BYTES = 1_000_000.0
LINK = 1e9


def place(prefill=1, decode=1, **options):
    return lk.study.Disaggregated(prefill, decode, BYTES, **{"bandwidth": LINK, "latency": 0.004, **options})


def served(workload, placement, **options):
    made = lk.study.Cluster(placement, **{"runner": STEP, "num_blocks": 64, **options})
    made.open(workload)
    while made.step():
        pass
    made.check()
    for replica in made.replicas:
        replica.scheduler.check_idle()
    return made


def one(num_prompt, num_output, begin=0):
    return Ask(tuple(range(begin, begin + num_prompt)), num_output)


def test_the_transfer_comes_before_or_after_the_first_token():
    workload = Workload("one", (one(40, 5),))  # two full blocks: 32 tokens, 32 MB, 32 ms
    columns = columns_of(served(workload, place()))
    assert columns["ttft"] == [pytest.approx(0.01)]
    assert columns["e2e"] == [pytest.approx(0.01 + 0.032 + 0.004 + 4 * 0.01)]
    assert columns["tpot"] == [pytest.approx((0.036 + 0.04) / 4)]
    columns = columns_of(served(workload, place(first_token="decode")))
    assert columns["ttft"] == [pytest.approx(0.01 + 0.036 + 0.01)]
    assert columns["tpot"] == [pytest.approx(0.01)]
    assert (columns["replica"], columns["decode_replica"]) == ([0], [1])


def test_a_short_answer_ends_where_it_began_and_short_prompts_send_no_block():
    columns = columns_of(served(Workload("one", (one(40, 1),)), place()))
    assert columns["e2e"] == [pytest.approx(0.01)] and columns["decode_replica"] == [None]
    columns = columns_of(served(Workload("one", (one(15, 3),)), place()))
    assert columns["e2e"] == [pytest.approx(0.01 + 0.004 + 2 * 0.01)]


def test_the_link_is_shared_and_cached_blocks_are_not_sent_again():
    apart = Workload("two", (one(32, 5), one(32, 5, begin=500)))
    columns = columns_of(served(apart, place()))
    assert np.diff(columns["e2e"]) == pytest.approx([0.04]), "32 ms later, and the next step begins 8 ms after that"
    same = served(Workload("same", (one(32, 5), one(32, 5))), place())
    assert columns_of(same)["e2e"][1] - columns_of(same)["e2e"][0] == pytest.approx(0.0)
    assert same.docks[0].num_tokens_sent == 32
    assert served(apart, place(1, 2, decode_router="round_robin")).docks[1].num_tokens_sent == 32


@pytest.mark.parametrize("seed", range(4))
def test_a_decode_replica_that_is_short_of_blocks_goes_on(seed):
    print(f"seed {seed}")
    workload = lk.workloads.bursty(40, 200.0, prompt=(16, 300), output=(1, 200), seed=seed)
    options = {"num_blocks": 33, "rows": 4}
    made = served(workload, place(2, 1, bandwidth=1e12, decode_options=options))
    assert made.counts()["completed"] == 40
    assert made.replicas[2].blocks.num_blocks == 33


def test_a_request_that_no_decode_replica_can_hold_is_rejected():
    made = served(Workload("long", (one(300, 300),)), place(decode_options={"num_blocks": 20}))
    assert made.counts()["rejected"] == 1
    assert "no decode replica can serve it" in made.tracked[0].reason


def test_conversations_go_on_after_the_decode_replicas_answer():
    made = served(lk.workloads.chats(6, turns=(3, 3), rate=5.0, think=0.1), place(1, 2), num_blocks=256)
    assert made.counts()["completed"] == 18
    columns = columns_of(made)
    assert sum(columns["num_cached"]) > 0, "the prefill replica has cached the questions before"


def test_prefill_apart_from_decode_meets_more_objectives():
    """What DistServe shows: together, prompts delay tokens; apart, the same number of GPUs meets both objectives at a
    higher rate."""
    gpu = lk.SimRunner(constant=0.012, per_token=1.2e-4, per_context=4e-8)
    workload = lk.workloads.poisson(90, 9.0, prompt=(200, 1000), output=(100, 200), seed=1)
    attained = {}
    for name, where in (("together", 2), ("apart", lk.study.Disaggregated(1, 1, 820_000))):
        made = lk.study.Cluster(where, runner=gpu, num_blocks=4096, chunked_prefill=False)
        made.serve(workload)
        attained[name] = metrics_of(made, {"ttft": 0.4, "tpot": 0.02})["attained"]
    assert attained["apart"] > 0.9 and attained["together"] < 0.7, attained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": 0}, "prefill must be at least 1"),
        ({"bandwidth": 0.0}, "bandwidth must lie in"),
        ({"latency": -1.0}, "latency must lie in"),
        ({"first_token": "both"}, "unknown first_token 'both'"),
    ],
)
def test_bad_placements_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lk.study.Disaggregated(**{"prefill": 1, "decode": 1, "bytes_per_token": 1.0, **change})


def test_prompts_are_handed_over_through_the_prefix_cache():
    with pytest.raises(ValueError, match="without prefix_caching the decode replicas would compute them again"):
        lk.study.Cluster(place(), runner=STEP, num_blocks=64, prefix_caching=False)
