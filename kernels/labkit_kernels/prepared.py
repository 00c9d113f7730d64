"""Launches that were made before: the compiled kernel, its grid and all its arguments but the tensors' addresses.

Triton binds, specializes and hashes every argument on each launch, and a launcher computes tiles and strides before it:
together 40 to 140 us, while a small kernel takes 2. Whether two launches use the same compiled kernel depends only on
the shapes, strides and dtypes of the tensors and on the other arguments. So a launcher looks up this class of calls
(`Launches.get`), and if it was seen before, the compiled kernel is called with new addresses.

    _launches = Launches()

    def double(x):
        key = (x.get_device(), x.dtype, x.shape)
        out = torch.empty_like(x)
        if (ready := _launches.get(key)) is not None and ready(x, out):
            return out
        _launches.launch(key, _double, (cdiv(x.numel(), 1024),), (x, out), (x.numel(),), BLOCK=1024)
        return out
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

MOST = 4096  # classes of calls that a launcher remembers
ALIGNED = 15  # addresses are multiples of 16, as the compiled kernel assumes

Ready = Callable[..., bool]  # launches with these tensors, or addresses; False if it cannot

_all: list[Launches] = []
_paused = 0


class Launches:
    """What one launcher has launched, by class of calls."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        _all.append(self)

    def __repr__(self) -> str:
        return f"Launches({len(self._found)} classes of calls)"

    def get(self, key: Hashable) -> Any:
        """What was kept for this class of calls, or None. None while launches are watched or tuned."""
        return None if _paused else self._found.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep something for this class of calls, such as several launches and the shapes between them."""
        if not _paused:
            if len(self._found) >= MOST:
                self._found.clear()
            self._found[key] = value

    def launch(
        self, key: Hashable | None, kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...],
        numbers: tuple[Any, ...], **options: Any,
    ) -> None:  # fmt: skip
        """Launch through Triton, and keep it for this class of calls, unless the key is None."""
        ready = launch(kernel, grid, tensors, numbers, **options)
        if ready is not None and key is not None:
            self.keep(key, ready)

    def forget(self) -> None:
        self._found.clear()


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[Any, ...], **options: Any
) -> Ready | None:
    """Launch through Triton: the kernel's first parameters are pointers (`tensors`), then come `numbers`, the rest is
    in `options`. What repeats the launch; None if it must go through Triton again, as it does in the interpreter.
    Tensor descriptors among the tensors come before all else, as the kernel's first parameters."""
    compiled = kernel[grid](*tensors, *numbers, **options)
    if compiled is None or _paused or not hasattr(compiled, "packed_metadata") or getattr(kernel, "pre_run_hooks", ()):
        return None
    described = sum(not isinstance(tensor, Tensor) for tensor in tensors)
    if any(tensor.data_ptr() & ALIGNED for tensor in tensors[described:]):
        return None
    names = list(kernel.arg_names)
    given = dict(zip(names, (*tensors, *numbers), strict=False)) | options
    if any(name not in given for name in names):
        return None  # a default
    tail = tuple(given[name] for name in names[len(tensors) :])
    return _repeated(compiled, (*grid, 1, 1)[:3], described, tail)


def _repeated(compiled: Any, grid: tuple[int, ...], described: int, tail: tuple[Any, ...]) -> Ready:
    from triton.runtime import driver

    active = driver.active
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device, stream_of = active.get_current_device(), active.get_current_stream
    x, y, z = grid
    hooks = _hooks()

    def ready(*tensors: Any) -> bool:
        addresses = [tensor if tensor.__class__ is int else tensor.data_ptr() for tensor in tensors[described:]]
        together = 0
        for address in addresses:
            together |= address
        if together & ALIGNED or hooks:
            return False
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *tensors[:described], *addresses, *tail)
        return True

    return ready


def _hooks() -> list[Any]:
    """The functions that a profiler of Triton's wants to have called at each launch."""
    from triton import knobs

    return getattr(knobs.runtime.launch_enter_hook, "calls", [])


@contextmanager
def paused() -> Iterator[None]:
    """Within the block every launch goes through Triton, and none is kept."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def forget() -> None:
    """Forget all launches, because other tiles were chosen."""
    for launches in _all:
        launches.forget()
