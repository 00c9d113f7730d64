"""The sizes of multi-head latent attention (DeepSeek-V2 and what has its layout), as a Hugging Face config states them.
Knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FAMILIES = {"axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "sarvam_mla", "youtu"}


@dataclass(frozen=True)
class Latent:
    """A token's keys and values of all heads are products of one vector, its latent, which is all that is cached."""

    rank: int  # of the latent
    rotated: int  # numbers of a query, and of the one key of all heads, that turn with the position
    plain: int  # numbers of a query and key that do not
    value_size: int
    query_rank: int | None  # queries are products of a vector of this size; None: of the hidden state
    interleaved: bool
    # (beta, length): queries grow with the logarithm of how many times that length lies before them
    growth: tuple[float, int] | None

    @property
    def key_size(self) -> int:
        """What a token and layer store."""
        return self.rank + self.rotated

    @property
    def head_size(self) -> int:
        """Of a query, before it is projected into the space of the latents."""
        return self.plain + self.rotated

    @classmethod
    def of(cls, config: Any) -> Latent | None:
        """None for models with other attention."""
        if config.model_type not in FAMILIES:
            return None
        rope = getattr(config, "rope_parameters", None) or {}
        growth = None
        if config.model_type == "mistral4":
            growth = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        interleaved = config.model_type != "minicpm3" and bool(getattr(config, "rope_interleave", True))
        return cls(
            rank=config.kv_lora_rank,
            rotated=config.qk_rope_head_dim,
            plain=config.qk_nope_head_dim,
            value_size=config.v_head_dim,
            query_rank=config.q_lora_rank,
            interleaved=interleaved,
            growth=growth,
        )

    def scale(self, config: Any) -> float:
        """Of scores. Yarn, which stretches the rotation, asks for sharper ones."""
        rope, scale = getattr(config, "rope_parameters", None) or {}, self.head_size**-0.5
        if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim"):
            return scale
        factor = rope["factor"]
        sharper = 1.0 if factor <= 1 else 0.1 * rope["mscale_all_dim"] * math.log(factor) + 1.0
        return float(scale * sharper**2)
