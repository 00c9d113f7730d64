"""The device to measure, and the models whose shapes are served on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "quick": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
HEADS = {"qwen3": (16, 8, 128), "llama-8b": (32, 8, 128), "qwen2.5": (14, 2, 64)}  # query heads, key heads, size


@dataclass(frozen=True)
class Where:
    """The device, and whether this is only a quick run that shows everything works."""

    device: str
    quick: bool

    def shape(self, name: str) -> str:
        return "quick" if self.quick else name

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.quick else torch.bfloat16

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def make_config(name: str) -> Any:
    from transformers import AutoConfig

    fields = dict(SHAPES[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
