"""Tokenizers in GGUF metadata give the tokens of the tokenizer that they were written from."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

import labkit as lk
from labkit.text.gguf import PRE, tokenizer_of

TEXTS = [
    "def f(x):\n    return x", "naïve café — 漢字 🙂🏽 \t", "", " leading", "  two  spaces  ", "a\u0301\u200d",
    "I'LL they'd", "in 2024, 1234567 and ٣٤", "fooBar HTTPServer ÀÉ",
    "\n\n \n\tx\r\n", "<|user|>hi<|end|>", "///path//\n--",
]  # fmt: skip
SPACE = "▁"


def fields_of(backend: Backend, pre: str, **more) -> dict:
    """What a GGUF file says of a byte-level tokenizer."""
    described = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    tokens = sorted(vocab, key=vocab.get)
    fields = {
        "model": "gpt2", "pre": pre, "tokens": tokens,
        "merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "token_type": np.array([3 if token in special else 1 for token in tokens], np.int32),
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}


@pytest.fixture(scope="module")
def tiny() -> lk.Tokenizer:
    return lk.Tokenizer.load(lk.assets.path("tiny"))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_tokenizer_it_was_written_from(tiny, text):
    found = tokenizer_of(fields_of(tiny.backend, "gpt-2"), "x.gguf")
    assert found.encode(text) == tiny.encode(text)
    assert found.decode(found.encode(text)) == tiny.decode(tiny.encode(text))
    assert found.vocab_size == tiny.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_cuts_text_as_transformers_does(text):
    from transformers import Qwen2Tokenizer

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges across words
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 20, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    theirs = Qwen2Tokenizer(vocab=backend.get_vocab(), merges=merges)
    found = tokenizer_of(fields_of(backend, "qwen2"), "x.gguf")
    assert found.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "I'LL see 12345x!!\n\n y", ["I", "'LL", " see", " ", "123", "45", "x", "!!\n\n", " y"]),
        ("qwen2", "I'LL see 123", ["I", "'LL", " see", " ", "1", "2", "3"]),
        ("gpt-2", "I'll see 123  y", ["I", "'ll", " see", " 123", " ", " y"]),
        ("refact", "x 123 y", ["x", " ", "1", "2", "3", " y"]),
        ("tekken", "fooBar HTTPServer 12 a//\n", ["foo", "Bar", " HTTPServer", " ", "1", "2", " a", "//\n"]),
        ("gpt-4o", "fooBar they'll 1234", ["foo", "Bar", " they'll", " ", "123", "4"]),
    ],
)
def test_text_is_cut_as_the_name_says(tiny, pre, text, pieces):
    found = tokenizer_of(fields_of(tiny.backend, pre), "x.gguf").backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


def test_unknown_kinds_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match=r"x.gguf: field 'tokenizer.ggml.pre': 'new-kind' is not known; labkit knows"):
        tokenizer_of(fields_of(tiny.backend, "new-kind"), "x.gguf")
    with pytest.raises(ValueError, match=r"model': 'rwkv' is not read; labkit reads gpt2 and llama"):
        tokenizer_of(fields_of(tiny.backend, "gpt-2", model="rwkv"), "x.gguf")


def test_what_does_not_fit_together_is_named(tiny):
    good = fields_of(tiny.backend, "gpt-2")
    tokens, merges = good["tokenizer.ggml.tokens"], good["tokenizer.ggml.merges"]
    for more, message in (
        ({"tokens": [*tokens, tokens[0]]}, "1 tokens are there twice"),
        ({"tokens": 3}, "it must be a list of strings"),
        ({"merges": [*merges, "qqqqqq zzzzzz"]}, "joins or makes what is no token"),
        ({"token_type": np.ones(3)}, "a number for each of 4096 tokens"),
    ):
        with pytest.raises(ValueError, match=f"x.gguf: field .*{message}"):
            tokenizer_of(good | {f"tokenizer.ggml.{key}": value for key, value in more.items()}, "x.gguf")


def test_begin_and_end_are_added_where_the_file_says_so(tiny):
    good = fields_of(tiny.backend, "llama-bpe", bos_token_id=2, eos_token_id=5)
    plain = tokenizer_of(fields_of(tiny.backend, "llama-bpe"), "x.gguf").encode("x = 1")
    assert tokenizer_of(good, "x").encode("x = 1") == [2, *plain]
    assert tokenizer_of(good | {"tokenizer.ggml.add_bos_token": False}, "x").encode("x = 1") == plain
    both = tokenizer_of(good | {"tokenizer.ggml.add_eos_token": True}, "x")
    assert both.encode("x = 1") == [2, *plain, 5] and both.eos_token == "<|end|>"
    assert both.encode("x = 1", add_special_tokens=False) == plain


def test_the_chat_template_is_used(tiny):
    fields = fields_of(tiny.backend, "gpt-2", bos_token_id=0)
    fields["tokenizer.chat_template"] = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    found = tokenizer_of(fields, "x.gguf")
    assert found.chat_text([{"role": "user", "content": "hi"}]) == "<|endoftext|><|user|>hi"


def spm_fields(pieces: list[str], **more) -> dict:
    """Pieces in the order in which they are joined, behind three special tokens and all bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    fields = {
        "model": "llama", "tokens": tokens, "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32), "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}


PIECES = [f"{SPACE}t", "he", f"{SPACE}the", "in", SPACE, *"abcdefghint"]


def test_sentencepiece_joins_the_best_token_first_and_falls_back_to_bytes():
    found = tokenizer_of(spm_fields(PIECES), "x.gguf")
    shown = [found.backend.id_to_token(id) for id in found.encode("the thin é")]
    assert shown == ["<s>", f"{SPACE}the", f"{SPACE}t", "h", "in", SPACE, "<0xC3>", "<0xA9>"]
    assert found.decode(found.encode("the thin é")) == "the thin é"
    plain = tokenizer_of(spm_fields(PIECES, add_space_prefix=False, add_bos_token=False), "x.gguf")
    assert [plain.backend.id_to_token(id) for id in plain.encode("the")] == ["t", "he"]


def test_a_token_too_long_to_join_is_refused():
    with pytest.raises(ValueError, match="1 tokens have more than 256 characters"):
        tokenizer_of(spm_fields(["a" * 300]), "x.gguf")


def test_every_name_in_the_table_makes_a_tokenizer(tiny):
    for pre in PRE:
        found = tokenizer_of(fields_of(tiny.backend, pre), "x.gguf")
        assert found.decode(found.encode(TEXTS[0])) == TEXTS[0]
