"""Structured outputs: the text has the requested form, whatever the model would prefer."""

import json
import re

import pytest

import labkit as lk

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    with lk.Engine(num_blocks=200, block_size=16) as eng:
        yield eng


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_has_the_form_that_was_asked_for(engine, temperature):
    def text(form):
        params = lk.SamplingParams(structured_outputs=form, max_tokens=150, temperature=temperature, seed=3)
        handle = engine.generate(["Answer: "], params)[0]
        assert str(handle.finish_reason) == "eos", handle
        return handle.text

    person = json.loads(text({"json": SCHEMA}))
    assert set(person) == {"name", "age"} and person["age"] <= 99 and len(person["name"]) <= 12
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", text({"regex": r"[a-c]{3}-[0-9]{2}"}))
    assert text({"choice": ["yes", 'no "never"']}) in ("yes", 'no "never"')
    assert re.fullmatch(r"(ab|cd),(ab|cd)", text({"grammar": 'start: item "," item\nitem: "ab" | "cd"'}))


def test_every_sample_goes_its_own_way_through_the_form(engine):
    params = lk.SamplingParams(n=6, structured_outputs={"regex": "[a-z]{4,8}"}, max_tokens=30, seed=1)
    handle = engine.generate(["Answer: "], params)[0]
    texts = [member.text for member in (handle, *handle.samples)]
    assert all(re.fullmatch("[a-z]{4,8}", text) for text in texts), texts
    assert len(set(texts)) > 1


def test_the_form_survives_preemption_and_time_travel():
    params = lk.SamplingParams(structured_outputs={"regex": "[a-z]{40}"}, max_tokens=44, seed=5)

    def texts(num_blocks):
        with lk.Engine(num_blocks=num_blocks, block_size=4, watermark=0.0) as eng:
            found = [handle.text for handle in eng.generate(["one", "two", "three", "four", "five", "six"], params)]
            return found, eng.scheduler.num_preempted

    quiet, _ = texts(200)
    tight, num_preempted = texts(14)
    assert num_preempted > 0 and quiet == tight
    assert all(re.fullmatch("[a-z]{40}", text) for text in quiet)

    eng = lk.Engine(num_blocks=50)
    handle = eng.submit("one", params)
    for _ in range(5):
        eng.step()
    moment = eng.snapshot()
    eng.run()
    first = list(handle.output_ids)
    eng.restore(moment)
    eng.run()
    assert handle.output_ids == first and re.fullmatch("[a-z]{40}", handle.text)
    eng.close()
    assert "closed" in repr(eng)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured_outputs": {"jsn": {}}}, "unknown structured_outputs 'jsn'; did you mean 'json'"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "names one form"),
        ({"structured_outputs": {"choice": []}}, r"cannot be \[\]"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "cannot be combined with ignore_eos"),
        ({"extra_args": 3}, "extra_args maps names to values"),
    ],
)
def test_parameters_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lk.SamplingParams(**options)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "[a"}, "regex cannot be used"),
        ({"json": "{not json"}, "json cannot be read"),
        ({"json": {"type": "nonsense"}}, "json cannot be used"),
        ({"grammar": "start: missing_rule"}, "grammar cannot be used"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_its_requests_alone(engine, form, message):
    with pytest.raises(ValueError, match=message):
        engine.submit("Answer: ", lk.SamplingParams(structured_outputs=form))
    assert engine.generate(["x"], lk.SamplingParams(max_tokens=2))[0].output_ids


def test_an_order_can_read_extra_args():
    params = lk.SamplingParams(extra_args={"tenant": "a"})
    assert params.extra_args["tenant"] == "a" and "tenant" in repr(params)
