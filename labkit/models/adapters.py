"""Attention adapters for families whose attention does not go through transformers' attention interface.

An adapter computes the family's own projections and positions, then calls the interface.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit.models import hf


def _through_interface(module: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[1, heads, tokens, size] each -> [1, tokens, heads * size]."""
    out, _ = hf.AttentionInterface()["labkit_paged"](module, q, k, v, None, **options)
    return out.flatten(2)  # type: ignore[no-any-return]


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Slopes that halve geometrically. Heads beyond a power of two take every second slope of the next series."""
    whole = 2 ** math.floor(math.log2(num_heads))

    def series(n: int) -> Tensor:
        return 2.0 ** (-8.0 / n * torch.arange(1, n + 1, device=device))

    return torch.cat((series(whole), series(2 * whole)[0::2][: num_heads - whole]))


def bloom(self: Any, hidden_states: Tensor, residual: Tensor, alibi: Any = None, *args: Any, **others: Any) -> Any:
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    slopes = alibi_slopes(self.num_heads, q.device)
    out = _through_interface(self, q, k, v, scaling=self.inv_norm_factor, labkit_alibi=slopes)
    return self.dense(out) + residual, None


def falcon(
    self: Any, hidden_states: Tensor, alibi: Any = None, *args: Any, position_embeddings: Any = None, **others: Any
) -> Any:
    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture:  # groups of queries, each with its key and value behind it
        parts = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q, k, v = parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
    elif self.multi_query:
        parts = fused.unflatten(-1, (-1, self.head_dim))
        q, k, v = parts[..., :-2, :], parts[..., [-2], :], parts[..., [-1], :]
    else:
        q, k, v = fused.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    options: dict[str, Any] = {"scaling": self.inv_norm_factor}
    if alibi is None:
        q, k = sys.modules[type(self).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        options["labkit_alibi"] = alibi_slopes(self.num_heads, q.device) * self.inv_norm_factor
    return self.dense(_through_interface(self, q, k, v, **options)), None


def gptj(self: Any, hidden_states: Tensor, *args: Any, position_ids: Any = None, **others: Any) -> Any:
    heads = (self.num_attention_heads, self.head_dim)
    q, k, v = (part(hidden_states).unflatten(-1, heads) for part in (self.q_proj, self.k_proj, self.v_proj))
    sin, cos = self.embed_positions[position_ids].to(q.dtype).chunk(2, -1)
    turn = sys.modules[type(self).__module__].apply_rotary_pos_emb
    size = self.rotary_dim or self.head_dim
    q, k = (torch.cat((turn(x[..., :size], sin, cos), x[..., size:]), -1) for x in (q, k))
    out = _through_interface(self, *(x.transpose(1, 2) for x in (q, k, v)), scaling=1 / self.scale_attn)
    return self.out_proj(out), None


def _rotates(module: nn.Module) -> None:
    hf.member(type(module).__module__, "apply_rotary_pos_emb")


class Adapter(NamedTuple):
    """A replacement forward for an attention class, and the attributes of the class that it uses."""

    attention: str
    forward: Callable[..., Any]
    parts: tuple[str, ...]
    rotates: bool = False


ADAPTERS = {
    "bloom": Adapter("BloomAttention", bloom, ("_reshape", "query_key_value", "num_heads", "inv_norm_factor", "dense")),
    "falcon": Adapter(
        "FalconAttention",
        falcon,
        ("query_key_value", "new_decoder_architecture", "num_kv_heads", "head_dim", "multi_query", "num_heads",
         "inv_norm_factor", "dense"),
        rotates=True,
    ),
    "gptj": Adapter(
        "GPTJAttention",
        gptj,
        ("num_attention_heads", "head_dim", "q_proj", "k_proj", "v_proj", "rotary_dim", "scale_attn", "out_proj"),
        rotates=True,
    ),
}  # fmt: skip


def adapt(model: nn.Module) -> bool:
    """Replace the forward of a family's attention modules by one that calls the interface; returns whether it is such a
    family."""
    adapter = ADAPTERS.get(model.config.model_type)  # type: ignore[union-attr, arg-type]
    if adapter is None:
        return False
    found = [module for module in model.modules() if type(module).__name__ == adapter.attention]
    if not found:
        raise hf.changed(f"{type(model).__name__}: it has no {adapter.attention}")
    if adapter.forward is gptj and not hasattr(found[0], "embed_positions"):
        return False  # since transformers 5.24 this family asks the interface itself
    for module in found:
        hf.parts(module, *adapter.parts)
        if adapter.rotates:
            _rotates(module)
        module.forward = adapter.forward.__get__(module)  # type: ignore[method-assign]
    return True
