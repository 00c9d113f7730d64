"""Recurrent layers of transformers' models by labkit's ops: gated delta rules, Mamba and short convolutions.

Projections are the module's own; what lies between them goes through ops that take a whole step, decode rows and
prompts alike.

A mixer is used only if it gives what transformers' own forward gives for the same input: see `fast`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from labkit_kernels import get
from labkit_kernels.recurrent import Sequences
from torch import Tensor, nn

from labkit.models.base import StateSpec


class Mixer:
    """`specs` are its states. `pick` again when an op was swapped."""

    specs: tuple[StateSpec, ...]
    ops: tuple[str, ...]
    inside: tuple[str, ...] = ()  # projections within the recurrence: they may see a part of a step's tokens

    def __init__(self, module: Any, conv: Any, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.weight = conv.weight.detach().squeeze(1).to(dtype).contiguous()  # [channels, width]
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.window = StateSpec((self.weight.shape[1] - 1, self.weight.shape[0]), dtype)
        self.pick()

    def pick(self) -> None:
        for name in self.ops:
            setattr(self, name, get(name).pick(self.weight.device, self.dtype))

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Projections of a step's tokens [tokens, hidden size]: what the recurrence takes, one line a token."""
        raise NotImplementedError

    def mix(self, parts: Sequence[Tensor], sequences: Sequences, states: Sequence[Tensor]) -> Tensor:
        """The recurrence. Each sequence reads and writes its slot of the states."""
        raise NotImplementedError

    def after(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[tokens, hidden size]."""
        raise NotImplementedError


class ShortConv(Mixer):
    """LFM2's: a convolution between two gates."""

    ops = ("causal_conv",)
    causal_conv: Callable[..., Tensor]

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, module.conv, dtype)
        self.specs = (self.window,)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        b, c, x = self.module.in_proj(x).chunk(3, -1)
        return b * x, c

    def mix(self, parts: Sequence[Tensor], sequences: Sequences, states: Sequence[Tensor]) -> Tensor:
        return self.causal_conv(parts[0], self.weight, self.bias, states[0], sequences)

    def after(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.module.out_proj(parts[1] * y)
        return out


class GatedDelta(Mixer):
    """Qwen3-Next's and Qwen3.5's linear attention."""

    ops = ("causal_conv", "gated_delta")
    causal_conv: Callable[..., Tensor]
    gated_delta: Callable[..., Tensor]

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, module.conv1d, dtype)
        self.rate = -module.A_log.detach().float().exp()  # [heads]
        self.sizes = [module.key_dim, module.key_dim, module.value_dim]
        shape = (module.num_v_heads, module.head_k_dim, module.head_v_dim)
        self.specs = self.window, StateSpec(shape, torch.float32)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values side by side; gates z; decays and betas by head."""
        m = self.module
        if hasattr(m, "in_proj_qkvz"):
            *qkv, z, b, a = m.fix_query_key_value_ordering(m.in_proj_qkvz(x)[None], m.in_proj_ba(x)[None])
            mixed = torch.cat([part[0].flatten(1) for part in qkv], -1)
            z, b, a = z[0].flatten(1), b[0], a[0]
        else:
            mixed, z, b, a = m.in_proj_qkv(x), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)
        return mixed, z, self.rate * F.softplus(a.float() + m.dt_bias), b.sigmoid()

    def mix(self, parts: Sequence[Tensor], sequences: Sequences, states: Sequence[Tensor]) -> Tensor:
        mixed, _, decay, beta = parts
        mixed = self.causal_conv(mixed, self.weight, self.bias, states[0], sequences, silu=True)
        q, k, v = mixed.split(self.sizes, -1)
        m = self.module
        q, k = (part.unflatten(-1, (-1, m.head_k_dim)) for part in (q, k))
        v = v.unflatten(-1, (-1, m.head_v_dim))
        return self.gated_delta(q, k, v, decay, beta, states[1], sequences, normalize=True)

    def after(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        m = self.module
        normed = m.norm(y.flatten(0, 1), parts[1].reshape(-1, m.head_v_dim))
        out: Tensor = m.out_proj(normed.reshape(len(y), -1))
        return out


class Mamba2(Mixer):
    """The layer of Mamba 2, Bamba, Granite 4, Nemotron-H, Zamba 2 and, with factors and without a norm, Falcon-H1."""

    ops = ("causal_conv", "ssd")
    causal_conv: Callable[..., Tensor]
    ssd: Callable[..., Tensor]

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, module.conv1d, dtype)
        self.a = -module.A_log.detach().float().exp()
        self.d, self.dt_bias = module.D.detach().float(), module.dt_bias.detach().float()
        self.inner, self.states = module.intermediate_size, module.n_groups * module.ssm_state_size
        limits = getattr(module, "time_step_limit", None) or (0.0, float("inf"))
        self.limits = float(limits[0]), float(limits[1])
        shape = (module.num_heads, module.head_dim, module.ssm_state_size)
        self.specs = self.window, StateSpec(shape, torch.float32)
        self.has_norm = getattr(module, "mamba_rms_norm", True)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gates; inputs with B and C side by side; step sizes by head."""
        m = self.module
        has_factors = hasattr(m, "ssm_in_multiplier")
        x = m.in_proj(x * m.ssm_in_multiplier) * m.mup_vector[0, 0] if has_factors else m.in_proj(x)
        gate, mixed, dt = x.split([self.inner, self.inner + 2 * self.states, m.num_heads], -1)
        return mixed, dt, gate

    def mix(self, parts: Sequence[Tensor], sequences: Sequences, states: Sequence[Tensor]) -> Tensor:
        m, (mixed, dt, _) = self.module, parts
        mixed = self.causal_conv(mixed, self.weight, self.bias, states[0], sequences, silu=True)
        x, b, c = mixed.split([self.inner, self.states, self.states], -1)
        x, b, c = (part.unflatten(-1, (n, -1)) for part, n in ((x, m.num_heads), (b, m.n_groups), (c, m.n_groups)))
        return self.ssd(x, dt, self.a, b, c, states[1], sequences, d=self.d, dt_bias=self.dt_bias, limits=self.limits)

    def after(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        m, y = self.module, y.flatten(1)
        y = m.norm(y[None], parts[2][None])[0] if self.has_norm else y * F.silu(parts[2])
        out: Tensor = m.out_proj(y.to(parts[2].dtype))
        return out


class Mamba1(Mixer):
    """The layer of Mamba, Falcon Mamba and Jamba, of which the latter two have norms in between."""

    ops = ("causal_conv", "selective_scan")
    inside = ("x_proj", "dt_proj")
    causal_conv: Callable[..., Tensor]
    selective_scan: Callable[..., Tensor]

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__(module, module.conv1d, dtype)
        self.a, self.d = -module.A_log.detach().float().exp(), module.D.detach().float()
        self.sizes = [module.time_step_rank, module.ssm_state_size, module.ssm_state_size]
        self.dt_bias = None if module.dt_proj.bias is None else module.dt_proj.bias.detach().float()
        self.specs = self.window, StateSpec((module.intermediate_size, module.ssm_state_size), torch.float32)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Inputs and gates."""
        parts: tuple[Tensor, ...] = self.module.in_proj(x).chunk(2, -1)
        return parts

    def mix(self, parts: Sequence[Tensor], sequences: Sequences, states: Sequence[Tensor]) -> Tensor:
        m, (x, gate) = self.module, parts
        x = self.causal_conv(x, self.weight, self.bias, states[0], sequences, silu=True)
        dt, b, c = m.x_proj(x).split(self.sizes, -1)
        if hasattr(m, "dt_layernorm"):
            dt, b, c = m.dt_layernorm(dt), m.b_layernorm(b), m.c_layernorm(c)
        dt = F.linear(dt, m.dt_proj.weight)
        return self.selective_scan(x, dt, self.a, b, c, states[1], sequences, d=self.d, dt_bias=self.dt_bias, gate=gate)

    def after(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.module.out_proj(y)
        return out


KINDS: tuple[tuple[type[Mixer], tuple[str, ...]], ...] = (
    (ShortConv, ("conv", "in_proj", "out_proj")),
    (GatedDelta, ("conv1d", "A_log", "dt_bias", "head_k_dim", "num_v_heads", "norm", "in_proj_qkvz")),
    (GatedDelta, ("conv1d", "A_log", "dt_bias", "head_k_dim", "num_v_heads", "norm", "in_proj_qkv")),
    (Mamba1, ("conv1d", "A_log", "D", "x_proj", "dt_proj", "in_proj", "ssm_state_size", "time_step_rank")),
    (Mamba2, ("conv1d", "A_log", "D", "dt_bias", "n_groups", "ssm_state_size", "in_proj", "time_step_limit")),
)


def fast(module: nn.Module, own: Callable[[Tensor], Tensor], hidden_size: int, dtype: torch.dtype) -> Mixer | None:
    """This layer by labkit's ops, if it is of a known kind and gives what its `own` forward of a sequence does
    ([1, tokens, hidden size] -> the same)."""
    kind = next((kind for kind, names in KINDS if all(hasattr(module, name) for name in names)), None)
    if kind is None or getattr(module, "activation", "silu") not in ("silu", "swish"):
        return None
    mixer = kind(module, dtype)  # type: ignore[call-arg, arg-type]
    device = mixer.weight.device
    x = torch.randn(9, hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    cuts = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    states = [torch.zeros((1, *spec.shape), dtype=spec.dtype, device=device) for spec in mixer.specs]
    slot, parts, found = torch.zeros(1, dtype=torch.int32, device=device), mixer.before(x), []
    for begin, end in ((0, 5), (5, 9)):  # the second part goes on from the first one's state
        fresh = torch.tensor([begin == 0], device=device)
        sequences = Sequences(cuts.new_tensor([0, end - begin]), slot, fresh)
        found.append(mixer.mix([part[begin:end] for part in parts], sequences, states))
    got, expected = mixer.after(torch.cat(found), parts).float(), own(x[None])[0].float()
    slack = 1e-3 if dtype == torch.float32 else 0.05
    if not (got - expected).abs().mean() <= slack * expected.abs().mean():
        warnings.warn(
            f"{type(module).__name__} is computed by transformers' own code: labkit's {kind.__name__} differs from it",
            stacklevel=2,
        )
        return None
    return mixer
