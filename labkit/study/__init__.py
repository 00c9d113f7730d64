"""Experiments, traces, cache studies: serve or replay workloads under a grid of settings and collect one table. Names
are imported on first use, so `lk.study` costs nothing until something of it is called."""

from __future__ import annotations

import importlib

_HOME = {
    "Clairvoyant": "foresight",
    "LengthAware": "foresight",
    "ModelShape": "flops",
    "PrefixStudy": "prefix_result",
    "Trace": "trace",
    "TraceRequest": "trace",
    "prefix": "prefix_study",
    "describe": "summary",
    "read_trace": "formats",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'labkit.study' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
