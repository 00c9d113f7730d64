"""Reasoning apart from the answer, and grammars that begin behind it."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.text.answer import Answer, whole
from labkit.text.parts import Message
from labkit.text.reasoning import REASONING, AfterReasoning
from labkit.text.tools import PARSERS


def split(name: str, text: str, prompt: str = "") -> Message:
    return whole(lambda: REASONING[name].begin(prompt), text)


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_and_answer(name):
    assert split(name, "<think>why\n</think>\n\nbecause") == Message("\n\nbecause", "why\n")
    assert split(name, "why</think>because", "...<think>\n") == Message("because", "why")
    assert split(name, "<think>cut off </thi") == Message("", "cut off </thi")
    assert split(name, "because", "<think>\n\n</think>\n\n") == Message("because")


def test_without_a_tag_deepseek_reasons_and_qwen_answers():
    assert split("deepseek_r1", "so it is 4.</think>4") == Message("4", "so it is 4.")
    assert split("deepseek_r1", "so it is") == Message("", "so it is")
    assert split("qwen3", " It is 4.</think>") == Message(" It is 4.</think>")


@pytest.mark.parametrize("name", REASONING)
def test_cuts_make_no_difference_also_with_calls_behind(name):
    rng = random.Random(3)
    text = '<think>a < b </ think></think>Now <tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>'

    def read(cuts):
        answer, found = Answer(REASONING[name].begin(), PARSERS["hermes"]()), []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            found += answer.feed(text[start:end], ended=end == len(text))
        assert answer.num_ended == 1
        return Message.of(found)

    expected = read([])
    assert expected.reasoning == "a < b </ think>" and expected.content == "Now" and len(expected.calls) == 1
    for _ in range(200):
        assert read(sorted(rng.sample(range(1, len(text)), rng.randint(1, 9)))) == expected


def test_a_processor_begins_behind_the_reasoning():
    tokenizer = lk.Tokenizer.load(lk.assets.path("tiny"))

    class Seen:
        def begin(self):
            self.outputs = []
            return self

        def fill(self, output, bits):
            self.outputs.append(output)
            bits[:] = 0

    seen = Seen()
    step = AfterReasoning(seen, tokenizer).begin()
    ids = tokenizer.encode("<think>hm</think>", add_special_tokens=False)
    for size, masked in [*((size, False) for size in range(len(ids))), (len(ids), True), (len(ids) + 2, True)]:
        bits = np.full(3, -1, np.int32)
        step.fill([*ids, 7, 8][:size], bits)
        assert (bits == (0 if masked else -1)).all(), size
    assert seen.outputs == [[], [7, 8]]
