"""Workloads have the shape they claim, and one seed gives one workload."""

import itertools
import json
import statistics

import pytest

from labkit.bench import workload


def test_lengths_and_tokens_are_in_range_and_one_seed_gives_one_workload():
    made = workload.random_lengths(50, (3, 9), (2, 4), vocab_size=40, seed=7)
    assert made == workload.random_lengths(50, (3, 9), (2, 4), vocab_size=40, seed=7)
    assert made != workload.random_lengths(50, (3, 9), (2, 4), vocab_size=40, seed=8)
    assert {len(ask.prompt) for ask in made.asks} == set(range(3, 10))
    assert {ask.num_output for ask in made.asks} == {2, 3, 4}
    assert {token for ask in made.asks for token in ask.prompt} <= set(range(10, 40))


def test_workload_n_is_the_one_that_others_publish():
    made = workload.workload_n(vocab_size=151_936)
    assert (len(made.asks), made.num_prompt, made.num_output) == (256, 142_827, 133_966)
    lengths = [len(ask.prompt) for ask in made.asks] + [ask.num_output for ask in made.asks]
    assert min(lengths) >= 100 and max(lengths) <= 1024
    small = workload.workload_n(vocab_size=50, num=3)
    assert len(small.asks) == 3 and max(token for ask in small.asks for token in ask.prompt) < 50


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_share_of_every_prompt_is_the_same(share):
    asks = workload.shared_prefix(8, share, 100, 5, vocab_size=5000).asks
    common = next((i for i in range(100) if len({ask.prompt[i] for ask in asks}) > 1), 100)
    assert common == pytest.approx(100 * share, abs=1) and all(len(ask.prompt) == 100 for ask in asks)


def test_arrivals_have_the_rate_and_the_burstiness_that_was_asked_for():
    base = workload.random_lengths(4000, (1, 2), (1, 2), vocab_size=100)

    def gaps(burstiness):
        at = [ask.arrival for ask in workload.arriving(base, 5.0, burstiness, seed=1).asks]
        return [b - a for a, b in itertools.pairwise(at)]

    poisson, bursty = gaps(1.0), gaps(0.25)
    assert statistics.mean(poisson) == pytest.approx(0.2, rel=0.1)
    assert statistics.mean(bursty) == pytest.approx(0.2, rel=0.15)
    assert statistics.stdev(poisson) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(bursty) == pytest.approx(0.4, rel=0.15)


def test_traces_keep_times_lengths_and_what_is_shared(tmp_path):
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,37,4\n2023-11-16 18:15:50.9951690,39,9\n"
    )
    made = workload.trace(azure, vocab_size=1000)
    assert [(len(a.prompt), a.num_output) for a in made.asks] == [(37, 4), (39, 9)]
    assert [a.arrival for a in made.asks] == pytest.approx([0, 4.314579], abs=1e-5)

    mooncake = tmp_path / "mooncake.jsonl"
    rows = [(1000, 1100, 5, [1, 2, 3]), (3500, 900, 6, [1, 9]), (4000, 99999, 6, [1])]
    mooncake.write_text(
        "\n".join(
            json.dumps({"timestamp": t, "input_length": n, "output_length": m, "hash_ids": h}) for t, n, m, h in rows
        )
    )
    first, second = workload.trace(mooncake, vocab_size=1000).asks
    assert (first.arrival, second.arrival) == (0.0, 2.5)
    assert first.prompt[:512] == second.prompt[:512] and first.prompt[512:600] != second.prompt[512:600]
    assert (len(first.prompt), len(second.prompt)) == (1100, 900)


def test_a_workload_comes_back_from_its_file(tmp_path):
    made = workload.arriving(workload.random_lengths(3, (2, 5), (1, 3), vocab_size=99), 2.0)
    made.save(tmp_path / "w.json")
    assert workload.load(tmp_path / "w.json").asks == made.asks


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def test_sharegpt_takes_first_turns_of_a_fitting_length(tmp_path):
    def talk(question, answer):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([talk("a " * 9, "b " * 6), talk("hi", "ho"), talk("a " * 9, "b " * 5000), {}]))
    (ask,) = workload.sharegpt(path, Words(), 1).asks
    assert (len(ask.prompt), ask.num_output) == (9, 6)
    with pytest.raises(ValueError, match="has 1 conversations of a fitting length, 2 were asked for"):
        workload.sharegpt(path, Words(), 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,x,4\n", "line 2"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 5}\n{"timestamp": 1}\n', "line 2"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        workload.trace(tmp_path / name, vocab_size=100)


def test_bad_workloads_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one request"):
        workload.random_lengths(0, vocab_size=10)
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        workload.shared_prefix(2, 1.5, vocab_size=10)
    (tmp_path / "w.json").write_text('[{"prompt": [1]}]')
    with pytest.raises(ValueError, match="entry 0"):
        workload.load(tmp_path / "w.json")
