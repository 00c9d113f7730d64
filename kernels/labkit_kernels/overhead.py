"""Times the host's side of a launch without a GPU: the driver is a stub that launches nothing.

    python -m labkit_kernels overhead

For each op the table has the processor time of one call, all of its Python included: through Triton's binder, and
repeated (see prepared.py). Kernels are compiled for sm_90 as usual. What the driver itself takes is missing: about 2 to
3 us a launch on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import prepared
from .registry import get

TIMES, ROUNDS = 200, 7


class StubDriver:
    """As much of a Triton driver as a launch needs. Notes what is launched, and does not run it."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.keeps = False
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.keeps:
                self.launched.append(args)

        return launch

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, hash(kernel), 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}

    def get_current_target(self) -> Any:
        from .jit import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def use_stub() -> StubDriver:
    """From here on Triton launches on a stub. Only in a process of its own: what was compiled must not meet a GPU."""
    from triton.runtime import driver

    stub = StubDriver()
    driver.set_active(stub)
    return stub


def calls(rows: int = 64) -> dict[str, Callable[[], Any]]:
    """The small ops of a layer of Qwen2.5-0.5B, and its attention, on CPU tensors."""
    bf16, kinds = torch.bfloat16, {"dtype": torch.int32}
    hidden, heads, keys, size, block = 896, 14, 2, 64, 32
    x, weight = torch.zeros(rows, hidden, dtype=bf16), torch.ones(hidden, dtype=bf16)
    gates = torch.zeros(rows, 2 * 4864, dtype=bf16)
    fused = torch.zeros(rows, (heads + 2 * keys) * size, dtype=bf16).unflatten(1, (-1, size))
    q, k, v = fused.split([heads, keys, keys], 1)
    caches = [torch.zeros(64, keys, block, size, dtype=bf16) for _ in range(2)]
    positions = torch.zeros(rows, dtype=torch.int64)
    where = torch.zeros(rows, 16, **kinds), torch.arange(rows + 1, **kinds), torch.ones(rows, **kinds)
    table = torch.zeros(128, size)
    norm, gate, rope, attention, product = (
        get(name).get("triton").function
        for name in ("rms_norm", "silu_mul", "rope_kv", "paged_attention", "linear_invariant")
    )
    options = {"scale": 0.125, "max_seq_len": 512}
    return {
        "rms_norm": lambda: norm(x, weight, 1e-6),
        "rms_norm, with a residual": lambda: norm(x, weight, 1e-6, x),
        "silu_mul": lambda: gate(gates),
        "rope_kv": lambda: rope(q, k, v, table, positions, *caches, positions),
        "paged_attention, decode": lambda: attention(q, *caches, *where, max_query_len=1, **options),
        "paged_attention, prefill": lambda: attention(q, *caches, *where, max_query_len=rows, **options),
        "linear_invariant": lambda: product(x, x),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Processor time of one call: the least of several rounds."""
    call()
    call()
    found = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(TIMES):
            call()
        found.append((time.thread_time() - begin) / TIMES)
    return min(found) * 1e6


def measure() -> dict[str, dict[str, float]]:
    """By call: microseconds through Triton, and repeated."""
    use_stub()
    found = {}
    for name, call in calls().items():
        with prepared.paused():
            slow = microseconds(call)
        found[name] = {"through Triton": slow, "repeated": microseconds(call)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("labkit kernels overhead", description="host time of launches, without a GPU")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    found = measure()
    for name, one in found.items():
        print(f"{name:28} {one['through Triton']:7.1f} us through Triton {one['repeated']:7.1f} us repeated")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
