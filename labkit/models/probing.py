"""What the layers of a model that runs by transformers' own code ask of attention, found out by forwards of two tokens.

transformers hands windows and chunks to its attention functions inside of a mask, and labkit makes no masks: here each
mask is only described. A model that asks for more than labkit's attention computes, or whose layers look at other
tokens elsewhere, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit.models.base import KVSpec

HARMLESS = ("position_ids", "cache_position", "labkit_alibi")  # tensors that say nothing that is not known
TOKENS = ((0, 1), (2, 1), (3, 1), (4, 1))  # of the forwards: the first token differs


class Unknown(Exception):
    """What labkit cannot compute of this model."""


class Asked(NamedTuple):
    """What one layer stores, and of how many tokens the chunks are within which it attends; 0: no chunks."""

    kv: KVSpec
    chunk: int = 0


class Mask(NamedTuple):
    """A mask in place of which the model was given `value`."""

    value: Tensor
    window: int | None
    chunk: int


class Probe:
    """Takes the place of attention, whose output is 0, and notes what it is asked for."""

    def __init__(self) -> None:
        self.layers: list[Asked] = []
        self.masks: list[Mask] = []

    def mask(self, sees: Callable[..., Tensor], local_size: int | None, device: torch.device, size: int) -> Tensor:
        """Describes a mask for `size` tokens: `sees(batch, head, query, key)`, with a window or chunks of
        `local_size`."""

        def has(query: int, key: int) -> bool:
            batch, head, q, k = (torch.tensor(value, device=device) for value in (0, 0, query, key))
            return bool(sees(batch, head, q, k))

        if has(0, 1):
            raise Unknown("it attends to later tokens, as encoders do")
        window, chunk = None, 0
        if local_size is not None and not has(local_size, 0):
            window, chunk = (local_size, 0) if has(local_size, local_size - 1) else (None, local_size)
        self.masks.append(Mask(torch.zeros(1, 1, size, size, device=device), window, chunk))
        return self.masks[-1].value

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None,
        sinks: Tensor | None, others: dict[str, Any],
    ) -> tuple[Tensor, None]:  # fmt: skip
        if sinks is not None and len(sinks) != q.shape[1]:
            raise Unknown(f"{len(sinks)} sinks for {q.shape[1]} query heads")
        if k.shape[2] != q.shape[2]:
            raise Unknown(f"it attends to {k.shape[2]} keys of {q.shape[2]} tokens")
        for name, value in others.items():
            if isinstance(value, Tensor) and name not in HARMLESS:
                raise Unknown(f"it gives {name!r} to attention, which labkit does not know")
        chunk = 0
        if mask is not None:
            found = next((one for one in self.masks if one.value is mask), None)
            if found is None:
                raise Unknown("it makes an attention mask of its own")
            window, chunk = found.window, found.chunk
        elif others.get("is_causal", getattr(module, "is_causal", True)) is False and not self.masks:
            raise Unknown("it attends to later tokens, as encoders do")
        self.layers.append(Asked(KVSpec(k.shape[1], k.shape[3], v.shape[3], window), chunk))
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3]), None


def check_alone(body: Callable[..., Any], device: torch.device, probe: Probe, once: bool = False) -> int:
    """Refuses a model whose hidden state of a token depends on another token while attention gives 0, or on where it
    stands beside its position; the hidden size. With `once`, one forward finds what is asked for, and nothing is
    compared. A router may turn a rounding difference into another expert, so that
    one equal pair is enough."""
    at = {"position_ids": torch.arange(2, device=device)[None]}

    def second(tokens: tuple[int, int], **positions: Tensor) -> Tensor:
        """[hidden size]"""
        probe.layers = []
        out = body(input_ids=torch.tensor([tokens], device=device), use_cache=False, **positions)
        return out[0][0, 1].float()  # type: ignore[no-any-return]

    if once:
        return len(second(TOKENS[0], **at))
    unsaid, first = second(TOKENS[0]), second(TOKENS[0], **at)
    asked, slack = probe.layers, 1e-2 * first.abs().max()
    if (unsaid - first).abs().max() > slack:
        raise Unknown("it does not number positions from 0")
    if all((second(tokens, **at) - first).abs().max() > slack for tokens in TOKENS[1:]):
        raise Unknown("its layers look at other tokens outside of attention")
    probe.layers = asked
    return len(first)
