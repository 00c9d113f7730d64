"""transformers internals that labkit uses, looked up in one place, so that an error names what a new version changed.

Everything else in labkit uses transformers' documented interface.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from functools import lru_cache
from typing import Any

import transformers
from torch import nn

TESTED = ("5.17", "5.24")  # the oldest and the newest minor version that the tests passed with

_reading = threading.Lock()


def changed(what: str) -> ImportError:
    """The error for something that this version of transformers no longer has."""
    first, last = TESTED
    major, minor = last.split(".")
    return ImportError(
        f"transformers {transformers.__version__} changed {what}; labkit was tested with {first} to {last}: "
        f"pip install 'transformers>={first},<{major}.{int(minor) + 1}'"
    )


def member(module: str, name: str) -> Any:
    """`name` of one of transformers' modules."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise changed(f"{module}.{name}: it no longer exists") from error


@lru_cache(maxsize=256)
def source_of(kind: type) -> str:
    """The source of a class; nothing where it cannot be read. One at a time: Python's parser fails when several threads
    load models."""
    with _reading:
        try:
            return inspect.getsource(kind)
        except (OSError, TypeError):
            return ""


def parts(module: nn.Module, *names: str) -> None:
    """Check that an attention module has the parts that its adapter uses."""
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise changed(f"{type(module).__name__}: it has no {', '.join(missing)}")


AttentionInterface = member("transformers", "AttentionInterface")
AttentionMaskInterface = member("transformers", "AttentionMaskInterface")
AutoModelForCausalLM = member("transformers", "AutoModelForCausalLM")
BaseModelOutputWithPast = member("transformers.modeling_outputs", "BaseModelOutputWithPast")
BaseModelOutputWithPooling = member("transformers.modeling_outputs", "BaseModelOutputWithPooling")
ROPE_INIT_FUNCTIONS = member("transformers.modeling_rope_utils", "ROPE_INIT_FUNCTIONS")
for _owner, _name in (
    (AttentionInterface, "register"),
    (AttentionInterface, "__getitem__"),
    (AttentionMaskInterface, "register"),
    (member("transformers", "PreTrainedModel"), "set_attn_implementation"),
    (member("transformers", "PreTrainedModel"), "get_output_embeddings"),
):
    if not hasattr(_owner, _name):
        raise changed(f"{_owner.__name__}.{_name}: it no longer exists")
