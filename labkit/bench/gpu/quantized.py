"""Times quantized products against bfloat16 on the shapes of Llama-3.1, and an 8B model with random 4-bit weights.

Weights are random and made on the device, so nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from labkit_kernels import get
from labkit_kernels.quantized import Grouped, Scaled, example
from torch import Tensor

from labkit.bench import limit
from labkit.bench.gpu.serving import engine, settled_pass, work_of
from labkit.bench.gpu.timing import copies_needed, graph_seconds, share
from labkit.bench.gpu.where import Where
from labkit.engine.engine import Engine
from labkit.loading.format import Linear
from labkit.loading.gpu import WeightOnlyLinear

SHAPES_8B = {"qkv": (4096, 6144), "gate and up": (4096, 28672), "down": (14336, 4096)}  # (inputs, outputs)
SHAPES_70B = {"qkv": (8192, 10240), "out": (8192, 8192), "gate and up": (8192, 57344), "down": (28672, 8192)}
LAYERS_70B, KV_70B = 80, 2 * 80 * 8 * 128 * 2  # layers; bytes of keys and values a token
TABLES_70B = 2 * 128256 * 8192  # embeddings and head


def _shapes(where: Where, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {"quick": (64, 96)} if where.quick else shapes


def _weight(where: Where, kind: str, inputs: int, outputs: int, group: int, seed: int = 0) -> Any:
    """`Grouped` for a group of 0 (one scale for all inputs) or more, else `Scaled`."""
    generator = torch.Generator(where.device).manual_seed(seed)
    group = 32 if where.quick and group > 0 else group
    return example(kind, 1, inputs, outputs, group, generator, where.dtype)[1]


def _inputs(where: Where, rows: int, size: int) -> Tensor:
    return torch.randn(rows, size, dtype=where.dtype, device=where.device)


def num_bytes(weight: Grouped | Scaled) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weight.tensors())


def _calls(where: Where, op: str, weights: Sequence[Any], rows: int, size: int) -> list[Callable[[], Any]]:
    function = get(op).pick(where.device, where.dtype)
    x = _inputs(where, rows, size)
    return [lambda weight=weight: function(x, weight) for weight in weights]  # type: ignore[misc]


def _bf16(where: Where, rows: int, inputs: int, outputs: int) -> float:
    """Seconds of the library's product."""
    copies = copies_needed(where, where.dtype.itemsize * inputs * outputs)
    weights = [torch.randn(outputs, inputs, dtype=where.dtype, device=where.device) for _ in range(copies)]
    x = _inputs(where, rows, inputs)
    return graph_seconds(where, [lambda weight=weight: F.linear(x, weight) for weight in weights])  # type: ignore[misc]


def weight_only(where: Where) -> dict[str, Any]:
    """Weights of 4 bits (groups of 128) and 8 bits (a scale an output), inputs in 16 bits: the share of the bandwidth
    that reading the weight once takes, and how many times faster than bf16."""
    machine = limit.measure(where.device, where.dtype)
    out: dict[str, Any] = {"bandwidth": machine.bandwidth}
    for name, (inputs, outputs) in _shapes(where, SHAPES_8B).items():
        dense = {rows: _bf16(where, rows, inputs, outputs) for rows in _rows(where, (1, 16, 32, 64, 256, 4096))}
        for kind, group in (("int4", 128), ("int8", 0)):
            first = _weight(where, kind, inputs, outputs, group)
            moved = num_bytes(first)
            copies = copies_needed(where, moved)
            weights = [first, *(_weight(where, kind, inputs, outputs, group, i) for i in range(1, copies))]
            out[f"{name} {kind}: bytes a weight"] = moved / (inputs * outputs)
            for rows, base in dense.items():
                seconds = graph_seconds(where, _calls(where, "linear_grouped", weights, rows, inputs))
                key = f"{name} {kind} {rows} rows"
                out[f"{key}: us"] = seconds * 1e6
                if rows <= 64:
                    out[f"{key}: of bandwidth"] = share(moved / seconds, machine.bandwidth)
                out[f"{key}: times bf16's speed"] = base / seconds
    return out


def _rows(where: Where, rows: Sequence[int]) -> Sequence[int]:
    return rows if not where.quick else rows[:2]


def eight_bits(where: Where) -> dict[str, Any]:
    """int8 and float8 weights and inputs (quantized in the same call): decode and prefill, against bf16."""
    out: dict[str, Any] = {}
    kinds = ["int8", "float8_e4m3fn", "blocks"]
    if where.on_gpu and torch.cuda.get_device_capability(where.device) < (8, 9):
        kinds, out["float8"] = ["int8"], "this GPU has none"
    for name, (inputs, outputs) in _shapes(where, SHAPES_8B).items():
        for rows in _rows(where, (16, 64, 256, 4096)):
            base = _bf16(where, rows, inputs, outputs)
            for kind in kinds:
                weight = _weight(where, kind, inputs, outputs, -1)
                copies = copies_needed(where, num_bytes(weight))
                weights = [weight, *(_weight(where, kind, inputs, outputs, -1, i) for i in range(1, copies))]
                seconds = graph_seconds(where, _calls(where, "linear_scaled", weights, rows, inputs))
                key = f"{name} {kind} {rows} rows"
                out[f"{key}: us"] = seconds * 1e6
                out[f"{key}: times bf16's speed"] = base / seconds
                if rows >= 256:
                    out[f"{key}: TFLOP/s"] = 2 * rows * inputs * outputs / seconds / 1e12
    return out


def large(where: Where) -> dict[str, Any]:
    """Llama-3.1-70B in 4 bits on one card: its memory, and the products of one layer."""
    out: dict[str, Any] = {}
    weights, size, count = {}, 0, 0
    for name, (inputs, outputs) in _shapes(where, SHAPES_70B).items():
        weights[name] = _weight(where, "int4", inputs, outputs, 128)
        size += num_bytes(weights[name])
        count += inputs * outputs
    out["bytes a weight"] = size / count
    out["weights GB"] = (LAYERS_70B * size + 2 * TABLES_70B) / 1e9
    if where.on_gpu:
        room = 0.9 * torch.cuda.get_device_properties(where.device).total_memory - 1e9 * out["weights GB"]
        out["tokens of KV cache that fit"] = max(0, int(room / KV_70B))
    machine = limit.measure(where.device, where.dtype)
    for rows in _rows(where, (1, 16, 64)):
        calls = [call for w in weights.values() for call in _calls(where, "linear_grouped", [w], rows, w.depth)]
        seconds = graph_seconds(where, calls) * len(calls)
        out[f"layer, {rows} rows: us"] = seconds * 1e6
        out[f"layer, {rows} rows: of bandwidth"] = share(size / seconds, machine.bandwidth)
        out[f"{rows} rows: tok/s, were there only products"] = rows / (LAYERS_70B * seconds)
    return out


def quantize(eng: Engine, where: Where, kind: str = "int4", group: int = 128) -> None:
    """Replaces the engine's linear layers by random ones of this kind; before its first step."""

    def other(layer: Linear, seed: int) -> Linear:
        return WeightOnlyLinear(_weight(where, kind, *layer.shape, group, seed))

    for i, layer in enumerate(eng.runner.model.layers):  # type: ignore[attr-defined]
        layer.attention.qkv, layer.attention.out = other(layer.attention.qkv, i), other(layer.attention.out, i)
        layer.mlp.up, layer.mlp.down, layer.mlp.whole = other(layer.mlp.up, i), other(layer.mlp.down, i), None


def serve(where: Where) -> dict[str, Any]:
    """Llama-3.1-8B's shape with 4-bit layers and with bf16: one stream, and 64 requests at once."""
    out: dict[str, Any] = {}
    for label, num, lengths in (("one stream", 1, (128, 256)), ("64 requests", 64, (512, 256))):
        work = work_of(where, "llama-3.1-8b", num, lengths)
        for kind in ("bf16", "int4"):
            eng = engine(where, "llama-3.1-8b", work, len(work.asks))
            if kind == "int4":
                quantize(eng, where)
            seconds = settled_pass(where, eng, work, 0.0).seconds
            out[f"{label} {kind}: output tok/s"] = work.num_output / seconds
            eng.close()
        out[f"{label}: ratio"] = out[f"{label} int4: output tok/s"] / out[f"{label} bf16: output tok/s"]
    return out
