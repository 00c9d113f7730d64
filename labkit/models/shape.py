"""What of a Hugging Face config the native decoder's layers need, under one name each. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit.models.latent import Latent
from labkit.models.routing import Routing


@dataclass(frozen=True)
class Shape:
    """The sizes and factors of a config; families name them differently."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    activation: str
    scale: float  # of attention scores
    softcap: float
    logit_softcap: float
    embed_scale: float
    scales_inputs: bool  # also embeddings that a caller gives; else only what is looked up
    residual_scale: float
    logit_divisor: float
    norm_offset: float  # gemma scales by 1 + w
    windows: tuple[int, ...]  # by layer; 0: sees everything
    layer_types: tuple[str, ...]
    ropes: tuple[bool, ...]
    routing: Routing
    latent: Latent | None  # then `head_size` is what rope tables are made for

    @classmethod
    def of(cls, config: Any) -> Shape:
        def get(*names: str, default: Any = None) -> Any:
            """The first of these that the config sets."""
            return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

        layers, heads = config.num_hidden_layers, config.num_attention_heads
        head_size = get("head_dim", default=config.hidden_size // heads)
        gemma, minicpm = config.model_type.startswith("gemma"), config.model_type == "minicpm3"
        scale, latent = get("attention_multiplier"), Latent.of(config)
        if latent is not None:
            scale = latent.scale(config)
        elif scale is None:
            scale = get("query_pre_attn_scalar", default=head_size) ** -0.5
        types = tuple(get("layer_types", default=["sliding_attention"] * layers))
        window = get("sliding_window", default=0) if get("use_sliding_window", default=True) else 0
        return cls(
            hidden_size=config.hidden_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", default=heads) if latent is None else 1,
            head_size=head_size,
            eps=get("rms_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_eps", default=1e-6),
            activation=get("hidden_activation", "hidden_act", default="silu") if gemma else config.hidden_act,
            scale=scale,
            softcap=get("attn_logit_softcapping", default=0.0),
            logit_softcap=get("final_logit_softcapping", default=0.0),
            embed_scale=config.hidden_size**0.5 if gemma else get("embedding_multiplier", "scale_emb", default=1.0),
            scales_inputs=not (gemma or minicpm),
            residual_scale=config.scale_depth / layers**0.5 if minicpm else get("residual_multiplier", default=1.0),
            logit_divisor=get("logits_scaling", default=1.0),
            norm_offset=1.0 if gemma or config.model_type == "nemotron" else 0.0,
            windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
            layer_types=types,
            ropes=_ropes(config, types, window),
            routing=Routing.of(config),
            latent=latent,
        )


def _ropes(config: Any, types: tuple[str, ...], window: int) -> tuple[bool, ...]:
    """By layer: whether its queries and keys are rotated."""
    if config.model_type in ("exaone4", "exaone_moe") and window:
        return tuple(kind == "sliding_attention" for kind in types)
    return tuple(bool(use) for use in getattr(config, "no_rope_layers", None) or [1] * len(types))
