"""Next-token probabilities are those that the sampler draws from."""

import numpy as np
import pytest

import labkit as lk


@pytest.fixture(scope="module")
def eng():
    with lk.Engine(num_blocks=128, dtype="float32") as engine:
        engine.pause()
        yield engine


def test_probabilities_are_those_that_logprobs_report(eng):
    prompt = "import os\nimport "
    found = lk.next_tokens(eng, prompt)
    asked = eng.generate(prompt, lk.SamplingParams(temperature=0, max_tokens=1, logprobs=5)).logprobs[0]
    assert list(found.texts)[:5] == list(asked.top_ids)
    for token, logprob in zip(asked.top_ids, asked.top, strict=True):
        assert np.log(found.probability(token)) == pytest.approx(logprob, abs=1e-4)
    assert found.views[0][1].sum() == pytest.approx(1) and found.kept == 4096


@pytest.mark.parametrize("filters", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_an_engine_draws_what_the_view_says(eng, filters):
    prompt, n = "import os\nimport ", 400
    found = lk.next_tokens(eng, prompt).under(**filters)
    handle = eng.generate(prompt, lk.SamplingParams(n=n, seed=1, max_tokens=1, **filters))
    drawn = [member.output_ids[0] for member in (handle, *handle.samples)]
    assert all(found.probability(token) > 0 for token in drawn)
    first = next(iter(found.texts))
    p = found.probability(first)
    assert drawn.count(first) / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_views_are_columns_of_a_table_and_of_a_picture(eng):
    found = lk.next_tokens(eng, "class ", show=4).under(temperature=0.5).under(temperature=0, top_p=0.5)
    frame = found.frame()
    assert list(frame.columns) == ["token", "text", "the model", "temperature=0.5", "temperature=0, top_p=0.5"]
    assert len(frame) == 4 and (frame["temperature=0.5"].iloc[0] > frame["the model"].iloc[0])
    assert found.kept == 1 and frame.iloc[0, -1] == 1
    assert found._repr_html_().count("<svg") == 3 and "100% " in repr(found).replace(",", " ").replace(";", " ")


def test_bad_input_is_named(eng):
    with pytest.raises(TypeError, match="did you mean 'top_p'"):
        lk.next_tokens(eng, "class ").under(topp=0.5)
    with pytest.raises(ValueError, match="top_p"):
        lk.next_tokens(eng, "class ").under(top_p=2)
    with pytest.raises(TypeError, match="one prompt, got 2"):
        lk.next_tokens(eng, ["a", "b"])
    fake = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8)), runner=lk.FakeRunner(), clock=lk.VirtualClock())
    with pytest.raises(ValueError, match="has no logits"):
        lk.next_tokens(fake, [1, 2, 3])
