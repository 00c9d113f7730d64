"""The study's workloads: drawn from a seed, within their ranges, and as their names say."""

import dataclasses
import itertools
import statistics

import pytest

import labkit as lk
from labkit.bench import workload as files
from labkit.bench.picture import shared


def few_agents(num, **options):
    return lk.workloads.agents(num // 10, tools=64, **options)


MAKERS = [
    lk.workloads.shared_prefixes,
    lk.workloads.chats,
    lk.workloads.poisson,
    lk.workloads.bursty,
    lk.workloads.two_classes,
    lk.workloads.prefix_repetition,
    lk.workloads.few_shot,
    lk.workloads.rag,
    few_agents,
]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_one_seed_gives_one_workload_and_another_seed_another(maker):
    made = maker(30, seed=4)
    assert made == maker(30, seed=4) and made != maker(30, seed=5)
    assert made.reseeded(5) == maker(30, seed=5)
    assert made.reseeded(5).reseeded(4) == made
    with pytest.raises(ValueError, match="seed"):
        maker(30, seed=-1)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_a_workload_is_a_line_of_text_and_a_picture_that_stands_alone(maker):
    made = maker(30)
    assert "\n" not in repr(made) and repr(made).startswith("Workload(")
    html = made._repr_html_()
    assert html.count("<svg") == 1 and "<rect" in html and "currentColor" in html
    assert "<script" not in html and "http" not in html


def test_prefixes_are_shared_and_the_first_is_the_most_popular():
    made = lk.workloads.shared_prefixes(200, prefixes=4, prefix=64, question=(8, 16))
    heads = [ask.prompt[:64] for ask in made.asks]
    counts = sorted((heads.count(head) for head in set(heads)), reverse=True)
    assert len(counts) == 4 and counts[0] > 2 * counts[-1]
    assert shared(made) > 0.7 > 0.05 > shared(lk.workloads.poisson(50))
    even = lk.workloads.shared_prefixes(2000, prefixes=4, prefix=4, skew=0.0)
    heads = [ask.prompt[:4] for ask in even.asks]
    assert max(heads.count(head) for head in set(heads)) < 600


def test_turns_of_a_chat_come_after_the_turn_before():
    made = lk.workloads.chats(10, turns=(3, 3), system=20, question=(5, 5), output=(7, 7))
    assert made.is_closed and len(made.asks) == 30
    assert [ask.after for ask in made.asks[:4]] == [None, 0, 1, None]
    assert made.lengths()[:3] == [32, 44, 56] and made.longest() == 56
    assert made.asks[0].prompt[:20] == made.asks[3].prompt[:20]
    with pytest.raises(ValueError, match=r"request 0 .* comes after 0"):
        lk.Workload("circle", (dataclasses.replace(made.asks[1], after=0),))


def test_bursts_come_at_the_same_rate_and_in_crowds():
    def gaps(made):
        at = [ask.arrival for ask in made.asks]
        return [b - a for a, b in itertools.pairwise(at)]

    even, crowds = gaps(lk.workloads.poisson(4000, 5.0)), gaps(lk.workloads.bursty(4000, 5.0, 0.1))
    assert abs(statistics.mean(even) - 0.2) < 0.02 and abs(statistics.mean(crowds) - 0.2) < 0.04
    assert statistics.stdev(crowds) > 2 * statistics.stdev(even)


def test_two_classes_differ_in_priority_and_length():
    made = lk.workloads.two_classes(200, urgent=0.4)
    urgent = [ask for ask in made.asks if ask.priority == 0]
    assert 50 < len(urgent) < 110 and max(len(ask.prompt) for ask in urgent) <= 64
    assert all(len(ask.prompt) >= 128 for ask in made.asks if ask.priority == 1)
    with pytest.raises(ValueError, match="urgent"):
        lk.workloads.two_classes(urgent=1.4)


def test_a_file_keeps_turns_and_priorities(tmp_path):
    for made in (lk.workloads.chats(5), lk.workloads.two_classes(20)):
        made.save(tmp_path / "w.json")
        assert files.load(tmp_path / "w.json").asks == made.asks
    with pytest.raises(ValueError, match="not drawn from a seed"):
        files.load(tmp_path / "w.json").reseeded(1)


def test_labkit_bench_refuses_turns_that_wait_for_answers(tmp_path, capsys):
    from labkit.cli import main

    lk.workloads.chats(3).save(tmp_path / "w.json")
    assert main(["bench", "serve", "--workload", str(tmp_path / "w.json")]) == 2
    assert "use labkit.Experiment" in capsys.readouterr().err


def test_mixed_workloads_come_in_order_and_keep_their_turns():
    talks, crowd = lk.workloads.chats(6, turns=(2, 3), rate=2), lk.workloads.poisson(20)
    made = lk.workloads.mixed(talks, crowd)
    assert len(made.asks) == len(talks.asks) + 20 and made.num_output == talks.num_output + crowd.num_output
    opening = [ask.arrival for ask in made.asks if ask.after is None]
    assert opening == sorted(opening) and len(opening) == 26
    assert sorted(made.lengths()) == sorted(talks.lengths() + crowd.lengths())
    assert made.reseeded(3) == lk.workloads.mixed(talks.reseeded(3), crowd.reseeded(3))
    with pytest.raises(ValueError, match="at least one workload"):
        lk.workloads.mixed()


@pytest.mark.parametrize("made", [lk.workloads.shared_prefixes(60, rate=10), lk.workloads.poisson(30)], ids=repr)
def test_what_a_picture_calls_shared_is_what_an_endless_cache_hits(made):
    fast = {"num_blocks": 50_000, "constant": 1e-4, "per_token": 1e-6}
    assert shared(made) == lk.Experiment(made, **fast).run(progress=False).frame().hit_rate[0]


def test_tenants_ask_every_question_before_one_comes_again():
    asks = lk.workloads.tenants(50, groups=5, questions=4, prefix=32, question=8).asks
    assert len({ask.prompt for ask in asks[:20]}) == len({ask.prompt for ask in asks[20:40]}) == 20
    assert {ask.prompt for ask in asks} == {ask.prompt for ask in asks[:20]}
    assert len({ask.prompt[:32] for ask in asks}) == 5
