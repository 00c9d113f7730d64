"""Adapters for tests, in PEFT's files and merged by PEFT's formulas. Uses torch and safetensors only, so that tests of
the reader do not depend on the reader."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def layers(model, kinds=None):
    """Linear modules by name, experts left out; `kinds` are the last parts of their names."""
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and "experts" not in name and (kinds is None or name.rpartition(".")[2] in kinds):
            yield name, module


def dense(module) -> torch.Tensor:
    """[outputs, inputs]."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def save(model, folder: Path, *, rank: int, seed: int = 0, kinds=None, alpha: float | None = None, ranks=None,
         embedding: str | None = None, added_bias: bool = False, bias: bool = False, dora: bool = False,
         size: float = 1.0, **config) -> Path:  # fmt: skip
    """A random adapter. `ranks` are ranks of modules whose name ends in a pattern."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in layers(model, kinds):
        out, inner = dense(module).shape
        r = next((r for key, r in (ranks or {}).items() if re.match(rf"(.*\.)?({key})$", name)), rank)
        at = f"{PREFIX}{name}."
        tensors[f"{at}lora_A.weight"] = torch.randn(r, inner, generator=generator) / inner**0.5
        tensors[f"{at}lora_B.weight"] = size * torch.randn(out, r, generator=generator) / r**0.5
        if dora:
            tensors[f"{at}lora_magnitude_vector"] = 0.5 + torch.rand(out, generator=generator)
        if added_bias:
            tensors[f"{at}lora_B.bias"] = torch.randn(out, generator=generator)
        if bias and module.bias is not None:
            tensors[f"{at}base_layer.bias"] = torch.randn(out, generator=generator)
    if embedding is not None:
        rows, width = model.get_submodule(embedding).weight.shape
        tensors[f"{PREFIX}{embedding}.lora_embedding_A"] = torch.randn(rank, rows, generator=generator)
        tensors[f"{PREFIX}{embedding}.lora_embedding_B"] = torch.randn(width, rank, generator=generator) / rank**0.5
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name.removeprefix(PREFIX).split(".lora_")[0].rpartition(".")[2] for name in tensors})
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha or rank, "target_modules": names,
        "bias": "all" if bias else "none", "use_dora": dora, "use_rslora": False, "modules_to_save": None,
        "rank_pattern": ranks or {}, "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": added_bias,
        "layer_replication": None, "base_model_name_or_path": "base", "inference_mode": True, "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(model, folder: Path):
    """A copy of the model with the adapter in its weights, as PEFT merges it."""
    model = copy.deepcopy(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, what = full.removeprefix(PREFIX).partition(".lora_")
        if not what:
            name, what = name.removesuffix(".base_layer.bias"), "own bias"
        parts.setdefault(name, {})[what] = tensor

    def of(pattern, name, default):
        return next((x for key, x in config[pattern].items() if re.match(rf"(.*\.)?({key})$", name)), default)

    with torch.no_grad():
        for name, part in parts.items():
            module = model.get_submodule(name)
            r, alpha = of("rank_pattern", name, config["r"]), of("alpha_pattern", name, config["lora_alpha"])
            scale = alpha / (r**0.5 if config["use_rslora"] else r)
            if "embedding_A" in part:
                module.weight = torch.nn.Parameter(
                    module.weight + scale * (part["embedding_B"] @ part["embedding_A"]).T
                )
                continue
            weight = dense(module) + scale * part["B.weight"] @ part["A.weight"]
            if "magnitude_vector" in part:
                weight = weight * (part["magnitude_vector"] / weight.norm(dim=1))[:, None]
            module.weight = torch.nn.Parameter(weight.T if type(module).__name__ == "Conv1D" else weight)
            if "own bias" in part:
                module.bias = torch.nn.Parameter(part["own bias"])
            if "B.bias" in part:
                own = 0 if module.bias is None else module.bias
                module.bias = torch.nn.Parameter(own + scale * part["B.bias"])
    return model


def assert_greedy(model, request, slack: float = 2e-4) -> None:
    """Each token of the answer is a best one of `model`; two logits may be as near as rounding can move them."""
    ids = torch.tensor([[*request.prompt.tolist(), *request.output_ids]])
    with torch.inference_mode():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(request.prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(request.prompt) :, None])[:, 0]
    behind = (logits.max(-1).values - chosen) / logits.abs().max(-1).values
    assert float(behind.max()) <= slack, f"{request!r}: {behind.tolist()}"
