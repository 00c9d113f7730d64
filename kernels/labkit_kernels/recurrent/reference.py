"""Recurrent layers in plain torch, one token after the other, computed in float32 and rounded once at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import Sequences


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, sequences: Sequences, silu: bool = False
) -> Tensor:
    """Each channel's weighted sum of its last `width` inputs; `silu` of it if asked.

    x: [tokens, channels]; weight: [channels, width]; state: [slots, width - 1, channels], the inputs before a
    sequence's first token, oldest first, changed in place.
    """
    out, before = torch.empty_like(x, memory_format=torch.contiguous_format), state.shape[1]
    for begin, end, slot, fresh in sequences.each():
        past = torch.zeros_like(state[0]) if fresh else state[slot]
        seen = torch.cat((past.to(x.dtype), x[begin:end]))  # [width - 1 + tokens, channels]
        taps = seen.float().unfold(0, before + 1, 1)  # [tokens, channels, width]
        y = (taps * weight.float()).sum(-1)
        if bias is not None:
            y = y + bias.float()
        out[begin:end] = (F.silu(y) if silu else y).to(x.dtype)
        if slot >= 0:
            state[slot] = seen[len(seen) - before :].to(state.dtype)
    return out


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, nearly: zeros stay zeros."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, sequences: Sequences,
    *, normalize: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The gated delta rule: a head's state S decays by exp(g), then what it holds for k moves towards v by beta.

        S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  out = scale S^T q

    q, k: [tokens, key heads, key size]; v and the result: [tokens, heads, value size]; each key head serves
    heads / key heads value heads, side by side. g: [tokens, heads], or one for each key channel [tokens, heads, key
    size]; beta: [tokens, heads]; state: [slots, heads, key size, value size], changed in place. `normalize`: q and k
    become unit vectors first. scale: None means key size ** -0.5.
    """
    heads, size = v.shape[1], k.shape[-1]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    q, k, v, g, beta = q.float(), k.float(), v.float(), g.float(), beta.float()
    if normalize:
        q, k = unit(q), unit(k)
    q = q * (size**-0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    decay = (g if g.dim() == 3 else g[..., None]).exp()  # [tokens, heads, key size or 1]
    for begin, end, slot, fresh in sequences.each():
        s = torch.zeros_like(state[0]) if fresh else state[slot].clone()
        for t in range(begin, end):
            s = s * decay[t][..., None]
            held = torch.einsum("hkv,hk->hv", s, k[t])
            s = s + k[t][..., None] * (beta[t][:, None] * (v[t] - held))[:, None]
            out[t] = torch.einsum("hkv,hk->hv", s, q[t]).to(out.dtype)
        if slot >= 0:
            state[slot] = s
    return out


def ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
    *, d: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = True,
    limits: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:  # fmt: skip
    """The scan of Mamba 2: a state S of a head decays by exp(a dt) and adds its input.

        S = exp(a dt) S + dt x b^T;  out = S c + d x

    x and the result: [tokens, heads, head size]; dt: [tokens, heads], of which first `dt_bias` [heads] is added, then
    softplus taken, then the limits; a, d: [heads]; b, c: [tokens, groups, state size], each group for heads / groups
    heads side by side; state: [slots, heads, head size, state size], changed in place.
    """
    heads = x.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    dt = step_size(dt, dt_bias, softplus).clamp(*limits)
    decay = (dt * a.float()).exp()
    b, c = (y.repeat_interleave(heads // y.shape[1], 1) for y in (b, c))
    for begin, end, slot, fresh in sequences.each():
        s = torch.zeros_like(state[0]) if fresh else state[slot].clone()
        for t in range(begin, end):
            s = decay[t][:, None, None] * s + (dt[t][:, None] * x[t])[..., None] * b[t][:, None]
            y = torch.einsum("hpn,hn->hp", s, c[t])
            out[t] = (y if d is None else y + d.float()[:, None] * x[t]).to(out.dtype)
        if slot >= 0:
            state[slot] = s
    return out


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
    *, d: Tensor | None = None, dt_bias: Tensor | None = None, gate: Tensor | None = None, softplus: bool = True,
) -> Tensor:  # fmt: skip
    """The scan of Mamba 1: every number of a channel's state s decays by itself.

        s = exp(a dt) s + dt x b;  out = s c + d x, times silu(gate)

    x, dt, gate and the result: [tokens, channels]; a: [channels, state size]; b, c: [tokens, state size]; d, dt_bias:
    [channels], the bias is added to dt before softplus; state: [slots, channels, state size], changed in place.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, b, c = x.float(), b.float(), c.float()
    dt = step_size(dt.float(), dt_bias, softplus)
    for begin, end, slot, fresh in sequences.each():
        s = torch.zeros_like(state[0]) if fresh else state[slot].clone()
        for t in range(begin, end):
            s = (dt[t][:, None] * a.float()).exp() * s + (dt[t] * x[t])[:, None] * b[t]
            y = s @ c[t]
            if d is not None:
                y = y + d.float() * x[t]
            out[t] = (y if gate is None else y * F.silu(gate[t].float())).to(out.dtype)
        if slot >= 0:
            state[slot] = s
    return out


def step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    return F.softplus(dt) if softplus else dt
