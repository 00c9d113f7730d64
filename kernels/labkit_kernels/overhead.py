"""Times the host's side of a launch without a GPU: the driver is a stub that launches nothing.

    python -m labkit_kernels overhead

For each op the table has the launches of one call, and the processor time of each, all Python of the call included:
through Triton's binder, and repeated (see prepared.py). Nothing is compiled: what stands for a compiled kernel is named
by all that decides how it would be. What the driver itself takes is missing: about 2 to 3 us a launch on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import prepared
from .cache.codes import width
from .lora import Groups, grouped
from .quantized.weights import Grouped, Scaled
from .registry import get

TIMES, ROUNDS = 200, 7


class StubKernel:
    """What stands for a compiled kernel. Launching it notes the arguments, if the driver keeps them."""

    def __init__(self, driver: StubDriver, source: Any, options: dict[str, Any]) -> None:
        given = {name: value for name, value in options.items() if name in ("num_warps", "num_stages", "launch_pdl")}
        parts = (source.fn.__name__, source.signature, source.constants, source.attrs, given)
        self.driver, self.function, self.packed_metadata = driver, " ".join(map(str, parts)), ()

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        if self.driver.keeps:
            self.driver.launched.append(args)


class StubDriver:
    """As much of a Triton driver as a launch needs. Notes what is launched, and does not run it."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.keeps = False

    def compile(self, source: Any, target: Any = None, options: dict[str, Any] | None = None, **_: Any) -> StubKernel:
        return StubKernel(self, source, options or {})

    def get_current_target(self) -> Any:
        from .jit import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def use_stub() -> StubDriver:
    """From here on Triton launches on a stub, and compiles nothing. Only in a process of its own."""
    import triton.compiler
    from triton.runtime import driver

    stub = StubDriver()
    driver.set_active(stub)
    triton.compiler.compile = stub.compile
    return stub


def calls(rows: int = 64) -> dict[str, Callable[[], Any]]:
    """The ops of a layer of Qwen2.5-0.5B and of its quantized forms, and those of a step, on CPU tensors."""
    bf16, kinds = torch.bfloat16, {"dtype": torch.int32}
    hidden, heads, keys, size, block = 896, 14, 2, 64, 64
    x, weight = torch.zeros(rows, hidden, dtype=bf16), torch.ones(hidden, dtype=bf16)
    gates = torch.zeros(rows, 2 * 4864, dtype=bf16)
    fused = torch.zeros(rows, (heads + 2 * keys) * size, dtype=bf16).unflatten(1, (-1, size))
    q, k, v = fused.split([heads, keys, keys], 1)
    caches = [torch.zeros(64, keys, block, size, dtype=bf16) for _ in range(2)]
    coded = [torch.zeros(64, keys, block, width(size, torch.int8), dtype=torch.int8) for _ in range(2)]
    positions = torch.zeros(rows, dtype=torch.int64)
    where = torch.zeros(rows, 16, **kinds), torch.arange(rows + 1, **kinds), torch.ones(rows, **kinds)
    table = torch.zeros(128, size)
    norm, layer, gate, rotary, rope, store, attention, product, draw, mass = (
        _triton(name)
        for name in ("rms_norm", "layer_norm", "silu_mul", "rope", "rope_kv", "store_kv", "paged_attention",
                     "linear_invariant", "sample", "attention_mass")
    )  # fmt: skip
    pages = get("paged_attention").get("pages").function
    options = {"scale": 0.125, "max_seq_len": 512}
    logits, columns = torch.zeros(rows, 1024, dtype=bf16), torch.zeros(3, rows)
    return {
        "rms_norm": lambda: norm(x, weight, 1e-6),
        "rms_norm, with a residual": lambda: norm(x, weight, 1e-6, x),
        "layer_norm": lambda: layer(x, weight, weight, 1e-6),
        "silu_mul": lambda: gate(gates),
        "rope": lambda: rotary(q, k, table, positions),
        "store_kv": lambda: store(k, v, *caches, positions),
        "store_kv, 8 bits": lambda: store(k, v, *coded, positions),
        "rope_kv": lambda: rope(q, k, v, table, positions, *caches, positions),
        "paged_attention, decode": lambda: attention(q, *caches, *where, max_query_len=1, **options),
        "paged_attention, prefill": lambda: attention(q, *caches, *where, max_query_len=rows, **options),
        "paged_attention, 8 bits": lambda: attention(q, *coded, *where, max_query_len=1, **options),
        "paged_attention by pages, decode": lambda: pages(q, *caches, *where, max_query_len=1, **options),
        "paged_attention by pages, prefill": lambda: pages(q, *caches, *where, max_query_len=rows, **options),
        "attention_mass": lambda: mass(q, caches[0], *where, max_query_len=1, **options),
        "linear_invariant": lambda: product(x, x),
        **_quantized(x),
        **_adapted(x),
        "sample": lambda: draw(logits, columns[0], where[2], columns[1], columns[2], positions),
        "step_inputs": _step(rows, table),
    }


def _triton(name: str) -> Callable[..., Any]:
    return get(name).get("triton").function


def _quantized(x: Tensor) -> dict[str, Callable[[], Any]]:
    depth, columns = x.shape[1], 1152
    few, scales = torch.zeros(columns, depth, dtype=torch.uint8), torch.ones(columns, depth // 128, dtype=x.dtype)
    grouped = {
        "int4": Grouped.pack(few, scales, few[:, : depth // 128], kind="int4"),
        "int8": Grouped.pack(few, scales[:, :1], kind="int8"),
        "float8": Grouped.pack(few.view(torch.float8_e4m3fn), scales, kind="float8"),
    }
    scaled = {
        "int8": Scaled.of(few.view(torch.int8), torch.ones(columns)),
        "float8": Scaled.of(few.view(torch.float8_e4m3fn), torch.ones(columns)),
        "blocks": Scaled.of(few.view(torch.float8_e4m3fn), torch.ones(columns // 128, depth // 128)),
    }
    by_group, by_column = _triton("linear_grouped"), _triton("linear_scaled")
    dense = importlib.import_module("labkit_kernels.quantized.triton").dense_columns  # imports Triton
    return {
        **{f"linear_grouped, {kind}": partial(by_group, x, weight) for kind, weight in grouped.items()},
        "dense columns, int4": partial(dense, grouped["int4"], 0, columns, x.dtype),
        **{f"linear_scaled, {kind}": partial(by_column, x, weight) for kind, weight in scaled.items()},
    }


def _adapted(x: Tensor) -> dict[str, Callable[[], Any]]:
    (rows, inputs), slots, rank = x.shape, 4, 16
    tokens, tiles = (torch.from_numpy(part) for part in grouped(np.arange(rows) % slots, slots))
    groups = Groups(tokens, tiles, torch.arange(rows) % slots)
    a, b = (torch.zeros(slots, rank, size, dtype=x.dtype) for size in (inputs, 1152))
    ranks, sums = torch.full((slots,), rank, dtype=torch.int32), torch.zeros(2, len(tokens), rank)
    out, shrink, expand = torch.zeros(rows, 1152, dtype=x.dtype), _triton("lora_shrink"), _triton("lora_expand")
    return {
        "lora_shrink": lambda: shrink(x, a, ranks, 1, groups, 2),
        "lora_expand": lambda: expand(out, sums, b, ranks, (1152,), groups),
    }


def _step(rows: int, table: Tensor) -> Callable[[], Any]:
    start, wide = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    blocks, ends = torch.zeros(rows, 16, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32)
    return partial(_triton("step_inputs"), start, start, start, ends, blocks, wide, start, start, wide, 64)


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


def measure(stub: StubDriver) -> dict[str, dict[str, float]]:
    """By call: its launches, and the microseconds of each, through Triton and repeated."""
    found = {}
    for name, call in calls().items():
        stub.keeps = True
        call()
        num, stub.keeps = len(stub.launched), False
        stub.launched.clear()
        with prepared.paused():
            slow = microseconds(call)
        found[name] = {"launches": num, "through Triton": slow / num, "repeated": microseconds(call) / num}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("labkit kernels overhead", description="host time of launches, without a GPU")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    found = measure(use_stub())
    for name, one in found.items():
        times = f"{one['through Triton']:6.1f} us through Triton {one['repeated']:6.1f} us repeated"
        print(f"{name:34} {one['launches']} x {times}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
