"""The kernel lab: check, time, compile and try an op's variants from a notebook."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from labkit_kernels import OPS, Op, Report, bench, check, get
from labkit_kernels.bench import Report as Times
from labkit_kernels.check import Case
from labkit_kernels.compile import Report as Compiled
from labkit_kernels.compile import compile_config, compile_variant, configs
from labkit_kernels.config import ARCHS
from labkit_kernels.launches import install
from labkit_kernels.machine import Machine

from labkit.lab.roofline import Limits, Roofline, roofline
from labkit.lab.trial import Trial, try_variant

if TYPE_CHECKING:
    from labkit.engine.engine import Engine
    from labkit.lab.panel import Panel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KernelLab:
    """What `labkit.kernel_lab(op)` gives: methods that return reports, the latest of which it shows.

    >>> import labkit as lk
    >>> from labkit_kernels import silu_mul
    >>> @silu_mul.variant("mine")
    ... def mine(x):
    ...     gate, up = x.chunk(2, dim=-1)
    ...     return (gate.float() * gate.float().sigmoid() * up.float()).to(x.dtype)
    >>> lk.kernel_lab("silu_mul").check("mine")
    Report(silu_mul: 21 ok)
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.machine = Machine(self.device)
        self.latest: dict[str, Any] = {}  # "check", "bench", "compile", "roofline", "trial" -> its latest result
        self._panel: Panel | None = None
        install()

    def __repr__(self) -> str:
        return f"KernelLab({self.op.name}: {', '.join(self.op.variants)}; on {self.device})"

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in (self.op, *self.latest.values()))

    @property
    def shapes(self) -> list[str]:
        """Names of the cases that `bench` times."""
        cases = list(self.op.cases())
        return [case.name for case in cases if case.timed] or [case.name for case in cases]

    @property
    def variants(self) -> list[str]:
        """The variants that this machine can run."""
        self.op.load(self.device)
        return [one.name for one in self.op.variants.values() if one.device in (None, self.device)]

    def check(self, variant: str | None = None, *, dtypes: Sequence[Any] | None = None) -> Report:
        """Compare a variant (None: all) with the reference on every case, in Triton's interpreter if it needs a GPU."""
        return self._keep("check", check(self.op, variant, dtypes=dtypes_of(dtypes)))

    def bench(
        self,
        shapes: Any = None,
        dtypes: Sequence[Any] | None = None,
        variants: Sequence[str] | None = None,
    ) -> Times:
        """Time variants (None: all that run here) that pass their check, and compare them with this machine's limit.

        `shapes` are names of cases (None: `lab.shapes`), sizes such as (512, 2048), or your own `labkit_kernels.Case`s;
        one, or a list.
        """
        names = [variants] if isinstance(variants, str) else variants
        alone = isinstance(shapes, (str, Case)) or (isinstance(shapes, tuple) and isinstance(shapes[0], int))
        chosen = [shapes] if alone else shapes
        found = bench(self.op, names, chosen, self.device, dtypes_of(dtypes), self.machine)
        self.latest.pop("roofline", None)  # it shows an earlier bench
        return self._keep("bench", found)

    def compile(self, variant: str | None = None, archs: Sequence[int | str] = ARCHS) -> Compiled:
        """Registers, shared memory and spills, also for GPUs that this machine does not have.

        None: the launches that the built-in variant lists. A variant's name: what it launches on the timed cases.
        """
        targets = [arch_of(arch) for arch in archs]
        if variant is not None and variant != "triton":
            return self._keep("compile", compile_variant(self.op, variant, targets))
        listed = configs(self.op)
        if not listed:
            raise ValueError(f"{self.op.name} has no built-in Triton kernel to compile: name a variant of your own")
        rows = [compile_config(self.op.name, one, arch) for one in listed for arch in targets if arch in one.archs]
        return self._keep("compile", Compiled(tuple(rows)))

    def limits(self, dtypes: Sequence[Any] | None = None) -> Limits:
        """This machine's bandwidth and flop/s, measured once."""
        machine, wanted = self.machine, dtypes_of(dtypes) or [torch.bfloat16]
        places = ["memory", "cache"] if machine.cache_bytes else ["memory"]
        copying = {place: machine.bytes_per_second(place) for place in places}
        return Limits(self.device, copying, {str(d)[6:]: machine.flops_per_second(d) for d in wanted})

    def roofline(
        self,
        shapes: Any = None,
        dtypes: Sequence[Any] | None = None,
        variants: Sequence[str] | None = None,
    ) -> Roofline:
        """The latest bench under the machine's limits. With arguments, or if there was no bench, the bench runs
        first."""
        report = self.latest.get("bench")
        if report is None or shapes is not None or dtypes is not None or variants is not None:
            report = self.bench(shapes, dtypes, variants)
        measured = dict.fromkeys(row.dtype for row in report if row.status == "ok")
        return self._keep("roofline", roofline(self.op.name, report, self.limits(list(measured) or None)))

    def try_in(self, engine: Engine, variant: str, prompts: Any, *, max_tokens: int = 32) -> Trial:
        """The tokens that a variant changes in an engine; see `labkit.try_variant`."""
        return self._keep("trial", try_variant(engine, self.op, variant, prompts, max_tokens=max_tokens))

    def of(self, name: str) -> KernelLab:
        """The lab of another op on the same machine, in the same panel."""
        other = KernelLab(get(name))
        other.machine, other._panel = self.machine, self._panel
        return other

    def panel(self) -> Panel:
        """The same as widgets: choose shapes, dtypes and variants, and run. One panel per lab."""
        from labkit.lab.panel import Panel

        if self._panel is None:
            self._panel = Panel(self)
        return self._panel

    def _keep(self, name: str, found: Any) -> Any:
        self.latest[name] = found
        return found


def kernel_lab(op: Op | str) -> KernelLab:
    """The lab for one op. Triton kernels can be checked and run without a GPU, too."""
    if isinstance(op, str) and op not in OPS:
        near = difflib.get_close_matches(op, OPS, 1)
        raise ValueError(
            f"there is no op {op!r}{f', did you mean {near[0]!r}' if near else ''}: {', '.join(sorted(OPS))}"
        )
    if not isinstance(op, (str, Op)):
        raise TypeError(f"kernel_lab takes an op or its name, got {op!r}")
    return KernelLab(get(op) if isinstance(op, str) else op)


def dtypes_of(given: Any) -> list[torch.dtype] | None:
    """dtypes from names or torch dtypes: one, or a list."""
    if given is None:
        return None
    found = []
    for one in [given] if isinstance(given, (str, torch.dtype)) else given:
        if not isinstance(one, torch.dtype) and one not in DTYPES:
            raise ValueError(f"dtype {one!r} is not known: {', '.join(DTYPES)}")
        found.append(one if isinstance(one, torch.dtype) else DTYPES[one])
    return found


def arch_of(given: int | str) -> int:
    """90, from 90, "90" or "sm_90"."""
    digits = str(given).removeprefix("sm_")
    if not digits.isdecimal() or int(digits) not in ARCHS:
        known = ", ".join(f"sm_{arch}" for arch in ARCHS)
        raise ValueError(f"architecture {given!r} is not known: {known}")
    return int(digits)
