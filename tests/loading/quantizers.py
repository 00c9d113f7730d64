"""Checkpoints as the published packers lay them out: written value by value, from the description of each format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column nibble i of a word holds


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Each column's values as one stream of bits in int32 words: [n, columns] -> [n * bits / 32, columns]."""
    n, columns = values.shape
    words = np.zeros((n * bits // 32, columns), np.uint32)
    for column in range(columns):
        number = sum(int(value) << i * bits for i, value in enumerate(values[:, column]))
        for word in range(len(words)):
            words[word, column] = number >> 32 * word & 0xFFFFFFFF
    return words.view(np.int32)


def round_to_groups(weight, bits: int, group_of: np.ndarray, symmetric: bool):
    """(values [K, N], scales [G, N] float16, zeros [G, N]) nearest to `weight` [N, K]."""
    w, groups = weight.float().numpy().T, int(group_of.max()) + 1
    most = 2**bits - 1
    scales, zeros = np.zeros((groups, w.shape[1]), np.float16), np.zeros((groups, w.shape[1]), np.int64)
    values = np.zeros(w.shape, np.int64)
    for g in range(groups):
        rows = w[group_of == g]
        if symmetric:
            scale, zero = 2 * np.abs(rows).max(0) / most, np.full(w.shape[1], 2 ** (bits - 1))
        else:
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            scale = (high - low) / most
            zero = np.clip(np.round(-low / np.maximum(scale, 1e-8)), 1, most)  # a zero of 0 cannot be stored minus one
        scales[g] = np.maximum(scale, 1e-4)
        zeros[g] = zero
        values[group_of == g] = np.clip(np.round(rows / scales[g].astype(np.float32)) + zero, 0, most)
    return values, scales, zeros


def dense(values, scales, zeros, group_of) -> torch.Tensor:
    """The weight [N, K] in float32."""
    wide = scales.astype(np.float32)[group_of] * (values - zeros[group_of]).astype(np.float32)
    return torch.tensor(wide.T.copy())


def gptq(weight, *, bits=4, group=8, act_order=False, symmetric=False, v2=False, rng=None):
    """(tensors by suffix, the weight that they stand for)."""
    inputs = weight.shape[1]
    group_of = np.arange(inputs) // (inputs if group == -1 else group)
    if act_order:
        group_of = rng.permutation(group_of)
    values, scales, zeros = round_to_groups(weight, bits, group_of, symmetric)
    tensors = {
        "qweight": torch.tensor(stream(values, bits)),
        "qzeros": torch.tensor(stream((zeros - (0 if v2 else 1)).T, bits).T.copy()),
        "scales": torch.tensor(scales),
        "g_idx": torch.tensor(group_of.astype(np.int32)),
    }
    return tensors, dense(values, scales, zeros, group_of)


def awq(weight, *, group=8, zero_point=True):
    inputs, outputs = weight.shape[1], weight.shape[0]
    group_of = np.arange(inputs) // group
    values, scales, zeros = round_to_groups(weight, 4, group_of, not zero_point)

    def words(table):
        found = np.zeros((len(table), outputs // 8), np.uint32)
        for i, column in enumerate(AWQ_ORDER):
            found |= table[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return torch.tensor(found.view(np.int32))

    tensors = {"qweight": words(values), "scales": torch.tensor(scales)}
    if zero_point:
        tensors["qzeros"] = words(zeros)
    return tensors, dense(values, scales, zeros, group_of)


def rewrite(folder: Path, model, quantize, config: dict, skip: tuple[str, ...] = ()) -> None:
    """Quantize the linear layers of a saved model in place, and set `model`'s weights to what they stand for."""
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head" or name.endswith(skip):
            continue
        made, weight = quantize(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in made.items()}
        module.weight.data = weight
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
