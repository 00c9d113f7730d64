"""Routes Triton launches: on CPU tensors they run in Triton's interpreter, and launches can be recorded without
running.

TRITON_INTERPRET applies to a whole process and is read when a kernel is defined. Here the tensors of each launch
decide: a launch on CPU tensors would be an error, so it is interpreted instead. A kernel written in a notebook cell can
therefore be checked, and run inside an engine, on a machine without a GPU. The same object can be compiled for a GPU,
and the cell needs no change on a machine that has one.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import Config
from .prepared import paused

LAUNCHES = 64  # most launches recorded per call: stops a launcher that loops until it sees a result


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and the requested warps and stages."""

    kernel: Any  # a triton.jit function
    arguments: dict[str, Any]
    options: dict[str, Any]

    def config(self) -> Config:
        """What the compiler is asked for. Integers equal to 1 are constants, as in Triton."""
        from .jit import mangle_type

        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            special = whole and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                constants[name] = value
                continue
            signature[name] = mangle_type(value)
            if special and value % 16 == 0:
                aligned.append(name)
        kept = {name: self.options[name] for name in ("num_warps", "num_stages") if name in self.options}
        return Config(self.kernel, signature, constants | kept, aligned=tuple(aligned))


language = threading.RLock()  # triton.language is one for all threads: interpreting changes it, compiling reads it
_inside = threading.local()
_interpreted = 0  # launches so far
_installed = False


def interpreted() -> int:
    """How many launches were interpreted so far: it grows when a call launches a Triton kernel on CPU tensors."""
    return _interpreted


def install() -> None:
    """From here on, launches on CPU tensors are interpreted. Does nothing if there is a GPU, if Triton was not imported
    (then no kernel was defined), or if TRITON_INTERPRET is set."""
    global _installed
    if _installed or "triton" not in sys.modules or torch.cuda.is_available():
        return
    from .jit import Autotuner, JITFunction

    mend_interpreter()
    _installed = True
    launch, call, tune = JITFunction.run, JITFunction.__call__, Autotuner.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup or not _on_cpu(args, options):
            return launch(self, *args, grid=grid, warmup=warmup, **options)
        return _interpret(self, args, grid, options)

    def called(self: Any, *args: Any, **options: Any) -> Any:  # tl.sum and others are functions of this kind
        return _inner(self)(*args, **options) if getattr(_inside, "depth", 0) else call(self, *args, **options)

    def run_first(self: Any, *args: Any, **options: Any) -> Any:
        return _first_choice(self, args, options) if _on_cpu(args, options) else tune(self, *args, **options)

    JITFunction.run, JITFunction.__call__, Autotuner.run = run, called, run_first


def _on_cpu(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
    return bool(tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def _interpret(kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
    global _interpreted
    with language, _unchanged_language(), np.errstate(all="ignore"):  # a GPU does not report overflows either
        _interpreted += 1
        _inside.depth = getattr(_inside, "depth", 0) + 1
        try:
            _inner(kernel)[grid](*args, **options)
        finally:
            _inside.depth -= 1


@contextmanager
def _unchanged_language() -> Iterator[None]:
    """Restores triton.language afterwards: the interpreter leaves patches behind, and nothing could be compiled any
    more."""
    import triton.language as tl

    places = (tl, tl.core, tl.math, tl.tensor, tl.dtype, *filter(None, [getattr(tl, "condition", None)]))
    kept = [(place, dict(vars(place))) for place in (*places, getattr(tl.core, "tensor_descriptor_base", tl.core))]
    try:
        yield
    finally:
        for place, before in kept:
            for name in [name for name, value in vars(place).items() if before.get(name, place) is not value]:
                if name in before:
                    setattr(place, name, before[name])
                elif isinstance(place, type):  # to modules it adds names that its rewritten functions need
                    delattr(place, name)


def _inner(kernel: Any) -> Any:
    """The same function for the interpreter, created once."""
    from .jit import InterpretedFunction

    if "_labkit_interpreted" not in vars(kernel):
        kernel._labkit_interpreted = InterpretedFunction(kernel.fn)
    return kernel._labkit_interpreted


def _first_choice(tuner: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """An autotuned kernel with its first configuration: the interpreter has no timings to choose by."""
    config = tuner.configs[0]
    chosen = options | config.all_kwargs()
    if config.pre_hook is not None:
        config.pre_hook({**dict(zip(tuner.arg_names, args, strict=False)), **chosen})
    return tuner.fn.run(*args, **chosen)


def mend_interpreter() -> None:
    """Works around bugs of Triton's interpreter: it adds and multiplies the bit patterns of bfloat16 values and has no
    constants of them, truncates where a GPU rounds, rounds to float8 wrongly, and before 3.9 it loops over arrays of
    one element, which numpy 2.4 no longer accepts as numbers."""
    import triton
    import triton.language as tl

    from .jit import interpreter

    if hasattr(interpreter, "_labkit_mended"):
        return
    interpreter._labkit_mended = True
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    binary, convert = interpreter.InterpreterBuilder.binary_op, interpreter.InterpreterBuilder.create_fp_to_fp
    cast = interpreter.InterpreterBuilder.cast_impl

    def narrowed(values: Any) -> Any:
        found = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(found.reshape(values.shape), tl.bfloat16)

    def in_float32(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        return narrowed(op(widened(left).data, widened(right).data))

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        return narrowed(source.data)

    def to_float8(self: Any, source: Any, kind: Any, mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.float8e4nv:
            return convert(self, source, kind, mode)
        found = torch.from_numpy(np.ascontiguousarray(source.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(found.view(torch.uint8).numpy().reshape(source.data.shape), tl.float8e4nv)

    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: narrowed(np.array([value], np.float32))
    interpreter.InterpreterBuilder.binary_op = in_float32
    interpreter.InterpreterBuilder.cast_impl = rounded
    interpreter.InterpreterBuilder.create_fp_to_fp = to_float8
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block this thread's Triton kernels do not run: their launches are recorded, and outputs stay
    unwritten. Launches of other threads run as usual."""
    from .jit import Autotuner, JITFunction

    found: list[Launch] = []
    here = threading.get_ident()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != here:
            return run(self, *args, grid=grid, warmup=warmup, **options)
        if len(found) == LAUNCHES:
            raise RuntimeError(
                f"stopped after {LAUNCHES} recorded launches, which do not run: the launcher waits for a result"
            )
        given = {name: value for name, value in options.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **given)
        bound.apply_defaults()
        found.append(Launch(self, dict(bound.arguments), {k: v for k, v in options.items() if k not in given}))
        return None

    def first(self: Any, *args: Any, **options: Any) -> Any:
        return _first_choice(self, args, options) if threading.get_ident() == here else tune(self, *args, **options)

    with language:
        run, tune = JITFunction.run, Autotuner.run
        JITFunction.run, Autotuner.run = note, first
        try:
            with paused():
                yield found
        finally:
            JITFunction.run, Autotuner.run = run, tune


def launched(function: Callable[..., Any], *args: Any, **options: Any) -> list[Launch]:
    """What one call launches, on tensors of any device, without computing anything. Empty for a function without
    Triton."""
    if "triton" not in sys.modules:
        return []
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile in this process: start Python without it")
    with recorded() as found:
        function(*args, **options)
    return found
