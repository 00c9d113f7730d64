"""The seconds of a step from a model's sizes and a machine's rates: bytes over bandwidth, flops over peak, kernels,
communication. `Efficiency` states every factor, and which of them were adjusted to measured runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from labkit.core.options import real, whole
from labkit.core.stages import BESIDE, Load, stages_of
from labkit.runner.cost import StepWork
from labkit.study.machines import CPU, Efficiency, Machine
from labkit.study.shapes import BYTES, ModelShape

SMALL = 4  # kernels of a layer: two norms, rope and store, activation
KERNELS = 4 + SMALL + 1  # with the products qkv, output, gate and up, down; and attention
MOST_SEEN = 4096  # sizes of steps whose time is remembered
LOGIT_BYTES = 10  # a logit: written in 16 bits, read, written in 32, read by the sampler


class Fixed(NamedTuple):
    """Seconds that do not depend on the context: of a layer, of the head, and of everything else."""

    layer: Any
    head: Any
    beside: Any


@dataclass(frozen=True)
class AnalyticCost:
    """Seconds of a step of `model` on `machine`, for a `SimRunner`.

    A kernel takes a fixed time and sqrt(memory time ** 2 + compute time ** 2), a smooth maximum of both. With `tp`,
    each of that many machines holds a share of every layer, and adds its results to the others' twice a layer. With
    `pp`, each holds some of the layers, dealt as the engine deals them or as `layers` says; a step's rows go round in
    `pp` equal batches without bubbles, and the slowest stage sets the pace.

    >>> import labkit as lk
    >>> cost = AnalyticCost.of("llama-3.1-8b", "H100")
    >>> cost
    AnalyticCost(llama-3.1-8b on H100)
    >>> step = StepWork(decodes=64, context=64 * 1000, sampled=64)
    >>> 0.007 < cost.seconds(step) < 0.012
    True
    >>> runner = lk.SimRunner(cost=cost)
    """

    model: ModelShape
    machine: Machine
    tp: int = 1
    pp: int = 1
    efficiency: Efficiency = field(default_factory=Efficiency)
    block_size: int = 16
    layers: tuple[int, ...] | None = None

    _seen: ClassVar[dict[tuple[Any, Any], Fixed]]
    _stages: ClassVar[tuple[int, int]]  # layers of the stage that has most of all but the last, and of the last
    _numbers: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_seen", {})
        whole("tp", self.tp, least=1)
        whole("pp", self.pp, least=1, most=self.model.num_layers)
        whole("block_size", self.block_size, least=1)
        if self.model.num_heads % self.tp:
            raise ValueError(f"tp={self.tp} does not divide the {self.model.num_heads} heads of {self.model.name}")
        if self.tp * self.pp > 1 and not self.machine.link:
            raise ValueError(f"{self.machine!r} has no link to others: tp and pp must be 1, or give it link=")
        e = self.efficiency
        wide = e.decode_attention if self.model.head_size >= 128 else e.narrow_attention
        object.__setattr__(self, "_stages", self._deal())
        numbers = (
            *self._stages, self.pp, self._kv_bytes, self._rate * wide, self._rate, 4 * self._query_width,
            self.machine.peak("bfloat16") * e.prefill_attention, self._eager, e.step, e.join,
        )  # fmt: skip
        object.__setattr__(self, "_numbers", numbers)

    @classmethod
    def of(
        cls,
        model: Any,
        machine: Any = "H100",
        *,
        tp: int = 1,
        pp: int = 1,
        efficiency: Efficiency | None = None,
        block_size: int = 16,
        layers: tuple[int, ...] | None = None,
    ) -> AnalyticCost:
        """Model and machine by name, or as `ModelShape.of` and `Machine.of` take them."""
        where = Machine.of(machine)
        if efficiency is None:
            efficiency = CPU if where.is_cpu else Efficiency()
        return cls(ModelShape.of(model), where, tp, pp, efficiency, block_size, layers)

    def __repr__(self) -> str:
        several = f"{self.tp * self.pp} x " if self.tp * self.pp > 1 else ""
        split = "".join(f", {name}={n}" for name, n in (("tp", self.tp), ("pp", self.pp)) if n > 1)
        return f"AnalyticCost({self.model.name} on {several}{self.machine.name}{split})"

    def _deal(self) -> tuple[int, int]:
        m = self.model
        if self.pp == 1:
            return 0, m.num_layers
        dealt = self.layers
        if dealt is None:
            head = m.head_weights * max(2.0, BYTES[m.dtype])
            size = (m.weight_bytes - head * (1 if m.tied else 2)) / m.num_layers
            room = max(0.0, 0.9 * self.machine.memory * self.tp * self.pp - m.weight_bytes) / m.num_layers  # for KV
            beside = BESIDE["cpu" if self.machine.is_cpu else "cuda"] * self.tp
            loads = [Load(size, size + beside, size + room)] * m.num_layers
            runs = stages_of(loads, self.pp, Load(0.0, 0.0, head), Load(0.0, head, head))
            dealt = tuple(len(run) for run in runs)
        if len(dealt) != self.pp or sum(dealt) != m.num_layers or min(dealt) < 1:
            raise ValueError(f"layers={dealt} must give the layers of {self.pp} stages, {m.num_layers} together")
        return max(dealt[:-1]), dealt[-1]

    # -- memory --------------------------------------------------------------------------------------------------

    def kv_blocks(self, *, utilization: float = 0.9, max_num_batched_tokens: int = 8192) -> int:
        """How many blocks of keys and values fit beside the weights and a step's activations.

        >>> AnalyticCost.of("llama-3.1-8b", "H100").kv_blocks()
        28247
        """
        real("utilization", utilization, least=0.0, most=1.0, open_left=True)
        model = self.model
        weights, most_layers = self._heaviest()
        widest = max(2 * model.intermediate_size // self.tp, 2 * model.hidden_size)
        activations = max_num_batched_tokens * 2 * (3 * model.hidden_size + 2 * widest)
        left = self.machine.memory * utilization - weights - activations
        blocks = int(left // (self._kv_bytes * most_layers * self.block_size))
        if blocks < 1:
            raise ValueError(
                f"{self!r} has no memory for keys and values: {weights / 2**30:.1f} GiB of weights and "
                f"{activations / 2**30:.1f} GiB of activations, of {utilization:.0%} of "
                f"{self.machine.memory / 2**30:.1f} GiB; use more machines (tp=, pp=), or another dtype"
            )
        return blocks

    def _heaviest(self) -> tuple[float, int]:
        """Bytes of weights on a machine, and layers, of the stage that has most of them."""
        m, (rest, last) = self.model, self._stages
        if self.pp == 1:
            return m.weight_bytes / self.tp, last
        head = m.head_weights * max(2.0, BYTES[m.dtype])
        layer = (m.weight_bytes - head * (1 if m.tied else 2)) / m.num_layers
        return (max(rest, last) * layer + head) / self.tp, max(rest, last)

    # -- time ----------------------------------------------------------------------------------------------------

    def seconds(self, work: StepWork) -> Any:
        """Of a step; an array for arrays. A step with prefills takes at least as long as the host launches kernels."""
        if set(map(type, work)) == {int}:
            return self._seconds_of_one(work)
        e = self.efficiency
        fixed = self._fixed(work.tokens, work.sampled)
        share = 1 / self.pp
        layer = fixed.layer + self._attention(work, share)
        device = fixed.beside + self._slowest(layer, fixed.head)
        if np.any(work.moved):
            device = device + self._moved(work.moved)
        if np.ndim(work.prefill) or np.ndim(device):
            device = np.maximum(device, np.where(np.asarray(work.prefill) > 0, self._eager, 0.0))
        elif work.prefill:
            device = max(device, self._eager)
        total = device + (e.step + e.join * work.joins)
        return total if np.ndim(total) else float(total)

    def _seconds_of_one(self, work: StepWork) -> float:
        """`seconds` of whole numbers, which is what a simulation asks for in every step: without arrays, and with what
        does not depend on the work computed once."""
        rest, last, pp, kv, decode_rate, rate, flops, flop_rate, eager, step, join = self._numbers
        share = 1 / pp
        decodes, prefill, context, read, pairs, _, sampled, joins, moved = work
        fixed = self._seen.get((decodes + prefill, sampled)) or self._fixed(decodes + prefill, sampled)
        keys = context * share
        attention = max(kv * (keys + decodes * share) / decode_rate, flops * keys / flop_rate)
        if prefill or read or pairs:
            attention += max(kv * (read * share + prefill * share) / rate, flops * (pairs * share) / flop_rate)
        layer = fixed.layer + attention
        device = fixed.beside + pp * max(rest * layer, last * layer + fixed.head)
        if moved:
            device += self._moved(moved)
        if prefill and device < eager:
            device = eager
        return float(device + (step + join * joins))

    def burst(self, work: StepWork, batches: int = 1) -> float:
        """Until `work`, in so many equal batches, has gone through all stages. They are empty before and after, so this
        takes `batches + pp - 1` turns of the slowest stage; `seconds` is without these bubbles.

        >>> cost, prompts = AnalyticCost.of("llama-3.1-70b", pp=4), StepWork(prefill=8192, pairs=2**24)
        >>> [round(cost.burst(prompts, batches) / cost.seconds(prompts)) for batches in (1, 16)]
        [4, 1]
        """
        whole("batches", batches, least=1)
        each = StepWork(*(field * self.pp / batches for field in work))
        return float(self.seconds(each)) / self.pp * (batches + self.pp - 1)

    @property
    def _eager(self) -> float:
        """Seconds in which the host launches the kernels of a step."""
        e = self.efficiency
        return e.eager_launch * (self.model.num_layers * KERNELS + e.kernels_beside)

    def _slowest(self, layer: Any, head: Any) -> Any:
        """All batches through the slowest stage."""
        rest, last = self._stages
        return self.pp * _larger(rest * layer, last * layer + head)

    def _fixed(self, tokens: Any, sampled: Any) -> Fixed:
        """Everything that does not depend on the context; few sizes occur, and often."""
        if np.ndim(tokens) or np.ndim(sampled):
            return self._beside_attention(tokens, sampled)
        found = self._seen.get((tokens, sampled))
        if found is None:
            if len(self._seen) > MOST_SEEN:
                self._seen.clear()
            found = self._seen[tokens, sampled] = Fixed(*map(float, self._beside_attention(tokens, sampled)))
        return found

    def _beside_attention(self, tokens: Any, sampled: Any) -> Fixed:
        e, tokens, sampled = self.efficiency, tokens / self.pp, sampled / self.pp  # what a stage gets at once
        layer = self._products(tokens) + self._small(tokens) + e.attention_kernel
        beside = e.kernels_beside * e.small_kernel + self._communication(tokens)
        return Fixed(layer, self._head(sampled), beside)

    def parts(self, work: StepWork) -> dict[str, Any]:
        """The device's seconds by kind of work.

        >>> parts = AnalyticCost.of("qwen3-0.6b", "H100").parts(StepWork(decodes=256, context=256 * 600, sampled=256))
        >>> max(parts, key=parts.get)
        'decode attention'
        """
        e, layers, share = self.efficiency, self.model.num_layers, 1 / self.pp
        tokens, sampled = work.tokens * share, work.sampled * share  # what a stage gets at once
        decode = self._decode_attention(work.context * share, work.decodes * share)
        prefill = self._prefill_attention(work.prefill_context * share, work.prefill * share, work.pairs * share)
        return {
            "products": layers * self._products(tokens),
            "decode attention": layers * (e.attention_kernel + decode),
            "prefill attention": layers * prefill,
            "small kernels": layers * self._small(tokens) + e.kernels_beside * e.small_kernel,
            "head": self.pp * self._head(sampled),
            "uneven stages": self._uneven(work),
            "communication": self._communication(tokens),
            "moved blocks": self._moved(work.moved),
        }

    def _uneven(self, work: StepWork) -> Any:
        """What the slowest stage takes beyond the mean; the head counts as work of all."""
        if self.pp == 1:
            return 0.0
        fixed = self._fixed(work.tokens, work.sampled)
        layer = fixed.layer + self._attention(work, 1 / self.pp)
        return self._slowest(layer, fixed.head) - self.model.num_layers * layer - self.pp * fixed.head

    @property
    def _rate(self) -> float:
        return self.machine.bandwidth * self.efficiency.memory

    def _product(self, tokens: Any, weights: float, width: float, dtype: str, read: Any = 1) -> Any:
        """`tokens` rows times a matrix of `weights`, of which `read` are read; `width` numbers a row go in and out."""
        moved = (weights * read * BYTES[dtype] + 2 * width * tokens) / self._rate
        computed = 2 * weights * tokens / (self.machine.peak(dtype) * self.efficiency.products)
        return self.efficiency.product_kernel + np.sqrt(moved * moved + computed * computed)

    def _products(self, tokens: Any) -> Any:
        m = self.model
        hidden, heads, inner = m.hidden_size, self._query_width, m.intermediate_size / self.tp
        qkv, up = heads + 2 * self._key_width, (2 if m.gated else 1) * inner
        experts, routed = self._experts_read(tokens), tokens * m.num_mlps
        return (
            self._product(tokens, hidden * qkv, hidden + qkv, m.dtype)
            + self._product(tokens, hidden * heads, hidden + heads, m.dtype)
            + self._product(routed, hidden * up, hidden + up, m.dtype, experts)
            + self._product(routed, hidden * inner, hidden + inner, m.dtype, experts)
        )

    def _experts_read(self, tokens: Any) -> Any:
        """How many experts a step reads: those that at least one of its tokens is sent to, if they are drawn evenly."""
        m = self.model
        if not m.num_experts:
            return 1
        share = m.num_experts_per_tok / m.num_experts
        missed = np.exp(tokens * np.log1p(-share)) if share < 1 else 0.0
        return m.num_experts * (1 - missed) + m.num_shared_experts

    @property
    def _query_width(self) -> float:
        latent = self.model.latent
        size = self.model.head_size if latent is None else latent.rank + latent.rotated / 2  # of a key and its value
        return self.model.num_heads * size / self.tp

    @property
    def _key_width(self) -> int:
        """Every machine has a key head at least."""
        return -(-self.model.num_kv_heads // self.tp) * self.model.head_size

    @property
    def _kv_bytes(self) -> float:
        """Keys and values of a token in one layer on one machine."""
        kept = 2 * self._key_width if self.model.latent is None else self.model.num_kept  # latents are not split
        return kept * BYTES[self.model.kv_dtype]

    def _attention(self, work: StepWork, share: float) -> Any:
        return self._decode_attention(work.context * share, work.decodes * share) + self._prefill_attention(
            work.prefill_context * share, work.prefill * share, work.pairs * share
        )

    def _decode_attention(self, context: Any, decodes: Any) -> Any:
        e = self.efficiency
        share = e.decode_attention if self.model.head_size >= 128 else e.narrow_attention
        return _larger(self._kv_bytes * (context + decodes) / (self._rate * share), self._attention_flops(context))

    def _prefill_attention(self, context: Any, tokens: Any, pairs: Any) -> Any:
        return _larger(self._kv_bytes * (context + tokens) / self._rate, self._attention_flops(pairs))

    def _attention_flops(self, pairs: Any) -> Any:
        """Seconds of the products of `pairs` of a query and a key; keys and values are 16 bits wide by then."""
        return 4 * self._query_width * pairs / (self.machine.peak("bfloat16") * self.efficiency.prefill_attention)

    def _small(self, tokens: Any) -> Any:
        """Norms with residuals, rope and store, activation: numbers of 16 bits, read and written."""
        m = self.model
        numbers = 8 * m.hidden_size + 2 * (self._query_width + 2 * self._key_width)
        numbers += 3 * m.intermediate_size / self.tp * m.num_mlps
        moved = 2 * numbers * tokens / self._rate
        return np.sqrt((SMALL * self.efficiency.small_kernel) ** 2 + moved * moved)

    def _head(self, rows: Any) -> Any:
        m, vocab = self.model, self.model.vocab_size / self.tp
        dtype = m.dtype if BYTES[m.dtype] >= 2 else "bfloat16"  # it keeps 16 bits where layers have fewer
        product = self._product(rows, m.hidden_size * vocab, m.hidden_size, dtype)
        drawn = LOGIT_BYTES * vocab * rows / (self.machine.bandwidth * self.efficiency.logits)
        return np.where(np.asarray(rows) > 0, product + drawn, 0.0)

    def _communication(self, tokens: Any) -> Any:
        """Two all-reduces a layer and one behind the embedding; between stages, one transfer."""
        m, tp, latency = self.model, self.tp, self.machine.link_latency
        if tp * self.pp == 1:
            return 0.0
        moved = m.hidden_size * self._wide * tokens / (self.machine.link * self.efficiency.link)
        reduces = (2 * m.num_layers + 1) * (2 * latency + 2 * (tp - 1) / tp * moved) if tp > 1 else 0.0
        return reduces + (self.pp * (latency + moved) if self.pp > 1 else 0.0)

    @property
    def _wide(self) -> float:
        """Bytes of a number between layers."""
        return max(2.0, BYTES[self.model.dtype])

    def exchanges(self, tokens: float, sampled: float) -> tuple[int, float]:
        """How often a machine exchanges with others in a step of greedy rows, and the bytes that it gives to them: the
        embedding, two sums a layer and each rank's likeliest tokens with `tp`, hidden states to the next stage with
        `pp` (of a stage in the middle).

        >>> AnalyticCost.of("llama-3.1-8b", tp=2).exchanges(tokens=64, sampled=64)
        (66, 34080768.0)
        """
        m, hidden = self.model, self.model.hidden_size * self._wide * tokens
        if self.pp > 1:
            stage = max(self._stages) if self.tp > 1 else 0
            return 2 * stage + 1, (2 * stage + 1) * hidden
        return (2 * m.num_layers + 2, (2 * m.num_layers + 1) * hidden + 16.0 * sampled) if self.tp > 1 else (0, 0.0)

    def _moved(self, blocks: Any) -> Any:
        """Blocks to or from host memory, each machine its own share."""
        moved = blocks * self.block_size * self.model.kv_bytes / (self.tp * self.pp)
        return moved / self.machine.host_link if self.machine.host_link else 2 * moved / self._rate


def _larger(a: Any, b: Any) -> Any:
    """Of each pair, where one is an array; numpy takes long for two numbers."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)
