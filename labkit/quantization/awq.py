"""AWQ (Lin et al., 2023): multiplies the inputs' columns of a weight by scales, so that columns with large inputs are
rounded finely, and divides what comes before by them: a norm's weight, or the outputs of the layer before. Then clips
the ranges of groups where that lowers the error of the output.

Layers see the inputs that the quantized layers before them give. Layers that share inputs (q, k, v; gate, up) share
scales. Where nothing comes before that could be divided, a layer is only clipped.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.loading.rounding import Groups, dequantized, nearest, range_of, round_groups
from labkit.models.mlp import MLP
from labkit.models.norms import Norm
from labkit.quantization.methods import AWQ
from labkit.quantization.moments import Change, Moments, lost
from labkit.quantization.stack import Slot, Stack

ALPHAS = tuple(i / 20 for i in range(20))  # scale = size of the inputs ** alpha; 0: no scaling
CLIPS = tuple(1 - 0.05 * i for i in range(10))
UNCLIPPED = ("q", "k", "qkv")  # as in the paper: what scores are made of


@dataclass
class Shared:
    """Slots with the same inputs, and what these are scaled by."""

    slots: list[Slot]
    moments: Moments
    scale: Tensor  # [in]


def quantize_layer(
    stack: Stack, method: AWQ, layer: int, x: Tensor, length: int, names: Container[str]
) -> Iterator[Change]:
    """Quantizes those layers of a decoder layer that are in `names`, also in the stack. x enters the layer."""
    shared = []
    for slots in stack.slots(layer):
        moments = Moments.of(stack, layer, x, length, slots[0])
        shared.append(Shared(slots, moments, torch.ones_like(moments.size)))
    changed = _scale(stack, method, layer, shared, names)
    for part in shared:
        second = part.moments.divided(part.scale).second
        for slot in part.slots:
            if slot.name not in names:
                continue
            before = slot.weight.clone()
            if slot.kind in UNCLIPPED:
                found = round_groups(before, 4, method.size, not method.zero_point, stored=torch.float16)
            else:
                found = clipped(before, second, method)
            rounded = method.packed(found)
            slot.weight.copy_(rounded.dense)
            change = Change.of(slot.name, before, rounded, second)
            change.tensors.update(changed.pop(slot.name, {}))
            yield change
    assert not changed


def _scale(
    stack: Stack, method: AWQ, layer: int, shared: list[Shared], names: Container[str]
) -> dict[str, dict[str, Tensor]]:
    """Finds and applies the scales. Returns the norms and biases that changed, beside the slot they go with."""
    part, dtype = stack.layers[layer], stack.source.dtype
    prefix, changed = f"model.layers.{layer}", {}
    sandwich = f"{prefix}.pre_feedforward_layernorm"
    behind_attention = sandwich if f"{sandwich}.weight" in stack.source.shapes else f"{prefix}.post_attention_layernorm"
    for at, norm, name in ((0, part.before_attention, "input_layernorm"), (2, part.before_mlp, behind_attention)):
        if at < len(shared) and norm is not None and all(slot.name in names for slot in shared[at].slots):
            found = best_scale(shared[at].slots[0].linear.weight, shared[at].moments, method)
            stored, shared[at].scale = divide_norm(norm, found, stack.model.shape.norm_offset, dtype)
            full = name if name.startswith(prefix) else f"{prefix}.{name}"
            changed[shared[at].slots[0].name] = {f"{full}.{kind}": tensor for kind, tensor in stored.items()}
    attention = part.attention
    heads, size = attention.shape.num_kv_heads, attention.shape.head_size
    pairs = [(0, 1, slice(sum(attention.sizes[:2]), sum(attention.sizes)), heads, size)]
    if isinstance(part.mlp, MLP) and part.mlp.gated:
        half = part.mlp.up.shape[1] // 2
        pairs.append((2, 3, slice(half, 2 * half), half, 1))
    for before, behind, rows, units, size in pairs:
        (slot,), giver = shared[behind].slots, shared[before].slots[-1]
        if slot.name not in names or giver.name not in names:
            continue
        copies = slot.linear.shape[0] // (units * size)  # of a value head, for as many query heads
        found = best_scale(slot.weight, shared[behind].moments, method, (units, copies, size))
        shared[behind].scale = found
        once = found.view(units, copies, size)[:, 0].flatten()
        giver.linear.weight[rows] /= once[:, None]
        if giver.linear.bias is not None:
            giver.linear.bias[rows] /= once
            bias = giver.linear.bias[giver.rows].to(dtype)
            changed.setdefault(giver.name, {})[f"{giver.name}.bias"] = bias
    for one in shared:
        one.slots[0].linear.weight *= one.scale
    return changed


def best_scale(weight: Tensor, moments: Moments, method: AWQ, shape: tuple[int, int, int] | None = None) -> Tensor:
    """The scale [in] with the least error of the output. `shape` (units, copies, size) of the inputs: copies share a
    scale."""
    size = moments.size
    if shape is not None:
        size = size.view(shape).mean(1, keepdim=True).expand(shape).flatten()
    size = size.clamp(min=1e-3 * float(size.mean()) + 1e-12)
    best, found = math.inf, torch.ones_like(size)
    for alpha in ALPHAS:
        scale = size**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = round_groups(weight * scale, 4, method.size, not method.zero_point, stored=torch.float16).dense(4)
        error = float(lost(rounded / scale - weight, moments.second).sum())
        if error < best:
            best, found = error, scale
    return found


def divide_norm(norm: Norm, scale: Tensor, offset: float, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Divides a norm in place. Returns what to store of it, and the scale by which it is divided exactly once its
    weight is rounded to `dtype`."""
    stored = {"weight": (norm.weight / scale - offset).to(dtype)}
    divided = stored["weight"].float() + offset
    exact = torch.where(divided == 0, scale, norm.weight / torch.where(divided == 0, 1.0, divided))
    exact = torch.where(exact > 0, exact, scale)  # a weight of zero gives nothing to scale
    norm.weight = divided
    if norm.bias is not None:
        stored["bias"] = (norm.bias / exact).to(dtype)
        norm.bias = stored["bias"].float()
    return stored, exact


def clipped(weight: Tensor, second: Tensor, method: AWQ) -> Groups:
    """The weight in groups, each range clipped to where the output's error is least."""
    group = weight.shape[1] if method.size == -1 else method.size
    shaped = weight.unflatten(1, (-1, group))  # [out, groups, group]
    groups = shaped.shape[1]
    own = second.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, group, group]
    best, scales, zeros = None, torch.empty(0), torch.empty(0)
    for clip in CLIPS:
        some_scales, some_zeros = range_of(shaped, clip, 4, not method.zero_point, torch.float16)
        off = (dequantized(shaped, some_scales[..., None], some_zeros[..., None], 4) - shaped).transpose(0, 1)
        error = ((off @ own) * off).sum(-1).T  # [out, groups]
        if best is None:
            best, scales, zeros = error, some_scales, some_zeros
        else:
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, some_scales, scales), torch.where(better, some_zeros, zeros)
    values = nearest(shaped, scales[..., None], zeros[..., None], 4).to(torch.uint8).flatten(1)
    return Groups(values, scales, zeros.to(torch.uint8) if method.zero_point else None)
