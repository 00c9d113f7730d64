"""GPTQ (Frantar et al., 2022): rounds a weight's columns one after the other, and moves what each rounding loses to the
columns that are still to come, by the second moments of the inputs.

Layers are quantized in the order in which they are computed, and each sees the inputs that it will have: those that the
quantized layers before it give.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from labkit.loading.rounding import Groups, nearest
from labkit.quantization.methods import GPTQ
from labkit.quantization.moments import Change, Moments
from labkit.quantization.stack import Stack

BLOCK = 128  # columns of which the errors are moved on together


def quantize_layer(
    stack: Stack, method: GPTQ, layer: int, x: Tensor, length: int, names: Container[str]
) -> Iterator[Change]:
    """Quantizes those layers of a decoder layer that are in `names`, also in the stack. x enters the layer."""
    for shared in stack.slots(layer):
        wanted = [slot for slot in shared if slot.name in names]
        if not wanted:
            continue
        moments = Moments.of(stack, layer, x, length, shared[0])
        for slot in wanted:
            before = slot.weight.clone()
            rounded = method.packed(solve(before, moments.second, method))
            slot.weight.copy_(rounded.dense)
            yield Change.of(slot.name, before, rounded, moments.second)


def solve(weight: Tensor, second: Tensor, method: GPTQ) -> Groups:
    """`weight` [out, in] rounded, with `second` [in, in] the mean of x xT over the inputs x."""
    outputs, inputs = weight.shape
    group = inputs if method.size == -1 else method.size
    hessian, w = second.clone(), weight.float().clone()
    unseen = hessian.diagonal() == 0
    hessian.diagonal()[unseen] = 1.0
    importance = hessian.diagonal().view(-1, group).clone()
    scales, zeros = method.scales_of(w.unflatten(1, (-1, group)), importance)
    order = torch.arange(inputs, device=w.device)
    if method.act_order:
        order = hessian.diagonal().argsort(descending=True)
    inverse = inverse_factor(hessian[order][:, order], method.damp)
    w = w[:, order]
    values = torch.empty_like(w)
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        errors = torch.empty(outputs, end - begin, device=w.device)
        for i in range(begin, end):
            g = int(order[i]) // group
            if not method.act_order and i % group == 0:  # by what the columns before have added
                scales[:, g], zeros[:, g] = method.scales_of(w[:, i : i + group], importance[g])
            column = nearest(w[:, i], scales[:, g], zeros[:, g], method.bits)
            values[:, i] = column
            lost = (w[:, i] - scales[:, g] * (column - zeros[:, g])) / inverse[i, i]
            w[:, i:end] -= lost[:, None] * inverse[i, i:end]
            errors[:, i - begin] = lost
        w[:, end:] -= errors @ inverse[begin:end, end:]
    back = order.argsort()
    kept = None if method.symmetric else zeros.to(torch.uint8)
    return Groups(values[:, back].to(torch.uint8), scales, kept)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse; with more damping where the matrix is not positive definite."""
    mean = hessian.diagonal().mean()
    for _ in range(5):
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp *= 10
    raise ValueError("the inputs' second moments are not positive definite: are the texts or the weights broken?")
