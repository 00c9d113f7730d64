"""Triton internals that labkit_kernels uses, looked up in one place, so that an error names what a new version changed.

Kernels themselves use only Triton's documented language. This module imports Triton, so import it on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

import triton

TESTED = ("3.6", "3.9")  # the oldest and the newest minor version that the tests passed with


def changed(what: str) -> ImportError:
    """The error for something that this version of Triton no longer has."""
    first, last = TESTED
    major, minor = last.split(".")
    return ImportError(
        f"triton {triton.__version__} changed {what}; labkit was tested with {first} to {last}: "
        f"pip install 'triton>={first},<{major}.{int(minor) + 1}'"
    )


def member(module: str, name: str, *parts: str) -> Any:
    """`name` in one of Triton's modules, checked to have these attributes."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise changed(f"{module}.{name}: it no longer exists") from error
    missing = [part for part in parts if not hasattr(found, part)]
    if missing:
        raise changed(f"{module}.{name}: it has no {', '.join(missing)}")
    return found


JITFunction = member("triton.runtime.jit", "JITFunction", "run", "__call__")
mangle_type = member("triton.runtime.jit", "mangle_type")
Autotuner = member("triton.runtime.autotuner", "Autotuner", "run")
for _name in ("InterpretedFunction", "InterpreterBuilder", "TensorHandle", "_patch_lang_tensor"):
    member("triton.runtime.interpreter", _name)
interpreter = importlib.import_module("triton.runtime.interpreter")
InterpretedFunction = interpreter.InterpretedFunction
member("triton.runtime.interpreter", "InterpreterBuilder", "create_dot")
ASTSource = member("triton.compiler", "ASTSource")
GPUTarget = member("triton.backends.compiler", "GPUTarget")
get_ptxas = member("triton.backends.nvidia.compiler", "get_ptxas")
