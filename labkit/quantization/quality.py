"""How far a quantized model is from the dense one on the same tokens: perplexity, KL divergence, equal first choices.

Of the dense model only the last hidden states are kept; logits, which are much larger, are made a few rows at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.core.params import SamplingParams
from labkit.models.base import Model
from labkit.quantization.stack import last_hidden

ROWS = 512  # of logits at a time


@dataclass(frozen=True)
class Quality:
    perplexity: float
    divergence: float  # KL(dense || this), nats a token
    agreement: float  # share of positions with the dense model's likeliest token
    num_tokens: int  # predicted


class Yardstick:
    """A dense model and what it says of some sequences."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        """`ids` [sequences, length]."""
        if ids.shape[1] < 2:
            raise ValueError(f"sequences of at least 2 tokens are needed, got {ids.shape[1]}")
        self.model, self.ids = model, ids
        self.hidden = last_hidden(model, ids)

    def measure(self, model: Model) -> Quality:
        """Another model of the same vocabulary."""
        hidden = self.hidden if model is self.model else last_hidden(model, self.ids)
        sequences, length = self.ids.shape
        predicts = torch.arange(sequences * length).view(sequences, length)[:, :-1].flatten()
        return compare(self.model, self.hidden[predicts], model, hidden[predicts], self.ids[:, 1:].flatten())


def compare(dense: Model, dense_hidden: Tensor, model: Model, hidden: Tensor, targets: Tensor) -> Quality:
    """Of two models' hidden states at positions with these next tokens."""
    lost = divergence = equal = 0.0
    for begin in range(0, len(targets), ROWS):
        some = slice(begin, begin + ROWS)
        given = dense.logits(dense_hidden[some]).log_softmax(-1)
        found = model.logits(hidden[some]).log_softmax(-1)
        lost += F.nll_loss(found, targets[some].to(found.device), reduction="sum").item()
        divergence += kl(given, found).sum().item()
        equal += (given.argmax(-1) == found.argmax(-1)).sum().item()
    count = len(targets)
    return Quality(math.exp(min(lost / count, 700.0)), divergence / count, equal / count, count)


def kl(given: Tensor, found: Tensor) -> Tensor:
    """KL(given || found) of log-probabilities [rows, vocabulary], by row."""
    return (given.exp() * (given - found)).sum(-1).clamp(min=0)


def decode_speed(engine: Any, rows: int, tokens: int) -> float:
    """Output tokens a second of this many short requests at once."""
    prompts = [{"prompt_token_ids": [2 + i % 50, 7, 11]} for i in range(rows)]
    begin = 0.0
    for most in (2, tokens):  # the first time is not measured
        begin = perf_counter()
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False))
    return rows * tokens / (perf_counter() - begin)
