"""labkit: a research workbench for LLM serving. `import labkit as lk`; every name is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .core.shown import draw_with

__version__ = "0.1.0.dev0"

_HOME = {
    "BlockManager": "core.manager",
    "BlockTable": "core.table",
    "OutOfBlocksError": "core.manager",
    "Span": "core.prefix",
    "LRU": "core.eviction",
    "FIFO": "core.eviction",
    "LFU": "core.eviction",
    "SLRU": "core.eviction",
    "S3FIFO": "core.eviction",
    "TTL": "core.eviction",
    "CostAware": "core.eviction",
    "Scheduler": "core.scheduler",
    "RejectedError": "core.scheduler",
    "SamplingParams": "core.params",
    "Request": "core.request",
    "Plan": "core.plan",
    "Result": "core.plan",
    "Failure": "core.plan",
    "Outputs": "core.plan",
    "EventLog": "core.log",
    "diff": "core.diff",
    "dashboard": "widgets.dashboard",
    "Dashboard": "widgets.dashboard",
    "Load": "play",
    "Player": "play",
    "Engine": "engine",
    "StalledError": "engine",
    "LLM": "llm",
    "BeamSearchParams": "beams",
    "parse_benchmark_output": "bench.metrics",
    "calculate_performance_improvement": "bench.metrics",
    "beam_search": "beams",
    "kernel_lab": "lab.kernel_lab",
    "try_variant": "lab.trial",
    "divergence": "lab.divergence",
    "TorchRunner": "runner.torch",
    "load_model": "models",
    "FakeRunner": "runner.fake",
    "SimRunner": "runner.sim",
    "Layout": "runner.base",
    "ByteTokenizer": "tokenizer",
    "Tokenizer": "tokenizer",
    "Handle": "handle",
    "RequestError": "handle",
    "Experiment": "study.experiment",
    "Study": "study.study",
    "calibrate": "study.calibrate",
    "next_tokens": "study.next_tokens",
    "Workload": "bench.workload",
    "WallClock": "clock",
    "VirtualClock": "clock",
}

_MODULES = {
    "assets": "assets",
    "doctor": "doctor",
    "explain": "widgets.explain",
    "workloads": "study.workloads",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .beams import BeamSearchParams, beam_search
    from .bench.workload import Workload
    from .clock import VirtualClock, WallClock
    from .core.diff import diff
    from .core.eviction import FIFO, LFU, LRU, S3FIFO, SLRU, TTL, CostAware
    from .core.log import EventLog
    from .core.manager import BlockManager, OutOfBlocksError
    from .core.params import SamplingParams
    from .core.plan import Failure, Outputs, Plan, Result
    from .core.prefix import Span
    from .core.request import Request
    from .core.scheduler import RejectedError, Scheduler
    from .core.table import BlockTable
    from .engine import Engine, StalledError
    from .handle import Handle, RequestError
    from .lab.divergence import divergence
    from .lab.kernel_lab import kernel_lab
    from .lab.trial import try_variant
    from .llm import LLM
    from .models import load_model
    from .play import Load, Player
    from .runner.base import Layout
    from .runner.fake import FakeRunner
    from .runner.sim import SimRunner
    from .runner.torch import TorchRunner
    from .study import workloads
    from .study.calibrate import calibrate
    from .study.experiment import Experiment
    from .study.next_tokens import next_tokens
    from .study.study import Study
    from .tokenizer import ByteTokenizer, Tokenizer
    from .widgets import explain
    from .widgets.dashboard import Dashboard, dashboard


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def _draw(thing: object) -> str | None:
    """Pictures come from labkit.widgets, which is loaded when the first one is wanted."""
    picture: str | None = importlib.import_module(".widgets.views", __name__).draw(thing)
    return picture


draw_with(_draw)


def load_ipython_extension(shell: object) -> None:
    """`%load_ext labkit`: %labkit and %%bench."""
    from .magics import load

    load(shell)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
