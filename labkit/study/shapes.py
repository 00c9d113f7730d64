"""Models as a simulation sees them: how many weights, and how many bytes of keys and values. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from labkit.core.options import choose, whole

Number = TypeVar("Number", float, "np.ndarray[Any, Any]")

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.53}  # int4: with scales


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: what is cached of a token is one vector of `rank`, of which all heads' keys and
    values are products, and one part of a key that turns with its position."""

    rank: int
    rotated: int
    plain: int  # of a head's query and key, what does not turn
    value_size: int
    query_rank: int | None = None

    @property
    def key_size(self) -> int:
        return self.rank + self.rotated

    @property
    def head_size(self) -> int:
        return self.plain + self.rotated

    def weights(self, hidden: int, heads: int) -> int:
        """Of one layer's attention."""
        queries = heads * self.head_size
        queries *= hidden if self.query_rank is None else self.query_rank
        queries += hidden * (self.query_rank or 0)
        pairs = heads * self.rank * (self.plain + self.value_size)
        return queries + hidden * self.key_size + pairs + heads * self.value_size * hidden


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder. `dtype` is that of its weights, `kv_dtype` of its keys and values.

    >>> ModelShape.of("llama-3.1-8b")
    ModelShape(llama-3.1-8b: 8.03B parameters, bfloat16, 128 KiB of keys and values a token)
    >>> ModelShape.of("llama-3.1-8b", dtype="fp8", kv_dtype="fp8").kv_bytes
    65536
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int  # of one expert, if there are experts
    vocab_size: int = 0  # 0: unknown, and there is no head to compute
    head_size: int = 0  # 0: hidden_size / num_heads
    name: str = "model"
    tied: bool = True  # embedding and head are one matrix
    gated: bool = True  # gate and up beside down
    num_experts: int = 0  # 0: one MLP for all tokens
    num_experts_per_tok: int = 0
    num_shared_experts: int = 0
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    max_model_len: int | None = None
    latent: Latent | None = None  # of models whose heads share one

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            whole(name, getattr(self, name), least=1)
        whole("vocab_size", self.vocab_size, least=0)
        if not whole("head_size", self.head_size, least=0):
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)
        choose("dtype", self.dtype, BYTES)
        choose("kv_dtype", self.kv_dtype, BYTES)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly")
        if bool(self.num_experts) != bool(self.num_experts_per_tok):
            raise ValueError("num_experts and num_experts_per_tok go together")

    def __repr__(self) -> str:
        experts = f" ({_billions(self.num_active)} active)" if self.num_experts else ""
        kv = "" if self.kv_dtype == "bfloat16" else f" in {self.kv_dtype}"
        return (
            f"ModelShape({self.name}: {_billions(self.num_parameters)} parameters{experts}, {self.dtype}, "
            f"{self.kv_bytes / 1024:,.4g} KiB of keys and values a token{kv})"
        )

    @classmethod
    def of(cls, model: Any, **changes: Any) -> ModelShape:
        """From a name of `SHAPES`, a Hugging Face config (object or dict), or a folder with a config.json."""
        if isinstance(model, ModelShape):
            found = model
        elif isinstance(model, Mapping) or hasattr(model, "hidden_size"):
            found = _from_config(model)
        elif isinstance(model, (str, Path)) and (Path(model) / "config.json").is_file():
            found = _from_config(
                json.loads((Path(model) / "config.json").read_text(encoding="utf-8")), Path(model).name
            )
        elif isinstance(model, str):
            found = choose("model", model, SHAPES)
        else:
            raise TypeError(f"a model is one of {', '.join(SHAPES)}, a config or a folder, got {model!r}")
        return replace(found, **changes) if changes else found

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def attention_weights(self) -> int:
        """Of one layer: query, key, value and output."""
        if self.latent is not None:
            return self.latent.weights(self.hidden_size, self.num_heads)
        return self.hidden_size * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Of one layer's MLP, or of one expert."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def num_mlps(self) -> int:
        """MLPs that a token passes in a layer."""
        return self.num_experts_per_tok + self.num_shared_experts if self.num_experts else 1

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        mlps = self.num_experts + self.num_shared_experts or 1
        router = self.hidden_size * self.num_experts
        layers = self.num_layers * (self.attention_weights + mlps * self.mlp_weights + router)
        return layers + self.head_weights * (1 if self.tied else 2)

    @property
    def num_active(self) -> int:
        """Parameters that one token is multiplied with, and its embedding."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_parameters - self.num_layers * idle * self.mlp_weights

    @property
    def params_per_token(self) -> int:
        """Weights that each token is multiplied with, embedding and head excluded."""
        return self.num_layers * (self.attention_weights + self.num_mlps * self.mlp_weights)

    def prefill_flops(self, num_tokens: Number) -> Number:
        """Operations to prefill the first `num_tokens` tokens of a prompt, without logits: two for each weight, and
        four for each entry of a head and each token that attention looks back at.

        >>> shape = ModelShape.of("qwen2.5-0.5b")
        >>> f"{shape.prefill_flops(1000):.3g} for 1000 tokens, {shape.prefill_flops(2000):.3g} for 2000"
        '7.59e+11 for 1000 tokens, 1.6e+12 for 2000'
        """
        looked_at = num_tokens * (num_tokens + 1) / 2
        sizes = 2 * self.head_size if self.latent is None else self.latent.head_size + self.latent.value_size
        attended = 2.0 * self.num_layers * self.num_heads * sizes * looked_at
        flops: Number = 2.0 * self.params_per_token * num_tokens + attended
        return flops

    @property
    def weight_bytes(self) -> float:
        """Of all weights. Embedding and head stay in 16 bits where layers have fewer."""
        ends = self.head_weights * (1 if self.tied else 2)
        return (self.num_parameters - ends) * BYTES[self.dtype] + ends * max(BYTES[self.dtype], 2.0)

    @property
    def kv_bytes(self) -> int:
        """Of keys and values: a token, all layers."""
        return int(self.num_layers * self.num_kept * BYTES[self.kv_dtype])

    @property
    def num_kept(self) -> int:
        """Numbers that a layer keeps of a token."""
        return 2 * self.num_kv_heads * self.head_size if self.latent is None else self.latent.key_size


def _billions(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _from_config(config: Any, name: str | None = None) -> ModelShape:
    fields = config if isinstance(config, Mapping) else _Attributes(config)
    text = fields.get("text_config")  # of models that also see images
    if text is not None and fields.get("hidden_size") is None:
        fields = text if isinstance(text, Mapping) else _Attributes(text)

    def get(*names: str, default: Any = None) -> Any:
        return next((value for name in names if (value := fields.get(name)) is not None), default)

    wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    missing = [field for field in wanted if get(field) is None]
    if get("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "n_inner") is None:
        missing.append("intermediate_size")
    if missing:
        raise ValueError(f"the config has no {', '.join(missing)}: give a ModelShape")
    experts = get("num_local_experts", "num_experts", "n_routed_experts", default=0)
    inner = get("moe_intermediate_size") if experts else None
    inner = inner or get("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "n_inner")
    heads, kind = get("num_attention_heads"), get("model_type", default="model")
    return ModelShape(
        name=name or kind,
        hidden_size=get("hidden_size"),
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", default=heads),
        head_size=get("head_dim", default=0),
        intermediate_size=inner,
        vocab_size=get("vocab_size", default=0),
        tied=bool(get("tie_word_embeddings", default=True)),
        gated=kind not in ("gpt2", "opt", "starcoder2", "gpt_neox", "gpt_bigcode", "bloom", "falcon"),
        num_experts=experts,
        num_experts_per_tok=get("num_experts_per_tok", default=1) if experts else 0,
        num_shared_experts=get("n_shared_experts", default=0) if experts else 0,
        max_model_len=get("max_position_embeddings"),
        latent=None if get("kv_lora_rank") is None else Latent(
            get("kv_lora_rank"), get("qk_rope_head_dim"), get("qk_nope_head_dim"),
            get("v_head_dim", default=get("hidden_size") // heads), get("q_lora_rank"),
        ),
    )  # fmt: skip


class _Attributes:
    def __init__(self, config: Any) -> None:
        self.config = config

    def get(self, name: str) -> Any:
        return getattr(self.config, name, None)


# hidden, layers, heads, key heads, MLP, vocabulary, head size
SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(256, 8, 8, 4, 688, 4096, 32, "tiny", max_model_len=2048),
        ModelShape(896, 24, 14, 2, 4864, 151_936, 64, "qwen2.5-0.5b", max_model_len=32_768),
        ModelShape(1024, 28, 16, 8, 3072, 151_936, 128, "qwen3-0.6b", max_model_len=40_960),
        ModelShape(2048, 16, 32, 8, 8192, 128_256, 64, "llama-3.2-1b", max_model_len=131_072),
        ModelShape(1536, 28, 12, 2, 8960, 151_936, 128, "qwen2.5-1.5b", max_model_len=32_768),
        ModelShape(3072, 28, 24, 8, 8192, 128_256, 128, "llama-3.2-3b", max_model_len=131_072),
        ModelShape(2560, 36, 32, 8, 9728, 151_936, 128, "qwen3-4b", max_model_len=40_960),
        ModelShape(4096, 36, 32, 8, 12_288, 151_936, 128, "qwen3-8b", tied=False, max_model_len=40_960),
        ModelShape(4096, 32, 32, 8, 14_336, 128_256, 128, "llama-3.1-8b", tied=False, max_model_len=131_072),
        ModelShape(5120, 40, 40, 8, 17_408, 151_936, 128, "qwen3-14b", tied=False, max_model_len=40_960),
        ModelShape(8192, 80, 64, 8, 28_672, 128_256, 128, "llama-3.1-70b", tied=False, max_model_len=131_072),
        ModelShape(16_384, 126, 128, 8, 53_248, 128_256, 128, "llama-3.1-405b", tied=False, max_model_len=131_072),
        ModelShape(
            4096, 32, 32, 8, 14_336, 32_000, 128, "mixtral-8x7b", tied=False, num_experts=8, num_experts_per_tok=2,
            max_model_len=32_768,
        ),
        ModelShape(
            2048, 48, 32, 4, 768, 151_936, 128, "qwen3-30b-a3b", tied=False, num_experts=128, num_experts_per_tok=8,
            max_model_len=40_960,
        ),
    )
}  # fmt: skip
