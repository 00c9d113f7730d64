"""Checkpoints that see, and that are served without their tower. Knows names."""

from __future__ import annotations

TEXT_ALONE = ("qwen3_5", "qwen3_5_moe")  # transformers has a causal model for their language model alone
