"""Quantized layers and models as their libraries store them: bitsandbytes, MXFP4, FP8, compressed-tensors; and models
whose experts are stored one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0, 0.0052083334885537624, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25, -0.0, -0.0052083334885537624, -2 / 3,
                    -1, -1 / 3, -0.5, -1 / 6, -0.25])  # fmt: skip


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - table).abs().argmin(-1).to(torch.uint8)


def bitsandbytes4(weight, *, kind="nf4", block=64, nested=False, offset=0.25):
    """(tensors by suffix, the weight that they stand for)."""
    table = NF4 if kind == "nf4" else FP4
    flat = weight.flatten()
    padded = torch.zeros(-(-len(flat) // block) * block)
    padded[: len(flat)] = flat
    absmax = padded.view(-1, block).abs().amax(1).clamp_min(1e-3)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {"weight.absmax": absmax, "weight.quant_map": table}
    if nested:
        steps = torch.linspace(-1, 1, 256)
        largest = torch.stack([part.abs().amax() for part in (absmax - offset).split(256)])
        of = torch.arange(len(absmax)) // 256
        codes = nearest((absmax - offset) / largest[of], steps)
        absmax = steps[codes.int()] * largest[of] + offset
        tensors |= {"weight.absmax": codes, "weight.nested_absmax": largest, "weight.nested_quant_map": steps}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    scale = absmax[torch.arange(len(flat)) // block]
    codes = nearest(flat / scale, table)
    packed = codes[0::2] << 4 | codes[1::2]
    text = json.dumps(state).encode()
    name = f"weight.quant_state.bitsandbytes__{kind}"
    tensors |= {"weight": packed[:, None], name: torch.tensor(list(text), dtype=torch.uint8)}
    return tensors, (table[codes.int()] * scale).view(weight.shape)


def bitsandbytes8(weight):
    largest = weight.abs().amax(1)
    values = (weight * 127 / largest[:, None]).round().to(torch.int8)
    return {"weight": values, "SCB": largest}, values.float() * (largest[:, None] / 127)


def mxfp4_codes(weight):
    """(codes uint8 [..., K], exponents uint8 [..., K / 32], the weight that they stand for)."""
    shaped = weight.unflatten(-1, (-1, 32))
    exponents = (shaped.abs().amax(-1) / 6).log2().ceil().clamp(-126, 127)
    scales = torch.exp2(exponents)
    codes = nearest(shaped / scales[..., None], E2M1)
    return codes.flatten(-2), (exponents + 127).to(torch.uint8), (E2M1[codes.int()] * scales[..., None]).flatten(-2)


def mxfp4(weight):
    codes, exponents, dense = mxfp4_codes(weight)
    return {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": exponents}, dense


def nvfp4(weight):
    overall = 2688 / weight.abs().amax()
    shaped = weight.unflatten(-1, (-1, 16))
    scales = (shaped.abs().amax(-1) / 6 * overall).to(torch.float8_e4m3fn)
    steps = (scales.float() / overall)[..., None]
    codes = nearest(shaped / steps.clamp_min(1e-8), E2M1)
    packed = codes.flatten(-2)[:, 0::2] | codes.flatten(-2)[:, 1::2] << 4
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": overall.reshape(1)}
    return tensors, (E2M1[codes.int()] * steps).flatten(-2)


def fp8(weight, *, block=(16, 16)):
    rows, columns = (-(-size // by) for size, by in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: len(weight), : weight.shape[1]] = weight
    scales = padded.view(rows, block[0], columns, block[1]).abs().amax((1, 3)) / 448 + 1e-9
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: len(weight), : weight.shape[1]]
    values = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scales}, values.float() * wide


def int8(weight, *, zero_point=False):
    """Channels, as compressed-tensors stores them."""
    if not zero_point:
        scales = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scales).round().to(torch.int8)
        return {"weight": values, "weight_scale": scales}, values.float() * scales
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    values = (weight / scales + zeros).round().clamp(-128, 127)
    tensors = {"weight": values.to(torch.int8), "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
    return tensors, (values - zeros) * scales


EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
PLACES = {"gate_proj": (0, "gate_up_proj"), "up_proj": (1, "gate_up_proj"), "w1": (0, "gate_up_proj"),
          "w3": (1, "gate_up_proj"), "down_proj": (None, "down_proj"), "w2": (None, "down_proj")}  # fmt: skip


def quantize_model(folder: Path, model, quantize, config: dict) -> None:
    """Save a model with all its linear layers and experts quantized, routers and the head apart, and set its weights to
    what they stand for."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for full in sorted(tensors):
        name, found = full.removesuffix(".weight"), EXPERT.fullmatch(full)
        if (name not in linears or name.endswith(("lm_head", ".gate", "_gate"))) and found is None:
            continue
        made, weight = quantize(tensors.pop(full))
        tensors |= {f"{name}.{suffix}": tensor.contiguous().clone() for suffix, tensor in made.items()}
        if found is None:
            model.get_submodule(name).weight.data = weight
        else:
            half, part = PLACES[found[3]]
            stack = getattr(model.get_submodule(found[1].replace("block_sparse_moe", "mlp")), part).data[int(found[2])]
            into = stack if half is None else stack.chunk(2)[half]
            into.copy_(weight)
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, config)


def stack_mxfp4(folder: Path, model, config: dict) -> None:
    """Save a model with its experts' stacked weights in MXFP4, in the order [experts, outputs, inputs]."""
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors").items()
    tensors = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in stored if ".experts." not in name}
    turned = model.config.model_type == "gpt_oss"  # its dense weights are [experts, inputs, outputs]
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.ndim == 3:
            weight = parameter.data.mT if turned else parameter.data
            codes, exponents, dense = mxfp4_codes(weight)
            packed = codes[..., 0::2] | codes[..., 1::2] << 4
            tensors |= {f"{name}_blocks": packed.unflatten(-1, (-1, 16)).contiguous(), f"{name}_scales": exponents}
            parameter.data = dense.mT.contiguous() if turned else dense
        elif ".experts." in name:
            tensors[name] = parameter.data.clone()
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, config)


def set_config(folder: Path, config: dict) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))


def gemv(weight, *, group=32, rng=None):
    """AWQ's second layout."""
    from tests.loading.quantizers import dense, round_to_groups, stream

    group_of = np.arange(weight.shape[1]) // group
    values, scales, zeros = round_to_groups(weight, 4, group_of, False)
    words = -(-(-(-len(scales) // 8)) // {128: 1, 64: 2, 32: 4}[group]) * {128: 1, 64: 2, 32: 4}[group]  # noqa: B002
    padded = [np.zeros((8 * words, len(weight)), table.dtype) for table in (scales, zeros)]
    for into, table in zip(padded, (scales, zeros), strict=True):
        into[: len(table)] = table
    tensors = {
        "qweight": torch.tensor(stream(values, 4).T.copy()),
        "scales": torch.tensor(padded[0].T.copy()),
        "qzeros": torch.tensor(stream(padded[1], 4).T.copy()),
    }
    return tensors, dense(values, scales, zeros, group_of)
