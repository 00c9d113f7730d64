"""Which experts a token goes through, and with which weights, of the scores that a router gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-20  # added to a sum of weights before it divides them, as models with sigmoids were trained
LIKE_DEEPSEEK = {"axk1", "deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "sarvam_mla"}
SIGMOID = {*LIKE_DEEPSEEK, "minimax_m2"}
ALWAYS = {"minimax_m2", "mixtral"}  # weights add up to 1, without a word in the config
OF_TWO = {*LIKE_DEEPSEEK, "mistral4"}  # a group counts by the sum of its two best experts


@dataclass(frozen=True)
class Routing:
    """How a model chooses."""

    per_token: int
    normalizes: bool  # the weights of a token add up to 1, before `factor`
    sigmoid: bool = False  # else softmax over all experts
    groups: int = 1  # of experts; a token's experts are of few groups
    groups_per_token: int = 1
    counted: int = 1  # so many of a group's best experts say how good it is
    factor: float = 1.0
    wide: bool = False  # the router is float32, whatever the model is

    @classmethod
    def of(cls, config: Any) -> Routing:
        kind = config.model_type
        limited = kind in OF_TWO or getattr(config, "topk_method", None) == "group_limited_greedy"
        return cls(
            per_token=getattr(config, "num_experts_per_tok", None) or 0,
            normalizes=kind in ALWAYS or (kind != "deepseek_v2" and bool(getattr(config, "norm_topk_prob", False))),
            sigmoid=kind in SIGMOID,
            groups=(getattr(config, "n_group", None) or 1) if limited else 1,
            groups_per_token=(getattr(config, "topk_group", None) or 1) if limited else 1,
            counted=2 if kind in OF_TWO else 1,
            factor=getattr(config, "routed_scaling_factor", None) or 1.0,
            wide=kind in LIKE_DEEPSEEK or kind == "deepseek_v2",
        )

    def choose(
        self, scores: Tensor, bias: Tensor | None = None, given: Tensor | None = None, by_row: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(weights, experts) [tokens, chosen], the best one first. `bias` [experts] takes part in the choice only;
        `given` [tokens, chosen] are experts in place of the chosen ones, where they are not negative. `by_row`: no
        row's bits depend on others, as torch treats the last few of a tensor's elements in another way."""
        chances = scores.float() if self.sigmoid else scores.float().softmax(-1)
        if self.sigmoid:
            chances = torch.stack([row.sigmoid() for row in chances]) if by_row and len(scores) else chances.sigmoid()
        wanted = chances if bias is None else chances + bias
        if self.groups > self.groups_per_token:
            wanted = self._limited(wanted)
        expert = wanted.topk(self.per_token, -1).indices
        if given is not None:
            expert = torch.where(given >= 0, given, expert)
        share = chances.gather(-1, expert)
        if self.normalizes:
            share = share / (share.sum(-1, keepdim=True) + LEAST)
        return (share if self.factor == 1.0 else share * self.factor), expert

    def _limited(self, wanted: Tensor) -> Tensor:
        """Without the experts of all but the best groups."""
        by_group = wanted.unflatten(-1, (self.groups, -1))
        best = by_group.topk(self.counted, -1).values.sum(-1).topk(self.groups_per_token, -1).indices
        out = torch.ones(by_group.shape[:-1], dtype=torch.bool, device=wanted.device).scatter(-1, best, False)
        return by_group.masked_fill(out[..., None], float("-inf")).flatten(-2)
