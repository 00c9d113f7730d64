"""An op and its variants: which implementations there are, and which one is picked for a device, dtype and shape."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch

from . import show
from .launches import install

OPS: dict[str, Op] = {}
_generation = 0


def generation() -> int:
    """Grows whenever a pick may change. Code that keeps picked functions compares it once a step."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1


@dataclass(frozen=True)
class Variant:
    """One implementation of an op. `accepts(**facts)` returns why it cannot serve a shape, or None."""

    name: str
    function: Callable[..., Any]
    device: str | None = None  # "cuda", "cpu"; None: any
    dtypes: tuple[torch.dtype, ...] | None = None
    accepts: Callable[..., str | None] | None = None
    picked: bool = True  # False: used only by name, like variants from a notebook cell

    def why_not(self, device: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
        if self.device is not None and self.device != device:
            return f"runs on {self.device}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        return self.accepts(**facts) if self.accepts is not None else None


class Op:
    """A named computation with a plain reference and variants that must agree with it.

    `cases()` yields `check.Case`s. `tolerance(dtype)` says how far a variant may be off, and why; `compare` replaces
    the plain difference where that is not the right measure. `traffic(*args)` and `flops(*args)` count what one call
    must move and compute. `sized(*sizes)` makes a case of another size than those listed, if a few numbers describe it.
    `sources` names the modules that register a device's variants; they are imported when an op is first picked on that
    device.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        cases: Callable[[], Iterator[Any]],
        tolerance: Callable[[torch.dtype], Any],
        traffic: Callable[..., int] | None = None,
        flops: Callable[..., int] | None = None,
        compare: Callable[[Any, Any, Any], float] | None = None,
        sized: Callable[..., Any] | None = None,
        home: str,
        sources: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.name, self.reference, self.cases, self.tolerance = name, reference, cases, tolerance
        self.traffic, self.flops, self.compare, self.sized, self.home = traffic, flops, compare, sized, home
        self.sources = dict(sources or {})
        self.variants: dict[str, Variant] = {"reference": Variant("reference", reference)}
        self.checked: dict[str, Any] = {}  # variant -> the latest report of its check
        self._forced: list[str] = []
        OPS[name] = self

    @property
    def swapped(self) -> bool:
        """Whether one of its variants is in `use`."""
        return bool(self._forced)

    def __repr__(self) -> str:
        forced = f", using {self._forced[-1]}" if self._forced else ""
        return f"Op({self.name}: {', '.join(self.variants)}{forced})"

    def _repr_html_(self) -> str:
        return show.page(self.name, self.about, self._variants_html())

    @property
    def about(self) -> str:
        """The first line of its module's docstring."""
        return (sys.modules[self.home].__doc__ or "").strip().partition("\n")[0] if self.home in sys.modules else ""

    def _variants_html(self) -> str:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.load(kind)
        chosen: dict[str, list[str]] = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            try:
                chosen.setdefault(self._picked(kind, dtype, {}).name, []).append(str(dtype)[6:])
            except ValueError:  # the one in use cannot serve this dtype
                continue
        lines = []
        for one in self.variants.values():
            report = self.checked.get(one.name)
            said = "" if report is None else f"{show.status('ok' if report.ok else 'FAILED')} {escape(report.said())}"
            if one.name == "reference":
                said = '<span class="muted">what the others must agree with</span>'
            dtypes = ", ".join(str(dtype)[6:] for dtype in one.dtypes or ()) or "any"
            here = ", ".join(chosen.get(one.name, ()))
            state = "in use" if self._forced[-1:] == [one.name] else "picked" if here else ""
            here = f"{show.mark(state, show.BLUE)} {here}" if state else ""
            lines.append([f"<b>{escape(one.name)}</b>", one.device or "any", dtypes, here, said])
        for device, modules in self.sources.items():
            lines += [
                [f"<b>{escape(name)}</b>", device, "", "", '<span class="muted">loaded when first asked for</span>']
                for name in modules
                if name not in self.variants
            ]
        return show.table(("variant", "device", "dtypes", f"on this machine ({kind})", "latest check"), lines)

    def variant(
        self,
        name: str,
        *,
        device: str | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        accepts: Callable[..., str | None] | None = None,
        picked: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as a variant. It is used by name; built-in variants pass `picked=True` as
        well."""
        if not isinstance(name, str) or not name or name == "reference":
            raise ValueError(f"a variant's name is a non-empty string other than 'reference', got {name!r}")

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.variants[name] = Variant(name, function, device, dtypes, accepts, picked)
            self.checked.pop(name, None)  # a new function, not the one that was checked
            _changed()
            return function

        return register

    def case(self, *sizes: int) -> Any:
        """A case of these sizes: `rms_norm.case(512, 2048)`."""
        if self.sized is None:
            raise ValueError(f"op {self.name} is not made by sizes: name one of its cases, or pass a Case")
        named = list(inspect.signature(self.sized).parameters)
        if len(sizes) != len(named) or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(
                f"a case of {self.name} is made by {', '.join(named)}, got {sizes}: give that many positive numbers"
            )
        return self.sized(*sizes)

    def load(self, device: str) -> None:
        """Import the modules that register this device's variants."""
        modules = self.sources.get(device, ())
        if "triton" in modules and importlib.util.find_spec("triton") is None:
            del self.sources[device]
            warnings.warn("Triton is not installed: ops on CUDA run in plain torch, which is slower", stacklevel=2)
            return
        if "triton" in modules:
            os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # fused multiply-adds, whatever Triton's default is
        for module in modules:
            importlib.import_module(f"{self.home}.{module}")
        self.sources.pop(device, None)  # only now: if a module fails to import, the op must not silently stay in torch

    def load_all(self) -> None:
        """Import every module that registers a variant and can be imported here."""
        for device, modules in list(self.sources.items()):
            if "triton" not in modules or importlib.util.find_spec("triton") is not None:
                self.load(device)

    def get(self, name: str) -> Variant:
        """A variant by name."""
        for device, modules in list(self.sources.items()):
            if name in modules and name not in self.variants:  # a module's variant goes by the module's name
                self.load(device)
        if name not in self.variants:
            self.load_all()
        if name not in self.variants:
            raise ValueError(f"op {self.name} has no variant {name!r}: it has {', '.join(self.variants)}")
        return self.variants[name]

    def has(self, name: str) -> bool:
        """Whether this machine has such a variant."""
        if name not in self.variants:
            self.load_all()
        return name in self.variants

    def pick(self, device: str | torch.device, dtype: torch.dtype, **facts: Any) -> Callable[..., Any]:
        """The function to call for this device, dtype and shape: the variant in `use`, else the last registered
        built-in that accepts the call, else the reference."""
        return self.picked(device, dtype, **facts).function

    def picked(self, device: str | torch.device, dtype: torch.dtype, **facts: Any) -> Variant:
        device = torch.device(device).type
        self.load(device)
        return _watched(self.name, self._picked(device, dtype, facts))

    def _picked(self, device: str, dtype: torch.dtype, facts: dict[str, Any]) -> Variant:
        if self._forced:
            forced = self.variants[self._forced[-1]]
            if (reason := forced.why_not(device, dtype, facts)) is not None:
                raise ValueError(f"variant {forced.name!r} of {self.name} cannot serve this: {reason}")
            return forced
        for variant in reversed(self.variants.values()):
            if variant.picked and variant.why_not(device, dtype, facts) is None:
                return variant
        raise AssertionError("the reference serves everything")

    @contextmanager
    def use(self, name: str) -> Iterator[Variant]:
        """Within the block, every pick gives this variant, also in running engines."""
        variant = self.get(name)
        install()
        self._forced.append(name)
        _changed()
        try:
            yield variant
        finally:
            self._forced.remove(name)
            _changed()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Pick and call in one. For notebooks; hot paths pick once and keep the function."""
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        return self.pick(first.device, first.dtype)(*args, **options)


_watchers: list[Callable[[str, str, Callable[[], Any]], Any]] = []


@contextmanager
def watched(watcher: Callable[[str, str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Within the block, every call of a picked function goes through `watcher(op, variant, call)`, which must run
    `call()`."""
    _watchers.append(watcher)
    _changed()
    try:
        yield
    finally:
        _watchers.remove(watcher)
        _changed()


def _watched(op: str, variant: Variant) -> Variant:
    for watcher in _watchers:
        variant = replace(variant, function=_through(watcher, op, variant.name, variant.function))
    return variant


def _through(watcher: Callable[..., Any], op: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: watcher(op, name, lambda: function(*args, **options))


def is_plain() -> bool:
    """Whether all that is picked is this package's own code, and nobody watches it."""
    own = __name__.partition(".")[0]
    variants = [variant for op in OPS.values() for variant in op.variants.values() if variant.picked]
    swapped = any(op.swapped for op in OPS.values())
    return not (_watchers or swapped) and all(one.function.__module__.partition(".")[0] == own for one in variants)


def get(name: str) -> Op:
    """An op by name."""
    if name not in OPS:
        raise ValueError(f"there is no op {name!r}: there are {', '.join(sorted(OPS))}")
    return OPS[name]
