"""Tool calls in what models write: each family's forms, malformed ones, and texts cut anywhere."""

import json
import random
import warnings

import pytest

from labkit.text.answer import whole
from labkit.text.parts import Message, Part, ToolCall
from labkit.text.tools import PARSERS
from labkit.text.tools.forced import ForcedParser, NamedParser, list_schema

WEATHER = ToolCall("weather", '{"city": "São \\"Paulo\\" }]", "days": [1, {"x": null}]}')
WAIT = ToolCall("wait", "{}")


def parsed(family: str, text: str) -> Message:
    return whole(PARSERS[family], text)


def merged(parts: list[Part]) -> list[Part]:
    """The same parts, with neighbours of one kind joined."""
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind and part.kind in ("content", "reasoning", "arguments"):
            found[-1] = part._replace(text=found[-1].text + part.text)
        else:
            found.append(part)
    return found


def in_pieces(make, text: str, cuts: list[int]) -> list[Part]:
    reader, found = make(), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += reader.feed(text[start:end])
    return merged(found + reader.finish())


HERMES = '<tool_call>\n{{"name": "weather", "arguments": {0}}}\n</tool_call>\n<tool_call>{1}</tool_call>'
WRITTEN = {
    "hermes": HERMES.format(WEATHER.arguments, '{"arguments": {}, "name": "wait"}'),
    "llama3_json": f'{{"name": "weather", "parameters": {WEATHER.arguments}}}; {{"name": "wait", "parameters": {{}}}}',
    "mistral": (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {WEATHER.arguments}}}, {{"name": "wait", "arguments": {{}}}}]'
    ),
    "pythonic": """[weather(city='São "Paulo" }]', days=[1, {'x': None}]), wait()]""",
}
FAMILIES = sorted(WRITTEN)
MALFORMED = {
    "hermes": [
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"</tool_call>',
        "<tool_call>weather(Paris)</tool_call> and on",
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
        "text with <tool_call",
    ],
    "llama3_json": [
        '{"name": "Bob", "age": 30}',
        '{"name": "weather", "parameters": {"city": }}',
        "no call { at all }",
        "<|python_tag|>print(1)",
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS]weather", "[TOOL_CALLS]weather[ARGS]no"],
    "pythonic": ["[1, 2, 3] are numbers", "[weather(city)]", "[weather(city=f())]", "[weather(city='a)]", "[]", "[ "],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_and_their_arguments_are_json(family):
    found = parsed(family, WRITTEN[family])
    assert [call.name for call in found.calls] == ["weather", "wait"] and not found.content.strip()
    assert [json.loads(call.arguments) for call in found.calls] == [json.loads(WEATHER.arguments), {}]


@pytest.mark.parametrize("family", FAMILIES)
def test_malformed_calls_stay_text(family):
    for text in MALFORMED[family]:
        assert parsed(family, text) == Message(text), text


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_calls_is_handed_out_as_it_is(family):
    for text in ("Hello, world.\n", " \n ", "", "a < b [c] {d}"):
        assert parsed(family, text) == Message(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_cut_anywhere_gives_the_same_calls(family):
    rng = random.Random(7)
    texts = [WRITTEN[family], *MALFORMED[family]]
    if family != "pythonic":
        texts += [f"First, {WRITTEN[family]}\n\nThen.\n", WRITTEN[family][: len(WRITTEN[family]) * 2 // 3]]
    for text in texts:
        make = PARSERS[family]
        expected = in_pieces(make, text, [])
        assert in_pieces(make, text, list(range(1, len(text)))) == expected, "single characters"
        for _ in range(60):
            cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 6)))) if text[1:] else []
            assert in_pieces(make, text, cuts) == expected, (text, cuts)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_text_never_fails_and_is_the_same_in_pieces(family):
    rng = random.Random(11)
    words = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", '{"name": ', '"f"', ", "]
    words += ['"arguments": ', '"parameters": ', "f(", "a=", *"""{}[]()'"\\1 ;é"""]
    for i in range(600):
        text = "".join(rng.choice(words) for _ in range(rng.randint(1, 24)))
        if i % 2:  # a good one with a few characters changed
            chars = list(WRITTEN[family])
            for _ in range(rng.randint(1, 3)):
                chars[rng.randrange(len(chars))] = rng.choice(["", "x", '"', "}", "\\", "]"])
            text = "".join(chars)
        expected = in_pieces(PARSERS[family], text, [])
        assert in_pieces(PARSERS[family], text, list(range(1, len(text)))) == expected, text
        if not any(part.kind == "end" for part in expected):
            assert Message.of(expected).content == text


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_arrive_in_pieces(family):
    reader, pieces = PARSERS[family](), []
    for char in WRITTEN[family]:
        pieces += [part.text for part in reader.feed(char) if part.kind == "arguments" and part.call == 0]
    assert len(pieces) > 2 and json.loads("".join(pieces)) == json.loads(WEATHER.arguments)


def test_text_around_calls_is_content():
    found = parsed("hermes", f"I look.\n{WRITTEN['hermes']}\nDone.")
    assert found.content == "I look.\nDone." and len(found.calls) == 2
    assert parsed("mistral", 'Hm [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}').calls == [
        ToolCall("f", '{"a": 1}'),
        ToolCall("g", "{}"),
    ]
    assert parsed("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}').calls[0].name == "f"
    assert parsed("pythonic", "<|python_start|>[f(a=true)]<|python_end|>").calls == [ToolCall("f", '{"a": true}')]


def test_a_good_call_before_a_malformed_one_counts():
    found = parsed("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": 3}</tool_call>')
    assert found.calls == [ToolCall("f", "{}")] and found.content == '<tool_call>{"name": 3}</tool_call>'


def test_arguments_may_be_written_as_a_string():
    found = parsed("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>')
    assert found.calls == [ToolCall("f", '{"a": 1}')]


def test_a_call_that_breaks_after_its_name_was_sent_is_marked():
    reader = PARSERS["hermes"]()
    text = '<tool_call>{"name": "f", "arguments": {"a": 1'
    assert [part.kind for part in reader.feed(text)] == ["name", "arguments"]
    assert reader.finish() == [Part("broken", text, 0)]


def test_nesting_and_huge_numbers_do_not_break_the_parser():
    deep = "[" * 100_000 + "]" * 100_000
    for family, text in (
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": %s}}</tool_call>'),
        ("pythonic", "[f(a=%s)]"),
    ):
        for value in (deep, "9" * 10_000):
            assert parsed(family, text % value) == Message(text % value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parsed("pythonic", r"[f(a='\d')]").calls == [ToolCall("f", '{"a": "\\\\d"}')]


def test_forced_calls_keep_what_was_cut_off():
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": "x'
    found = whole(ForcedParser, text)
    assert found == Message(calls=[ToolCall("f", '{"a": 1}'), ToolCall("g", '{"b": "x')])
    assert whole(lambda: NamedParser("f"), '{"a": ') == Message(calls=[ToolCall("f", '{"a": ')])


def test_the_schema_of_a_list_of_calls_moves_definitions_to_the_top():
    point = {"$defs": {"P": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/P"}}}
    found = list_schema([("f", point), ("g", None)], most=1)
    assert found["$defs"] == {"P": {"type": "integer"}} and found["maxItems"] == 1
    assert found["items"]["anyOf"][0]["properties"]["parameters"]["type"] == "object"
    with pytest.raises(ValueError, match="define 'P' differently"):
        list_schema([("f", point), ("g", {"$defs": {"P": {"type": "string"}}})])
