"""labkit: a research workbench for LLM serving. Use it as `import labkit as lk`; names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .core.shown import draw_with
from .core.version import __version__

_HOME = {
    "BlockManager": "core.blocks.manager",
    "Kept": "core.blocks.states",
    "BlockTable": "core.blocks.table",
    "OutOfBlocksError": "core.blocks.manager",
    "Span": "core.blocks.prefix",
    "LRU": "core.blocks.eviction",
    "FIFO": "core.blocks.eviction",
    "LFU": "core.blocks.eviction",
    "SLRU": "core.blocks.queues",
    "S3FIFO": "core.blocks.queues",
    "TTL": "core.blocks.eviction",
    "Hinted": "core.blocks.hinted",
    "Hint": "core.blocks.sessions",
    "CostAware": "core.blocks.eviction",
    "Scheduler": "core.scheduling.scheduler",
    "RejectedError": "core.scheduling.scheduler",
    "FunctionDraft": "sampling.drafts",
    "NGramDraft": "sampling.drafts",
    "SuffixDraft": "sampling.drafts",
    "EagleDraft": "sampling.drafts",
    "ModelDraft": "sampling.drafts",
    "TreeDraft": "sampling.drafts",
    "PoolingParams": "core.pooling",
    "SamplingParams": "core.params",
    "StreamingLLM": "smaller",
    "H2O": "smaller",
    "PyramidKV": "smaller",
    "SnapKV": "smaller",
    "RKV": "smaller",
    "Request": "core.request",
    "Plan": "core.plan",
    "Result": "core.plan",
    "Failure": "core.plan",
    "Outputs": "core.plan",
    "EventLog": "core.events.log",
    "diff": "core.events.diff",
    "dashboard": "widgets.dashboard",
    "Dashboard": "widgets.dashboard",
    "watch": "widgets.watch",
    "Load": "notebook.play",
    "Player": "notebook.play",
    "Engine": "engine.engine",
    "StalledError": "engine.loop",
    "LLM": "llm",
    "LoRARequest": "llm",
    "AsyncLLMEngine": "llm",
    "AsyncEngineArgs": "llm",
    "RequestOutputKind": "core.params",
    "serve": "server",
    "ModelManager": "server.manager",
    "BeamSearchParams": "engine.beams",
    "parse_benchmark_output": "bench.metrics",
    "calculate_performance_improvement": "bench.metrics",
    "beam_search": "engine.beams",
    "kernel_lab": "lab.kernel_lab",
    "try_variant": "lab.trial",
    "divergence": "lab.divergence",
    "train_adapter": "training.adapter",
    "TorchRunner": "runner.torch",
    "Workers": "parallel.processes",
    "Replicas": "replicas.front",
    "ExternalWorkers": "parallel.external",
    "RayWorkers": "parallel.actors",
    "load_linear": "loading.single",
    "load_model": "models",
    "FakeRunner": "runner.fake",
    "SimRunner": "runner.sim",
    "Layout": "runner.base",
    "ByteTokenizer": "text.tokenizer",
    "Tokenizer": "text.tokenizer",
    "Activations": "engine.activations",
    "read_activations": "engine.activations",
    "Handle": "engine.handle",
    "RequestError": "engine.handle",
    "Experiment": "study.experiment",
    "Study": "study.study",
    "BlockEventPublisher": "engine.block_events",
    "BlockEventSubscriber": "engine.block_events",
    "calibrate": "study.calibrate",
    "compare": "study.compare",
    "next_tokens": "study.next_tokens",
    "quantize": "quantization.quantize",
    "quantization_report": "quantization.report",
    "sensitivity": "quantization.sensitivity",
    "Workload": "bench.workload",
    "WallClock": "clock",
    "VirtualClock": "clock",
    "Blocks": "core.blocks.exported",
    "Transferred": "engine.handing",
    "KVConnector": "engine.kv_connector",
    "transfer_blocks": "engine.handing",
}

_MODULES = {
    "assets": "assets",
    "doctor": "notebook.doctor",
    "edit": "core.edits",
    "explain": "widgets.explain",
    "policies": "policies",
    "study": "study",
    "workloads": "study.workloads",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from . import policies, study
    from .bench.workload import Workload
    from .clock import VirtualClock, WallClock
    from .core.blocks.eviction import FIFO, LFU, LRU, TTL, CostAware
    from .core.blocks.exported import Blocks
    from .core.blocks.hinted import Hinted
    from .core.blocks.manager import BlockManager, OutOfBlocksError
    from .core.blocks.prefix import Span
    from .core.blocks.queues import S3FIFO, SLRU
    from .core.blocks.sessions import Hint
    from .core.blocks.table import BlockTable
    from .core.events.diff import diff
    from .core.events.log import EventLog
    from .core.params import RequestOutputKind, SamplingParams
    from .core.plan import Failure, Outputs, Plan, Result
    from .core.pooling import PoolingParams
    from .core.request import Request
    from .core.scheduling.scheduler import RejectedError, Scheduler
    from .engine.activations import Activations, read_activations
    from .engine.beams import BeamSearchParams, beam_search
    from .engine.block_events import BlockEventPublisher, BlockEventSubscriber
    from .engine.engine import Engine
    from .engine.handing import Transferred, transfer_blocks
    from .engine.handle import Handle, RequestError
    from .engine.kv_connector import KVConnector
    from .engine.loop import StalledError
    from .lab.divergence import divergence
    from .lab.kernel_lab import kernel_lab
    from .lab.trial import try_variant
    from .llm import LLM, AsyncEngineArgs, AsyncLLMEngine, LoRARequest
    from .loading.single import load_linear
    from .models import load_model
    from .notebook.play import Load, Player
    from .parallel.actors import RayWorkers
    from .parallel.external import ExternalWorkers
    from .parallel.processes import Workers
    from .quantization.quantize import quantize
    from .quantization.report import quantization_report
    from .quantization.sensitivity import sensitivity
    from .replicas.front import Replicas
    from .runner.base import Layout
    from .runner.fake import FakeRunner
    from .runner.sim import SimRunner
    from .runner.torch import TorchRunner
    from .sampling.drafts import EagleDraft, FunctionDraft, ModelDraft, NGramDraft, SuffixDraft, TreeDraft
    from .server import serve
    from .server.manager import ModelManager
    from .smaller import H2O, RKV, PyramidKV, SnapKV, StreamingLLM
    from .study import workloads
    from .study.calibrate import calibrate
    from .study.compare import compare
    from .study.experiment import Experiment
    from .study.next_tokens import next_tokens
    from .study.study import Study
    from .text.tokenizer import ByteTokenizer, Tokenizer
    from .training.adapter import train_adapter
    from .widgets import explain
    from .widgets.dashboard import Dashboard, dashboard
    from .widgets.watch import watch


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def _draw(thing: object) -> str | None:
    """Views are in labkit.widgets, which is imported when the first one is needed."""
    picture: str | None = importlib.import_module(".widgets.views", __name__).draw(thing)
    return picture


draw_with(_draw)


def load_ipython_extension(shell: object) -> None:
    """`%load_ext labkit`: %labkit and %%bench."""
    from .notebook.magics import load

    load(shell)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
