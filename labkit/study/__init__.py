"""Experiments, simulations, traces, cache studies: serve or replay workloads under a grid of settings and collect one
table. Names are imported on first use, so `lk.study` costs nothing until something of it is called."""

from __future__ import annotations

import importlib

_HOME = {
    "AnalyticCost": "analytic",
    "Clairvoyant": "caches.foresight",
    "Efficiency": "machines",
    "LengthAware": "caches.foresight",
    "Lines": "lines",
    "MACHINES": "machines",
    "Machine": "machines",
    "ModelShape": "shapes",
    "PrefixStudy": "caches.result",
    "SHAPES": "shapes",
    "Simulation": "simulation",
    "Trace": "traces.trace",
    "TraceRequest": "traces.trace",
    "prefix": "caches.prefix",
    "describe": "traces.summary",
    "to_workload": "traces.serving",
    "read_trace": "traces.formats",
    "record": "traces.recording",
    "simulate": "simulation",
    "smaller_kv": "smaller",
    "what_if": "whatif",
    "write_trace": "traces.formats",
    "Cluster": "clusters.cluster",
    "Comparison": "compare",
    "compare": "compare",
    "Disaggregated": "clusters.placement",
    "Incoming": "clusters.view",
    "RouterError": "clusters.routers",
    "View": "clusters.view",
    "cluster": "clusters.compare",
    "Offloading": "offloading",
    "swap_or_recompute": "offloading",
    "sizing": "sizes",
    "ranks": "scaling",
    "Size": "sizes",
    "Sizing": "sizes",
}
_MODULES = {"generate": "traces.generate", "routers": "clusters.routers"}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> object:
    value: object
    if name in _MODULES:
        value = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'labkit.study' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
