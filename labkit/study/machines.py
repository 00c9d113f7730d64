"""Machines as a simulation sees them: memory, bandwidth, peak rates, links. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from labkit.core.options import choose, real

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One accelerator, or the cores of a CPU. Rates are peaks, in bytes and flops a second; `measured` says whether
    they were measured or are the manufacturer's.

    >>> Machine.of("H100")
    Machine(H100: 3,350 GB/s, 989 bf16 TFLOP/s, 79 GiB)
    >>> Machine.of("H100", bandwidth=3.05e12, peaks={"bfloat16": 870e12}, measured=True)
    Machine(H100: 3,050 GB/s, 870 bf16 TFLOP/s, 79 GiB, measured)
    """

    name: str
    bandwidth: float  # bytes read from memory a second
    peaks: Mapping[str, float]  # by dtype: flops a second of dense matrix products
    memory: float  # bytes
    link: float = 0.0  # bytes a second to the other accelerators of the node, each way; 0: none
    link_latency: float = 4e-6  # seconds of an exchange over `link` of no bytes
    host_link: float = 0.0  # bytes a second to host memory, each way
    measured: bool = False
    is_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("bandwidth", "memory"):
            real(name, getattr(self, name), least=0.0, open_left=True)
        for name in ("link", "link_latency", "host_link"):
            real(name, getattr(self, name), least=0.0)
        if "bfloat16" not in self.peaks:
            raise ValueError(f"peaks of {self.name!r} must hold 'bfloat16', got {dict(self.peaks)}")
        for dtype, peak in self.peaks.items():
            real(f"peaks[{dtype!r}]", peak, least=0.0, open_left=True)

    def __repr__(self) -> str:
        return (
            f"Machine({self.name}: {self.bandwidth / 1e9:,.0f} GB/s, {self.peaks['bfloat16'] / 1e12:,.4g} bf16 "
            f"TFLOP/s, {self.memory / GIB:,.0f} GiB{', measured' * self.measured})"
        )

    @classmethod
    def of(cls, machine: Any, **changes: Any) -> Machine:
        """A machine by the name of its datasheet, or one of `labkit.bench.limit.measure`, with some fields changed."""
        if isinstance(machine, str):
            machine = choose("machine", machine, MACHINES)
        elif not isinstance(machine, Machine):
            if not hasattr(machine, "bandwidth") or not hasattr(machine, "peak"):
                raise TypeError(f"a machine is a Machine or one of {', '.join(MACHINES)}, got {machine!r}")
            machine = _measured(machine)
        found: Machine = machine
        return replace(found, **changes) if changes else found

    def peak(self, dtype: str) -> float:
        """Flops a second of products with weights of this dtype; formats without units of their own compute in
        bfloat16."""
        return self.peaks.get(dtype, self.peaks["bfloat16"])


def _measured(found: Any) -> Machine:
    """From what `labkit.bench.limit.measure` found: it looks like a datasheet's machine if its name contains one."""
    sheet = next((sheet for name, sheet in MACHINES.items() if name in found.name), None)
    if sheet is None:
        return Machine(
            found.name, found.bandwidth, {"bfloat16": found.peak}, _host_memory(), measured=found.measured, is_cpu=True
        )
    ratio = found.peak / sheet.peaks["bfloat16"]
    peaks = {dtype: peak * ratio for dtype, peak in sheet.peaks.items()}
    return replace(sheet, bandwidth=found.bandwidth, peaks=peaks, measured=found.measured)


def _host_memory() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _rates(bfloat16: float, fp8: float, int8: float) -> dict[str, float]:
    """From TFLOP/s; 0: the machine has no such units."""
    given = {"bfloat16": bfloat16, "fp8": fp8, "int8": int8}
    return {dtype: rate * 1e12 for dtype, rate in given.items() if rate}


# Datasheets, SXM versions: dense rates without sparsity. Memory is what CUDA reports. Links are one way: half of the
# sum of both directions that datasheets give.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("H100", 3.35e12, _rates(989, 1979, 1979), 79.1 * GIB, 450e9, host_link=55e9),
        Machine("H200", 4.8e12, _rates(989, 1979, 1979), 139.8 * GIB, 450e9, host_link=55e9),
        Machine("A100", 2.04e12, _rates(312, 0, 624), 79.1 * GIB, 300e9, host_link=25e9),
        Machine("L4", 0.3e12, _rates(121, 242, 242), 22.0 * GIB, 25e9, 1e-5, 25e9),  # the link is PCIe
        Machine("B200", 8.0e12, _rates(2250, 4500, 4500), 178.3 * GIB, 900e9, host_link=55e9),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """How much of a machine an engine's kernels reach, and what a step costs besides.

    The defaults are labkit's on a GPU, most of them from timings of single kernels on an H100 (2026-11-27,
    docs/measured.md). The gap between kernels (in `product_kernel`, `small_kernel`, `attention_kernel`) was set from a
    measured decode step of 1.70 ms; `small_kernel`, `logits` and `step` were adjusted while looking at the whole runs
    that docs/simulator.md compares with. Shares are of the machine's rates.
    """

    memory: float = 0.91  # a copy: 3.03-3.08 of 3.35 TB/s
    products: float = 0.88  # a large bf16 product: 865-874 of 989 TFLOP/s
    decode_attention: float = 0.95  # of the reachable bandwidth, heads of 128 and more
    narrow_attention: float = 0.68  # the same, smaller heads (64: 65-76%)
    prefill_attention: float = 0.32  # of the peak (32-36% at heads of 128, 25% at 64)
    logits: float = 0.58  # casting and drawing: 1.9 of 3.35 TB/s
    product_kernel: float = 5e-6  # seconds of a product without work, the gap to the next kernel included
    small_kernel: float = 3e-6  # the same for norms, rope, activations
    attention_kernel: float = 5e-6
    kernels_beside: int = 16  # kernels of a step outside of the layers: embedding, head, sampling, indices
    eager_launch: float = 90e-6  # host seconds of a kernel in a step that is not captured in a graph: one with prefills
    step: float = 0.05e-3  # seconds between two steps: scheduler, results, inputs
    link: float = 0.8  # all-reduce, large messages
    join: float = 0.0  # seconds of a request that is given a row

    def __post_init__(self) -> None:
        for name in (
            "memory",
            "products",
            "decode_attention",
            "narrow_attention",
            "prefill_attention",
            "logits",
            "link",
        ):
            real(name, getattr(self, name), least=0.0, most=1.0, open_left=True)
        for name in ("product_kernel", "small_kernel", "attention_kernel", "eager_launch", "step", "join"):
            real(name, getattr(self, name), least=0.0)


# An engine whose mixed steps are captured too, or whose launches are hidden behind the device's work.
CAPTURED = Efficiency(eager_launch=0.0)
# Two CPU cores: products and attention are functions of C++, called one after the other, and nothing is hidden.
CPU = Efficiency(
    memory=0.9, products=0.8, decode_attention=0.5, narrow_attention=0.4, prefill_attention=0.3, product_kernel=8e-6,
    small_kernel=4e-6, attention_kernel=12e-6, eager_launch=0.0, step=0.4e-3,
)  # fmt: skip
