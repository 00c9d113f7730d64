"""The rehearsal's device: its tensors, and what an operation on them does. Knows torch, and nothing of labkit.

A tensor is a wrapper around one in host memory, so results are computed. Mixed devices are errors; a copy to the host
arrives when an event behind it is waited for; empty memory holds nan; a graph is the list of its operations.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WAITS = {  # the host needs something of their result to go on
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "allclose", "bincount", "repeat_interleave", "argwhere", "histc", "isin",
}  # fmt: skip
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
CHANGES_SHAPE = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "resize_as_"}
PUTS = {"index_put", "index_put_", "_index_put_impl_"}


class Storage:
    """Memory of the device. A copy in host memory is a copy, which torch's own would not be."""

    def __init__(self, host: torch.UntypedStorage) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def cpu(self) -> torch.UntypedStorage:
        return self.host.clone()


class OnDevice(Tensor):
    """A tensor of the device; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        shape = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        with torch.inference_mode(host.is_inference()):
            made = Tensor._make_wrapper_subclass(cls, host.size(), **shape, device=CUDA)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.now[-1].op(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return Storage(self.host.untyped_storage())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        memo[id(self)] = made = OnDevice(self.host.clone())
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.host!r})"


class Mode(TorchDispatchMode):
    """Gives the device every operation of a thread, also those that make tensors."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=) then copies where this sees it
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.op(func, args, kwargs or {})


class Graph:
    """What was done in `with torch.cuda.graph(...)`; a replay does it again on the same memory."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        with _disable_current_modes():
            for call in self.calls:
                call()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


Copy = tuple[int, Tensor, Tensor]  # its number; the pinned memory; the values


class Device:
    """What is on its way, what is captured, and where the host waited."""

    now: ClassVar[list[Device]] = []

    def __init__(self) -> None:
        self.waits: dict[str, int] = {}  # "what at file:line function" -> how often, while a step was launched
        self.in_launch = threading.local()
        self.capturing: Graph | None = None
        self.issued = 0  # copies to the host so far
        self._coming: list[Copy] = []
        self._sent: list[Copy] = []  # copies to the device that may still read pinned memory
        self._pinned: dict[int, Tensor] = {}

    # -- what is on its way --------------------------------------------------------------------------------------

    def deliver(self, upto: int | None = None) -> None:
        """The device has got so far."""
        upto = self.issued if upto is None else upto
        done, self._coming = _parted(self._coming, lambda copy: copy[0] <= upto)
        read, self._sent = _parted(self._sent, lambda copy: copy[0] <= upto)
        with torch.inference_mode(), _disable_current_modes():
            for _, target, values in done:
                target.copy_(values)
            for _, source, values in read:
                if not torch.equal(_bytes(source), _bytes(values)):
                    raise AssertionError("pinned memory was written while a copy to the device could still read it")

    def waited(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")
        self.deliver()
        if getattr(self.in_launch, "depth", 0):
            key = f"{what} at {_place()}"
            self.waits[key] = self.waits.get(key, 0) + 1

    def _in_order(self, host: Tensor) -> None:
        """The device itself reads and writes pinned memory in the order of its copies."""
        at = host.untyped_storage().data_ptr()
        mine, self._coming = _parted(self._coming, lambda copy: copy[1].untyped_storage().data_ptr() == at)
        _, self._sent = _parted(self._sent, lambda copy: copy[1].untyped_storage().data_ptr() == at)
        for _, target, values in mine:
            target.copy_(values)

    def pin(self, tensor: Tensor) -> Tensor:
        if self.capturing is not None:
            raise RuntimeError("pinned memory is allocated while a graph is captured")
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, host: Tensor) -> bool:
        return not host.numel() or host.untyped_storage().data_ptr() in self._pinned

    # -- operations ------------------------------------------------------------------------------------------------

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.partition("::")[2]
        there = [tensor for tensor in tensors_of((args, kwargs)) if isinstance(tensor, OnDevice)]
        wanted = kwargs.get("device", next((arg for arg in args if isinstance(arg, torch.device)), None))
        if name == "_to_copy" and wanted is not None and wanted.type == "meta":  # what the guard makes of "cuda"
            wanted = kwargs["device"] = CUDA
        to_device = wanted is not None and wanted.type == "cuda"
        if not there and not to_device:
            return self._on_host(func, name, args, kwargs)
        if name == "to":
            return self._to(func, args, kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copy(name, args, kwargs)
        if name in CHANGES_SHAPE:
            raise NotImplementedError(f"{name} of a tensor of the rehearsal's device")
        self._check(func, name, args, kwargs)
        kwargs = host_of(kwargs | ({"device": CPU} if to_device else {}))
        kwargs.pop("pin_memory", None)
        args = host_of(args)
        if name in EMPTY:
            return self.wrapped(_garbage(func(*args, **kwargs)), there)
        return self.wrapped(self.performed(lambda: func(*args, **kwargs)), there)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("pin_memory", "_pin_memory"):
            return self.pin(args[0].clone())
        pinned = kwargs.pop("pin_memory", False) if "pin_memory" in kwargs else False
        made = func(*args, **kwargs)
        return self.pin(made) if pinned else made

    def _check(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Refuse mixed devices, and note what the host waits for."""
        indices = args[1] if name == "index" or name in PUTS else ()
        for tensor in tensors_of((args, kwargs)):
            is_number = tensor.dim() == 0 and (torch.Tag.pointwise in func.tags or name in {*PUTS, "fill_", "where"})
            if not (isinstance(tensor, OnDevice) or is_number or any(tensor is index for index in indices)):
                raise RuntimeError(f"{name}: all tensors should be on cuda:0, one of {tuple(tensor.shape)} is on cpu")
        if name in WAITS and kwargs.get("output_size") is None:
            self.waited(name)
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.waited("an index that is a mask")
            elif index is not None and not isinstance(index, OnDevice):
                self.waited("an index in host memory")

    def performed(self, call: Callable[[], Any]) -> Any:
        """What the call gives. A captured graph repeats it, into the same memory."""
        found = call()
        if self.capturing is not None:
            self.capturing.calls.append(lambda: _put_into(found, call()))
        return found

    def wrapped(self, found: Any, there: list[OnDevice]) -> Any:
        if isinstance(found, Tensor):
            same = next((tensor for tensor in there if tensor.host is found), None)
            return OnDevice(found) if same is None else same
        if isinstance(found, list | tuple):
            made = [self.wrapped(one, there) for one in found]
            return type(found)(*made) if hasattr(found, "_fields") else type(found)(made)
        return found

    # -- copies ----------------------------------------------------------------------------------------------------

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        like, source = given.get("other", args[0]), args[0]
        device, dtype = given.get("device") or like.device, given.get("dtype") or like.dtype
        if (device.type, dtype) == (source.device.type, source.dtype) and not given.get("copy"):
            return source
        return self._copy("_to_copy", args[:1], {"dtype": dtype, "device": device} | _only(given, "non_blocking"))

    def _copy(self, name: str, args: Any, kwargs: Any) -> Any:
        if name == "copy_":
            target, source, quick = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            fresh = False
        else:
            source, quick, fresh = args[0], kwargs.get("non_blocking", False), True
            host = torch.empty_like(host_of(source), **_only(kwargs, "dtype", "memory_format"))
            device = kwargs.get("device") or source.device
            target = OnDevice(host) if torch.device(device).type == "cuda" else host
        out, given = host_of(target), host_of(source)
        if isinstance(source, OnDevice) and isinstance(target, OnDevice):
            self.performed(lambda: out.copy_(given))
        elif self.capturing is not None:
            raise RuntimeError("a copy between host and device would be captured with its address")
        elif isinstance(target, OnDevice):
            is_pinned = self._is_pinned(given)
            if not (is_pinned and quick):
                self.waited("a copy from pinned memory that waits" if is_pinned else "a copy from pageable memory")
            self._in_order(given)
            out.copy_(given)
            if is_pinned and quick:
                self._sent.append((self.issued, given, given.clone()))
        else:
            if quick and fresh:
                self.pin(out)
            if quick and self._is_pinned(out):
                self._in_order(out)
                self.issued += 1
                self._coming.append((self.issued, out, given.to(out.dtype, copy=True)))
                _garbage(out)
            else:
                self.waited("a copy to the host")
                out.copy_(given)
        return target


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_of([getattr(value, field.name) for field in fields(value)])


def host_of(value: Any) -> Any:
    """The same with tensors in host memory."""
    if isinstance(value, OnDevice):
        return value.host
    if isinstance(value, dict):
        return {key: host_of(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        made = [host_of(one) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: host_of(getattr(value, field.name)) for field in fields(value)})
    return value


def _parted(copies: list[Copy], wanted: Callable[[Copy], bool]) -> tuple[list[Copy], list[Copy]]:
    return [copy for copy in copies if wanted(copy)], [copy for copy in copies if not wanted(copy)]


def _only(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names if given.get(name) is not None}


def _indices(index: Any) -> Any:
    """Lists become tensors of the device, as torch makes of them."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index, device=CUDA) if isinstance(index, list) else index


def _garbage(tensor: Tensor) -> Tensor:
    """As memory that nothing was written to yet."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return tensor.fill_(float("nan"))
    if tensor.dtype.is_floating_point:
        tensor.view(torch.uint8).fill_(91)
        return tensor
    return tensor.fill_(True if tensor.dtype == torch.bool else 91)


def _put_into(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        if old.data_ptr() != new.data_ptr():  # else a view, or changed in place
            old.copy_(new)
    elif isinstance(old, list | tuple):
        for one, other in zip(old, new, strict=True):
            _put_into(one, other)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def _place() -> str:
    """Where labkit's code is."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/labkit/" in path or "/labkit_kernels/" in path:
            return f"{path[path.rindex('/labkit') + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
