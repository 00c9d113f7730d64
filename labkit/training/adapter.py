"""Trains a LoRA adapter on texts, and writes it as PEFT does. Uses transformers' model, not the engine."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.assets import path as embedded
from labkit.core.options import real, whole
from labkit.core.shown import Shown
from labkit.models import hf
from labkit.text.tokenizer import Tokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainedAdapter(Shown):
    """Where an adapter was written, and how its loss fell, in nats per token."""

    path: Path
    losses: tuple[float, ...]
    seconds: float
    num_parameters: int

    def __repr__(self) -> str:
        first, last = self.losses[0], sum(self.losses[-5:]) / len(self.losses[-5:])
        return (
            f"TrainedAdapter({self.path}: {self.num_parameters:,} parameters, {len(self.losses)} steps in "
            f"{self.seconds:.0f} s, loss {first:.2f} -> {last:.2f})"
        )


class _Trained(nn.Module):
    """A linear layer and a trainable product beside it. `b` begins with zeros, so that training starts at the base."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + F.linear(F.linear(x, self.a), self.b) * self.scale


def train_adapter(
    texts: Iterable[str | tuple[str, str]],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = (*ATTENTION, *MLP),
    steps: int = 60,
    batch: int = 8,
    length: int = 96,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> TrainedAdapter:
    """Train a LoRA adapter on `texts` and write it to the folder `out`, in the files that PEFT writes.

    A text is a string, of which every token is learned, or a pair of a prompt and its continuation, of which the
    continuation is. Both end with the model's end token. `model` is a folder in Hugging Face format; None is the
    embedded model. `targets` are the linear layers that get an adapter; `alpha` is twice the rank unless given.
    Texts longer than `length` tokens are cut. It is meant for small models and a notebook cell: float32, one process.

    >>> import labkit as lk
    >>> trained = lk.train_adapter(["SELECT name FROM users;"] * 8, "/tmp/labkit-sql-adapter", steps=2)
    >>> len(trained.losses)
    2
    """
    for name, value in {"rank": rank, "steps": steps, "batch": batch, "length": length}.items():
        whole(name, value, least=1)
    real("learning_rate", learning_rate, least=0.0, open_left=True)
    alpha = 2.0 * rank if alpha is None else real("alpha", alpha, least=0.0, open_left=True)
    folder = Path(embedded("tiny") if model is None else model)
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _load(folder)
        trained = _put_beside(net, targets, rank, alpha / rank)
        ids, learned = _examples(texts, Tokenizer.load(folder), length, net.config.eos_token_id)
        with torch.inference_mode(False), torch.enable_grad():
            losses = _fit(net, trained, ids, learned, steps, batch, learning_rate)
    out = Path(out)
    _write(out, trained, folder, rank, alpha, targets)
    number = sum(layer.a.numel() + layer.b.numel() for layer in trained.values())
    return TrainedAdapter(out, tuple(losses), time.perf_counter() - begin, number)


def _load(folder: Path) -> Any:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()


def _put_beside(net: nn.Module, targets: Sequence[str], rank: int, scale: float) -> dict[str, _Trained]:
    """Freezes the model and replaces its target layers; the new ones by name."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    found = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets
    }
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    if missing:
        there = sorted({n.rpartition(".")[2] for n, layer in net.named_modules() if isinstance(layer, nn.Linear)})
        raise ValueError(
            f"targets: this model has no linear layer {', '.join(sorted(missing))}; it has {', '.join(there)}"
        )
    trained = {}
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        trained[name] = _Trained(layer, rank, scale)
        setattr(net.get_submodule(parent), last, trained[name])
    return trained


def _examples(
    texts: Iterable[str | tuple[str, str]], tokenizer: Tokenizer, length: int, end: int | list[int] | None
) -> tuple[Tensor, Tensor]:
    """Token ids [texts, length], and which of them are to be learned."""
    last = [] if end is None else [end] if isinstance(end, int) else list(end[:1])
    rows = []
    for text in texts:
        prompt, rest = ("", text) if isinstance(text, str) else text
        if not rest:
            continue
        asked = tokenizer.encode(prompt) if prompt else []
        ids = [*asked, *tokenizer.encode(rest), *last][: length + 1]
        if len(ids) > max(1, len(asked)):
            rows.append((ids, len(asked)))
    if not rows:
        raise ValueError("texts: there is nothing to learn; give strings, or pairs of a prompt and its continuation")
    width = max(len(ids) for ids, _ in rows)
    ids, learned = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (tokens, asked_for) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        learned[row, max(1, asked_for) : len(tokens)] = True
    return ids, learned


def _fit(
    net: Any, trained: dict[str, _Trained], ids: Tensor, learned: Tensor, steps: int, batch: int, rate: float
) -> list[float]:
    parameters = [p for layer in trained.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses, order = [], torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat((order, torch.randperm(len(ids))))
        chosen, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:  # a short warm-up, then down to a tenth
            group["lr"] = rate * min((step + 1) / max(1, steps // 10), 1 - 0.9 * step / steps)
        wanted = learned[chosen]
        width = int(wanted.any(0).nonzero().max()) + 1
        logits = net(input_ids=ids[chosen, : width - 1], use_cache=False).logits
        target = ids[chosen, 1:width].masked_fill(~wanted[:, 1:width], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _write(
    out: Path, trained: dict[str, _Trained], base: Path, rank: int, alpha: float, targets: Sequence[str]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in trained.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b.detach().contiguous()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": list(targets), "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "inference_mode": True,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
