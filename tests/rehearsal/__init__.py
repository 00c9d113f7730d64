"""A GPU to rehearse on, for machines without one: `with rehearsal() as device:` runs labkit's whole CUDA path.

`device.waits` says where the host waited for the device within `TorchRunner.launch`. Kernels are the references
(`kernels="reference"`) or Triton's own in its interpreter (`kernels="triton"`); a launch that was made before is
repeated with the numbers of the first one, as prepared launches are.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from labkit_kernels import OPS, launches, prepared, registry
from torch.utils._python_dispatch import _disable_current_modes

from labkit.runner.torch import TorchRunner
from tests.rehearsal.device import CUDA, Device, Graph, Mode, OnDevice, host_of, tensors_of

PROPERTIES = SimpleNamespace(
    name="rehearsal", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10, warp_size=32,
)  # fmt: skip


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.upto, self.at = 0, 0.0

    def record(self, stream: Any = None) -> None:
        self.upto, self.at = Device.now[-1].issued, time.perf_counter()

    def synchronize(self) -> None:
        Device.now[-1].deliver(self.upto)

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, other: Event) -> float:
        return max(1e-3, (other.at - self.at) * 1e3)


class Stream:
    """There is one order of work, whatever the stream."""

    cuda_stream, device = 0, CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None:
        Device.now[-1].deliver()

    def wait_stream(self, other: Any) -> None: ...


class Generator(torch.Generator):
    """Draws in host memory, and says otherwise."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.given = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.given


class Profile:
    """A profiler that saw nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=list))

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: Any) -> None: ...


@contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    device = Device.now[-1]
    assert device.capturing is None
    device.capturing = graph
    try:
        yield
    finally:
        device.capturing = None


def _cuda(device: Device) -> dict[str, Any]:
    """What stands for `torch.cuda`."""
    stream = Stream()
    return {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda _: None,
        "current_stream": lambda *_: stream, "Stream": Stream, "Event": Event, "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph, "graph": _graph, "is_current_stream_capturing": lambda: device.capturing is not None,
        "synchronize": lambda *_: device.deliver(), "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (60 << 30, 80 << 30), "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20, "reset_peak_memory_stats": lambda *_: None,
        "get_device_properties": lambda *_: PROPERTIES, "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: PROPERTIES.name,
    }  # fmt: skip


@contextmanager
def _device_guard() -> Iterator[None]:
    """torch changes the current device around operations; for CUDA that does nothing now, as for meta tensors."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    assert not guards[cuda], "this torch is built for GPUs: rehearse with one for CPUs"
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = None


@contextmanager
def rehearsal(kernels: str = "reference") -> Iterator[Device]:
    """Within the block there is a GPU, in this thread and in those that start."""
    device = Device()
    run_thread, launch = threading.Thread.run, TorchRunner.launch

    def run_with_mode(thread: threading.Thread) -> None:
        with Mode(device):
            run_thread(thread)

    def watched_launch(runner: TorchRunner, plan: Any) -> Any:
        device.in_launch.depth = getattr(device.in_launch, "depth", 0) + 1
        try:
            return launch(runner, plan)
        finally:
            device.in_launch.depth -= 1

    if kernels == "triton":
        for op in OPS.values():
            op.load_all()
        launches.install()  # kernels on tensors in host memory are interpreted
    with ExitStack() as stack:
        stack.enter_context(_device_guard())
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become tensors of the device
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        for name, value in _cuda(device).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", Profile))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_mode))
        stack.enter_context(mock.patch.object(TorchRunner, "launch", watched_launch))
        stack.enter_context(_references(device) if kernels == "reference" else _triton(device))
        Device.now.append(device)
        stack.callback(Device.now.pop)
        registry._changed()
        stack.callback(registry._changed)
        stack.enter_context(Mode(device))
        yield device


@contextmanager
def _references(device: Device) -> Iterator[None]:
    """Ops that would launch a Triton kernel compute their reference instead, in host memory."""
    picked = registry.Op._picked

    def pick(op: Any, kind: str, dtype: Any, facts: dict[str, Any]) -> Any:
        variant = picked(op, kind, dtype, facts)
        launches_kernel = kind == "cuda" and variant.function.__module__.endswith(".triton")
        return replace(variant, function=_reference(device, op)) if launches_kernel else variant

    with mock.patch.object(registry.Op, "_picked", pick):
        yield


def _reference(device: Device, op: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        there = _all_there(op.name, args, options)
        given, named = host_of(args), host_of(options)
        with _disable_current_modes():
            return device.wrapped(device.performed(lambda: op.reference(*given, **named)), there)

    return call


@contextmanager
def _triton(device: Device) -> Iterator[None]:
    """Triton's kernels on tensors of the device, and launches that are repeated with the numbers of the first one."""
    from labkit_kernels.jit import JITFunction

    interpret = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        _all_there(str(kernel), args, options)
        given, named = host_of(args), host_of(options)
        with _disable_current_modes():
            device.performed(lambda: interpret(kernel, *given, grid=grid, warmup=warmup, **named))

    def launch(kernel: Any, grid: Any, tensors: Any, numbers: Any, **options: Any) -> Any:
        kernel[grid](*tensors, *numbers, **options)

        def again(*given: Any) -> bool:
            for one, other in zip(given, tensors, strict=True):
                assert getattr(one, "dtype", None) == getattr(other, "dtype", None), "other dtypes than at first"
            kernel[grid](*given, *numbers, **options)
            return True

        return None if prepared._paused else again

    prepared.forget()
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(prepared, "launch", launch):
        yield
    prepared.forget()


def _all_there(what: str, *values: Any) -> list[OnDevice]:
    tensors = list(tensors_of(values))
    for tensor in tensors:
        if not isinstance(tensor, OnDevice):
            raise RuntimeError(f"{what}: all tensors should be on cuda:0, one of {tuple(tensor.shape)} is on cpu")
    return tensors
