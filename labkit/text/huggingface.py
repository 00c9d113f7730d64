"""A model's tokenizer as transformers has it, for users who call it; and with another chat template. And a model's
processor of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.text.tokenizer import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def as_transformers(tokenizer: Any) -> Any:
    """A transformers tokenizer with the same vocabulary, special tokens and chat template. One that is not a model's is
    returned as it is.

    >>> import labkit as lk
    >>> made = as_transformers(lk.Tokenizer.load(lk.assets.path("tiny")))
    >>> made.decode(made("def f(x):").input_ids, skip_special_tokens=True)
    'def f(x):'
    """
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    config = tokenizer.config
    special = {name: token for name in SPECIAL if (token := tokenizer.special(name)) is not None}
    more = {name: config[name] for name in ("model_max_length", "padding_side", "truncation_side") if name in config}
    kind: Any = PreTrainedTokenizerFast  # it comes without types
    made = kind(tokenizer_object=tokenizer.backend, clean_up_tokenization_spaces=False, **special, **more)
    made.chat_template = tokenizer.template
    return made


def with_template(tokenizer: Any, template: str) -> Any:
    """The tokenizer with this chat template, given as its text or as a file."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError("chat_template needs a model's tokenizer; this engine has none")
    if "{" not in template:
        try:
            template = Path(template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"chat_template {template} cannot be read: {error.strerror}") from None
    return Tokenizer(tokenizer.backend, tokenizer.config, template)


def load_processor(folder: Path, trust_remote_code: bool) -> Any:
    """The processor of a model with images: its image processor, its tokenizer and its placeholders."""
    from transformers import AutoProcessor

    auto: Any = AutoProcessor  # it comes without types
    try:
        return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ValueError(f"{folder} has no image processor that can be read: {error}") from error
