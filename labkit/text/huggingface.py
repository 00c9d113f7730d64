"""A model's tokenizer as transformers has it, for users who call it; and with another chat template. And a model's
processor of images."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from labkit.text import internvl
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
    """The processor of a model with images: its image processor, its tokenizer and its placeholders. Videos are left
    out, whose processors need torchvision."""
    import transformers

    if (original := internvl.fields_of(folder)) is not None:
        base = without_video("InternVLProcessor")
        return internvl.processor_of(original, as_transformers(Tokenizer.load(folder)), base)
    auto: Any = transformers  # its classes come without types
    fields: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            fields |= json.loads(path.read_text(encoding="utf-8")) if name.startswith("proc") else _kind(path)
    kind = fields.get("processor_class")
    try:
        if not isinstance(kind, str) or not hasattr(auto, kind):
            return auto.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        made = without_video(kind)
        wanted = inspect.signature(made.__init__).parameters
        given = {name: value for name, value in fields.items() if name in wanted and name not in _OWN_PARTS}
        given["image_processor"] = auto.AutoImageProcessor.from_pretrained(folder)
        given["tokenizer"] = auto.AutoTokenizer.from_pretrained(folder)
        return made(**given, **({"video_processor": None} if "video_processor" in wanted else {}))
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has no image processor that can be read: {error}") from error


_OWN_PARTS = ("image_processor", "video_processor", "tokenizer", "chat_template")


def _kind(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
    return {"processor_class": found} if found else {}


def without_video(kind: str) -> Any:
    """A processor class of transformers that may go without its video processor."""
    import transformers

    base: Any = getattr(transformers, kind)
    return type(kind, (base,), {"check_argument_for_proper_class": lambda *_: None, "__module__": base.__module__})
