"""What a prefill costs: floating point operations of a model's shape. Knows no hardware and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from labkit.core.options import whole

Number = TypeVar("Number", float, "np.ndarray[Any, Any]")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder that its prefill depends on.

    >>> shape = ModelShape(num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, intermediate_size=4864)
    >>> f"{shape.prefill_flops(1000):.3g} for 1000 tokens, {shape.prefill_flops(2000):.3g} for 2000"
    '7.59e+11 for 1000 tokens, 1.6e+12 for 2000'
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int | None = None  # hidden_size / num_heads
    num_experts_per_token: int = 1

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"):
            whole(name, getattr(self, name), least=1)
        whole("num_experts_per_token", self.num_experts_per_token, least=1)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape in a Hugging Face config, an object or the dict of its JSON file."""
        get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        if missing := [name for name in names if get(name) is None]:
            raise ValueError(f"the config has no {', '.join(missing)}: give a ModelShape")
        layers, hidden, heads, inner = map(get, names)
        return cls(
            layers, hidden, heads, get("num_key_value_heads") or heads, get("moe_intermediate_size") or inner,
            get("head_dim"), get("num_experts_per_tok") or 1,
        )  # fmt: skip

    @property
    def params_per_token(self) -> int:
        """Weights that each token is multiplied with, embedding and head excluded."""
        assert self.head_dim is not None
        attention = self.head_dim * self.hidden_size * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (
            attention + 3 * self.hidden_size * self.intermediate_size * self.num_experts_per_token
        )

    def prefill_flops(self, num_tokens: Number) -> Number:
        """Operations to prefill the first `num_tokens` tokens of a prompt, without logits: two for each weight, and
        four for each entry of a head and each token that attention looks back at."""
        assert self.head_dim is not None
        looked_at = num_tokens * (num_tokens + 1) / 2
        return (
            2.0 * self.params_per_token * num_tokens
            + 4.0 * self.num_layers * self.num_heads * self.head_dim * looked_at
        )
