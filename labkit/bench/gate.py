"""The quality gate: compares labkit's next-token distributions with transformers'. If it fails, no speed is
reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MOST_KL = 1e-2  # nats a token, transformers to labkit, teacher-forced
LEAST_AGREEMENT = 0.95  # of greedy tokens, where transformers sees one clearly ahead


@dataclass(frozen=True)
class Gate:
    """How far labkit's next-token distributions are from transformers', on the same tokens and weights."""

    kl: float
    agreement: float
    num_tokens: int
    config: Any  # of the model
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None

    @property
    def ok(self) -> bool:
        return self.kl <= MOST_KL and self.agreement >= LEAST_AGREEMENT

    def __repr__(self) -> str:
        verdict = "passed" if self.ok else f"FAILED (at most {MOST_KL:g} and at least {LEAST_AGREEMENT:.0%})"
        return f"Gate({verdict}: KL {self.kl:.1e}, greedy {self.agreement:.1%} over {self.num_tokens} tokens)"


def check(
    model: str, dtype: str = "bfloat16", device: str = "cpu", *, kv_cache_dtype: str = "auto", num_prompts: int = 3,
    length: int = 96, seed: int = 0,
) -> Gate:  # fmt: skip
    """Loads the model twice and compares. Takes a second or two per gigabyte."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from labkit.models import load_model
    from labkit.runner.memory import kv_dtype

    disable_progress_bar()
    ours = load_model(model, dtype=dtype, device=torch.device(device))
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=ours.dtype).to(device).eval()
    rng = np.random.default_rng(seed)
    kl, agreed, clear = [], 0, 0
    with torch.inference_mode():
        for _ in range(num_prompts):
            ids = torch.from_numpy(rng.integers(10, min(ours.vocab_size, 15_000), length)).to(device)
            p = theirs(ids[None]).logits[0].float().log_softmax(-1)
            q = teacher_forced(ours, ids, kv_cache_dtype=kv_cache_dtype).log_softmax(-1)
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            top = p.topk(2, dim=-1)
            ahead = top.values[:, 0] - top.values[:, 1] > 0.02  # a difference below rounding is a tie
            agreed += int((q.argmax(-1) == top.indices[:, 0])[ahead].sum())
            clear += int(ahead.sum())
    kept = kv_dtype(ours, kv_cache_dtype)
    return Gate(float(np.mean(kl)), agreed / max(1, clear), num_prompts * length, ours.config, ours.dtype, kept)


def teacher_forced(model: Any, ids: torch.Tensor, block_size: int = 16, kv_cache_dtype: str = "auto") -> torch.Tensor:
    """Every position's logits [tokens, vocabulary], float32, of one prompt in one step."""
    from labkit.models.base import Batch
    from labkit.runner.groups import one_group
    from labkit.runner.memory import kv_dtype, make_caches

    num = len(ids)
    blocks = -(-num // block_size)
    kept = kv_dtype(model, kv_cache_dtype)
    caches = make_caches(model, one_group(model.kv), kept, blocks + 1, block_size, model.device)
    at = torch.arange(num, device=model.device)
    batch = Batch(
        token_ids=ids.to(model.device),
        positions=at,
        slots=at + block_size,
        block_table=torch.arange(1, blocks + 1, dtype=torch.int32, device=model.device)[None],
        query_start=torch.tensor([0, num], dtype=torch.int32, device=model.device),
        seq_len=torch.tensor([num], dtype=torch.int32, device=model.device),
        max_query_len=num,
        max_seq_len=num,
    )
    with torch.inference_mode():
        return model.logits(model.forward(batch, caches))
