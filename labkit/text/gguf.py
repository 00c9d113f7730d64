"""A tokenizer from the metadata of a GGUF file: byte-level BPE ("gpt2") and SentencePiece ("llama").

It reads the keys `tokenizer.*` and nothing else of the file. Text is cut by the regex that `tokenizer.ggml.pre` names;
a name that is not listed is refused, since another regex would give other tokens without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from labkit.text.tokenizer import Tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}"
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{SLASHES}"
GPT4O = (
    rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SLASHES}"
)  # fmt: skip


@dataclass(frozen=True)
class Pre:
    """How text is cut before BPE: by each regex in turn."""

    cuts: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is not built from merges
    add_bos: bool = False  # unless the file says otherwise
    nfc: bool = False


PRE = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Pre((LLAMA3,), whole_words=True, add_bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Pre((QWEN2,), nfc=True)),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), Pre((GPT2,))),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), Pre((r"\p{N}", GPT2))),
    "tekken": Pre((TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Pre((GPT4O,))),
}
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # kinds of tokens
LONGEST = 256  # characters of a token that SentencePiece joins: the work grows with their square
SPACE = "▁"


def tokenizer_of(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a file's metadata describes, with its chat template."""
    file = _Fields(fields, where)
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise file.error("model", f"{str(model)[:64]!r} is not read; labkit reads gpt2 and llama")
    try:
        backend, add_bos = _byte_level(file) if model == "gpt2" else _sentencepiece(file)
        _add_specials(backend, file, add_bos)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise file.error("tokens", f"they make no tokenizer: {error}") from error
    config = {f"{name}_token": token for name in ("bos", "eos", "unk", "pad") if (token := file.special(name))}
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(backend, config, template if isinstance(template, str) else None)


class _Fields:
    """The tokenizer's fields, checked against each other."""

    IDS: ClassVar = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        self.tokens = self.strings("tokens")
        self.vocab = {token: id for id, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise self.error("tokens", f"{len(self.tokens) - len(self.vocab)} tokens are there twice")
        self.types = self.numbers("token_type", np.ones(len(self.tokens), np.int64))

    def error(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"{self.where}: field 'tokenizer.ggml.{name}': {reason} (skip_tokenizer_init=True goes without)"
        )

    def get(self, name: str) -> Any:
        return self.fields.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        found = self.get(name)
        if not isinstance(found, list) or not found:
            raise self.error(name, "it must be a list of strings")
        return found

    def numbers(self, name: str, default: np.ndarray | None = None) -> np.ndarray:
        found = self.get(name)
        found = default if found is None else found
        if not isinstance(found, np.ndarray) or len(found) != len(self.tokens):
            raise self.error(name, f"it must have a number for each of {len(self.tokens)} tokens")
        return found

    def flag(self, name: str, default: bool) -> bool:
        found = self.get(name)
        return found if isinstance(found, bool) else default

    def special(self, name: str) -> str | None:
        found = self.get(f"{self.IDS[name]}_token_id")
        fits = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(self.tokens)
        return self.tokens[found] if fits else None


def _byte_level(file: _Fields) -> tuple[Any, bool]:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = file.get("pre")
    if not isinstance(name, str) or name not in PRE:
        raise file.error("pre", f"{str(name)[:64]!r} is not known; labkit knows {', '.join(sorted(PRE))}")
    pre = PRE[name]
    merges = []
    for line in file.strings("merges"):
        left, _, right = line.partition(" ")
        if left not in file.vocab or right not in file.vocab or left + right not in file.vocab:
            raise file.error("merges", f"{line[:64]!r} joins or makes what is no token")
        merges.append((left, right))
    backend = Backend(models.BPE(file.vocab, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(file: _Fields) -> tuple[Any, bool]:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    plain = {token: id for token, id in file.vocab.items() if file.types[id] not in (UNKNOWN, CONTROL, BYTE)}
    if long := [token for token in plain if len(token) > LONGEST]:
        raise file.error("tokens", f"{len(long)} tokens have more than {LONGEST} characters")
    merges = _merges(plain, file.numbers("scores"))
    has_bytes = all(f"<0x{byte:02X}>" in file.vocab for byte in range(256))
    backend = Backend(
        models.BPE(file.vocab, merges, unk_token=file.special("unk"), fuse_unk=True, byte_fallback=has_bytes)
    )
    prefix = file.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges(vocab: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best token first: the order in which SentencePiece joins them."""
    found = []
    for token, id in vocab.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(vocab[left], vocab[right], left, right) for left, right in pairs if left in vocab and right in vocab]
        found += [(-float(scores[id]), *pair) for pair in sorted(known)]
    found.sort(key=lambda entry: entry[0])
    return [(left, right) for *_, left, right in found]


def _add_specials(backend: Any, file: _Fields, add_bos: bool) -> None:
    """Tokens that are matched whole, and what is put around a text."""
    from tokenizers import AddedToken, processors

    for special, kind in ((True, CONTROL), (False, USER)):
        names = [file.tokens[id] for id in np.flatnonzero(file.types == kind)]
        added = [AddedToken(name, special=special, normalized=False) for name in names if name]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos, eos = file.special("bos"), file.special("eos")
    before = [bos] if bos and file.flag("add_bos_token", add_bos) else []
    after = [eos] if eos and file.flag("add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, file.vocab[token]) for token in dict.fromkeys([*before, *after])],
        )
