"""Times attention alone, in a captured graph and eagerly, and torch's own attention on the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from labkit_kernels import paged_attention

from labkit.bench import limit
from labkit.bench.gpu.timing import copies_needed, eager_seconds, graph_seconds, launch_seconds, share
from labkit.bench.gpu.where import HEADS, Where


def paged(
    where: Where, heads: tuple[int, int, int], batch: int, context: int, queries: int, block: int, variant: str = ""
) -> Callable[[], Any]:
    """One call of labkit's paged attention over `batch` sequences of `context` tokens, with `queries` queries each; by
    the kernel that is chosen on this device, or by a variant."""
    num_heads, keys, size = heads
    blocks = batch * -(-context // block)
    like: dict[str, Any] = {"dtype": where.dtype, "device": where.device}
    caches = [torch.randn(blocks + 1, keys, block, size, **like) for _ in range(2)]
    q = torch.randn(batch * queries, num_heads, size, **like)
    table = (torch.randperm(blocks, device=where.device) + 1).view(batch, -1).int()
    start = torch.arange(batch + 1, device=where.device, dtype=torch.int32) * queries
    length = torch.full((batch,), context, device=where.device, dtype=torch.int32)
    function = paged_attention.pick(where.device, where.dtype)
    if variant and where.on_gpu:
        function = paged_attention.get(variant).function
    options = {"scale": size**-0.5, "max_query_len": queries, "max_seq_len": context}
    return lambda: function(q, *caches, table, start, length, **options)


def decode(where: Where) -> dict[str, Any]:
    """Decode attention as a share of the memory bandwidth that bounds it; keys and values are read once."""
    machine = limit.measure(where.device, where.dtype)
    out: dict[str, Any] = {"bandwidth": machine.bandwidth}
    shapes = {"256x1024": (256, 1024), "16x8192": (16, 8192)} if not where.quick else {"2x64": (2, 64)}
    for name, heads in HEADS.items():
        for label, (batch, context) in shapes.items():
            for block, variant in ((32, ""), (64, ""), (64, "pages")) if not where.quick else ((8, ""),):
                moved = 2 * batch * context * heads[1] * heads[2] * where.dtype.itemsize
                sizes = (heads, batch, context, 1, block, variant)
                calls = [paged(where, *sizes) for _ in range(copies_needed(where, moved))]
                seconds = graph_seconds(where, calls)
                key = " ".join(filter(None, (name, label, variant, f"blocks of {block}")))
                out[f"{key}: us"] = seconds * 1e6
                out[f"{key}: of bandwidth"] = share(moved / seconds, machine.bandwidth)
            out[f"{name} {label} eager us"] = eager_seconds(where, calls[0]) * 1e6
        out[f"{name} launch us"] = launch_seconds(where, calls[0]) * 1e6
    return out


def prefill(where: Where) -> dict[str, Any]:
    """Prefill attention of 8k tokens as a share of the GEMM peak, with torch's flash and cuDNN backends for
    comparison."""
    machine = limit.measure(where.device, where.dtype)
    length = 8192 if not where.quick else 64
    out: dict[str, Any] = {"peak": machine.peak}
    for name, heads in HEADS.items():
        num_heads, keys, size = heads
        flops = 4 * num_heads * size * length * (length + 1) // 2
        others = [(block, variant) for block in (64, 128) for variant in ("pages", "cudnn")]
        for block, variant in ((32, ""), (64, ""), *others) if not where.quick else ((8, ""),):
            call = paged(where, heads, 1, length, length, block, variant)
            key = " ".join(filter(None, (name, variant, f"blocks of {block}")))
            try:
                seconds = graph_seconds(where, [call], times=3)
            except Exception as error:  # a variant that this machine lacks, or that fails, is a line of the report
                if not variant:
                    raise
                out[key] = str(error).splitlines()[0][:100]
                continue
            out[f"{key}: TFLOP/s"] = flops / seconds / 1e12
            out[f"{key}: of peak"] = share(flops / seconds, machine.peak)
        out[f"{name} eager us"] = eager_seconds(where, call, 9) * 1e6
        like: dict[str, Any] = {"dtype": where.dtype, "device": where.device}
        q, k, v = (torch.randn(1, n, length, size, **like) for n in (num_heads, keys, keys))
        for backend in ("flash", "cudnn"):
            out[f"{name} torch SDPA {backend}: TFLOP/s"] = _sdpa(where, backend, q, k, v, flops)
    return out


def _sdpa(where: Where, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flops: int) -> float | str:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kind = kinds[backend] if where.on_gpu else SDPBackend.MATH
    try:
        with sdpa_kernel(kind):
            call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
            return flops / graph_seconds(where, [call], times=3) / 1e12
    except RuntimeError as error:
        return str(error).splitlines()[0][:100]
