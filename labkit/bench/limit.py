"""The hardware limit of a run: bytes over bandwidth or flops over peak, whichever takes longer.

Both rates are measured in the same run, by the fastest means available. On a GPU the datasheet's rates are reported
beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from labkit_kernels import Integers, Packed, get, native, pages
from labkit_kernels.cache.codes import width

DATASHEET = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}  # bytes/s, bf16 flop/s


@dataclass(frozen=True)
class Machine:
    """The peak rates of a machine."""

    name: str
    bandwidth: float  # bytes read a second
    peak: float  # flops a second of a matrix product, in the model's dtype
    measured: bool = True

    def __repr__(self) -> str:
        return f"Machine({self.name}: {self.bandwidth / 1e9:.1f} GB/s, {self.peak / 1e12:.2f} TFLOP/s)"


@dataclass(frozen=True)
class Cost:
    """What a model must move and compute: its layers' weights, its head, and keys and values per token."""

    layers: int  # weights of all layers that one token is multiplied with
    head: int
    bytes_a_weight: float
    kv_bytes: int  # a token, all layers
    attention: int  # flops a (query, key) pair, all layers
    bytes_in_head: float | None = None  # a weight of the head, if it is stored in another way

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Cost:
        """`kv_dtype`: of keys and values, if it is another one."""
        from labkit.models.shape import Shape

        shape = Shape.of(config)
        hidden, size, heads, keys = shape.hidden_size, shape.head_size, shape.num_heads, shape.num_kv_heads
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        active = shape.routing.per_token or 1
        gated = 2 if config.model_type == "starcoder2" else 3
        layer = hidden * size * (heads + 2 * keys) + heads * size * hidden
        kept = kv_dtype or dtype
        numbers, scored = 2 * keys * width(size, kept), 2 * size
        if (latent := shape.latent) is not None:
            values = heads * latent.value_size
            queries = heads * latent.head_size * (latent.query_rank or hidden) + hidden * (latent.query_rank or 0)
            layer = queries + hidden * latent.key_size + heads * latent.rank * (latent.plain + latent.value_size)
            layer += values * hidden
            numbers, scored = latent.key_size, latent.key_size + latent.rank
        return cls(
            layers=shape.num_layers * (layer + gated * hidden * inner * active),
            head=hidden * config.vocab_size,
            bytes_a_weight=dtype.itemsize,
            kv_bytes=shape.num_layers * numbers * kept.itemsize,
            attention=2 * shape.num_layers * heads * scored,
        )

    def rounded(self, quantization: str) -> Cost:
        """The same model with `Engine(quantization=...)`."""
        from labkit.loading.online import Online

        format = Online.of(quantization)
        return replace(self, bytes_a_weight=format.bits / 8, bytes_in_head=format.head_bits / 8)

    def step(self, machine: Machine, tokens: int, sampled: int, context: int) -> float:
        """The least seconds for a batch with this many tokens; `context` is the number of keys that its rows read."""
        return self._floor(machine, tokens, sampled, context, context)

    def _floor(self, machine: Machine, tokens: int, sampled: int, context: int, pairs: int) -> float:
        """`context` keys are read from memory, and `pairs` of a query and a key are multiplied."""
        moved = self.layers * self.bytes_a_weight + self.kv_bytes * (context + tokens)
        if sampled:
            moved += self.head * (self.bytes_a_weight if self.bytes_in_head is None else self.bytes_in_head)
        computed = 2 * self.layers * tokens + 2 * self.head * sampled + self.attention * pairs
        return max(moved / machine.bandwidth, computed / machine.peak)

    def batches(self, machine: Machine, batches: Iterable[Sequence[float]], block_size: int) -> float:
        """The limit of steps as they ran: (prefill, decode, output tokens, used blocks, seconds) each."""
        return sum(
            self.step(machine, int(prefill + decode), int(out), int(blocks * block_size))
            for prefill, decode, out, blocks, _ in batches
        )

    def ideal(self, machine: Machine, asks: Sequence[Any]) -> float:
        """The limit of the best possible schedule: all prompts in the first step, then all requests decode. It is a sum
        over steps: bytes moved in decode do not overlap with flops of the prompts."""
        prompts = np.array([len(ask.prompt) for ask in asks], np.int64)
        outputs = np.array([ask.num_output for ask in asks], np.int64)
        pairs = int((prompts * (prompts + 1) // 2).sum())
        seconds = self._floor(machine, int(prompts.sum()), len(asks), 0, pairs)
        for made in range(1, int(outputs.max())):
            alive = outputs > made
            rows, context = int(alive.sum()), int((prompts[alive] + made).sum())
            seconds += self._floor(machine, rows, rows, context, context)
        return seconds


def measure(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Takes at most half a minute: a second or two on a CPU."""
    if device != "cpu":
        return _measure_gpu(device, dtype)
    name = f"{torch.get_num_threads()} threads"
    function = get("linear").picked("cpu", dtype)
    if function.name == "reference":
        weight = torch.ones(16384, 4096, dtype=dtype)
        bandwidth = weight.numel() * weight.element_size() / _best(lambda: weight.view(torch.int32).max())
        kind = dtype if native.multiplies_16_bits() else torch.float32  # in which `matmul` computes there
        a, b = torch.ones(512, 4096, dtype=kind), torch.ones(4096, 4096, dtype=kind)
        return Machine(name, bandwidth, 2 * a.numel() * len(b) / _best(lambda: a @ b.T))
    shape = (131072 // 16, 128, 16, 16, 2)  # 1 GB: more than a cache
    wide = Packed(pages.zeros(shape, dtype).fill_(1), 131072, 4096)
    one, many = torch.ones(1, 4096, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    bandwidth = wide.tiles.numel() * dtype.itemsize / _best(lambda: function.function(one, wide))
    square = Packed(pages.zeros((256, 32, 16, 16, 2), dtype).fill_(1), 4096, 1024)
    return Machine(name, bandwidth, 2 * 512 * 1024 * 4096 / _best(lambda: function.function(many, square), 30))


def with_integers(machine: Machine) -> Machine:
    """The machine with the peak of its integer products, where it has any."""
    function = get("integer_linear").picked("cpu", torch.bfloat16)
    if function.name == "reference":
        return machine
    weight = Integers.pack(torch.ones(4096, 1024, dtype=torch.int8), torch.ones(4096, 1), group=1024, bits=8)
    many = torch.ones(512, 1024, dtype=torch.bfloat16)
    peak = 2 * 512 * 1024 * 4096 / _best(lambda: function.function(many, weight), 30)
    return replace(machine, peak=max(machine.peak, peak))


def _measure_gpu(device: str, dtype: torch.dtype) -> Machine:
    source = torch.randn(1 << 29, dtype=torch.float32, device=device)
    a = torch.randn(8192, 8192, dtype=dtype, device=device)  # constants draw less power and would multiply faster

    def synced(run: Any) -> Any:
        def call() -> None:
            run()
            torch.cuda.synchronize(device)

        return call

    bandwidth = source.element_size() * source.numel() / _best(synced(lambda: source.max()), 20)
    return Machine(torch.cuda.get_device_name(device), bandwidth, 2 * 8192**3 / _best(synced(lambda: a @ a), 20))


def datasheet(device: str) -> Machine | None:
    """The manufacturer's figures, where known."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else ""
    found = next((rates for part, rates in DATASHEET.items() if part in name), None)
    return None if found is None else Machine(name, *found, measured=False)


def _best(run: Any, times: int = 8) -> float:
    run()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)
