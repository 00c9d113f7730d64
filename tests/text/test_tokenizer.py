"""Tokenizers: whole characters, chat templates, and errors that name the file."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import labkit as lk

TEXTS = ["def f(x):\n    return x", "naïve café — 漢字 🙂🏽 \x00\t", "", " leading", "a\u0301\u200d"]


@pytest.fixture(scope="module")
def tokenizer() -> lk.Tokenizer:
    return lk.Tokenizer.load(lk.assets.path("tiny"))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streams_give_whole_characters_and_the_whole_text(tokenizer, text):
    stream = tokenizer.stream(tokenizer.encode("x = "))
    pieces = [stream.feed([id]) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_make_no_character_do_not_stop_a_stream(tokenizer):
    lone = tokenizer.encode("🙂")[:1]
    stream = tokenizer.stream()
    text = stream.feed(lone * 9 + tokenizer.encode("and on it goes, for long enough"))
    assert text.endswith("long enough")


def test_special_tokens_are_shown_when_asked(tokenizer):
    ids = tokenizer.encode("<|user|>hi<|end|>")
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<|end|>"


def test_chat_is_what_transformers_makes_of_it(tokenizer):
    theirs = AutoTokenizer.from_pretrained(lk.assets.path("tiny"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is `dedent` for?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == expected
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert tokenizer.chat_text(messages, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is a list like"),
        ([], "messages is a list like"),
        ([{"content": "hi"}], r'messages\[0\] needs a "role"'),
    ],
)
def test_bad_messages_are_named(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.chat(messages)


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    shutil.copy(lk.assets.path("tiny") / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        lk.Tokenizer.load(tmp_path).chat([{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_is_heard(tokenizer, tmp_path):
    shutil.copy(lk.assets.path("tiny") / "tokenizer.json", tmp_path)
    template = "{{ raise_exception('only the user may speak') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match="only the user may speak"):
        lk.Tokenizer.load(tmp_path).chat([{"role": "user", "content": "hi"}])


def test_a_damaged_tokenizer_names_its_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        lk.Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        lk.Tokenizer.load(tmp_path / "nowhere")
