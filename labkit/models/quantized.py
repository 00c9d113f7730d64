"""Quantized checkpoints for models that run by transformers' own code: their linear layers become labkit's, which stay
quantized in memory. Experts, whose weights transformers stacks, are dequantised when they are loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from labkit.loading.checkpoint import Source
from labkit.loading.format import Linear, Units
from labkit.loading.formats import format_of
from labkit.loading.mxfp4 import MXFP4, stacks
from labkit.loading.stored import Stored
from labkit.loading.weights import Weights
from labkit.models import hf

OF_EXPERTS = ".experts."
CPU = torch.device("cpu")


def empty(config: Any, trust_remote_code: bool) -> nn.Module:
    """A dense model of this config without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = hf.AutoModelForCausalLM.from_config(_plain(config), trust_remote_code=trust_remote_code)
    return model


def _plain(config: Any) -> Any:
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def load_quantized(
    like: nn.Module, config: Any, source: Source, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, dict[str, Linear]]:
    """A model of the class of `like` with its dense weights, and by name the quantized layers that stand in for its
    linear ones, which have no weights."""
    weights = Weights(source, dtype, device, format_of(config))
    weights.check()
    assert isinstance(weights.format, Stored)
    kind: Any = type(like)
    layers = weights.format.layers(weights)
    module_of = {name: _module_of(like, name, repr(source)) for name in layers if OF_EXPERTS not in name}
    state: dict[str, Tensor] = {}
    for name in module_of:
        outputs, inputs = weights.format.stored_shape(weights, name)
        state[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(outputs, inputs)
    if isinstance(weights.format, MXFP4):
        state |= {stack: _transposed(weights, stack) for stack in stacks(weights)}
    else:
        state |= {f"{name}.weight": _layer(weights, name).dense(dtype).cpu() for name in layers if OF_EXPERTS in name}
    swapped = {name: _layer(weights, name) for name in module_of}
    state |= {f"{name}.bias": layer.bias.cpu() for name, layer in swapped.items() if layer.bias is not None}
    state |= {name: source.read(name, None, CPU) for name in source.shapes if name not in weights.taken}
    try:
        model, report = kind.from_pretrained(
            None, config=_plain(config), state_dict=state, dtype=dtype, device_map=None, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"{source!r}: its tensors do not fit into {kind.__name__}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source!r} lacks {len(missing)} tensors of {kind.__name__}, {missing[0]!r} first")
    if extra := sorted(report["unexpected_keys"]):
        raise ValueError(f"{source!r}: {len(extra)} tensors have no place in {kind.__name__}, {extra[0]!r} first")
    for name in module_of.values():
        module = model.get_submodule(name)
        module.weight = module.bias = None  # a zero of the weight's shape would become a whole tensor on a device
    return model, {module_of[name]: layer for name, layer in swapped.items()}


def _module_of(like: nn.Module, name: str, where: str) -> str:
    """The name of the module that a stored layer is; checkpoints may leave out the name of the model within."""
    modules = dict(like.named_modules())
    for full in (name, f"{getattr(like, 'base_model_prefix', '')}.{name}"):
        if type(modules.get(full)) is nn.Linear:
            return full
    found = f"is a {type(modules[name]).__name__}" if name in modules else "does not exist"
    raise ValueError(
        f"{where}: the quantized layer {name!r} {found} in {type(like).__name__}: only layers that are a Linear there "
        f"can stay quantized"
    )


def _layer(weights: Weights, name: str) -> Linear:
    shape = weights.format.shape(weights, name)
    assert shape is not None
    return weights.linear({name: (Units(shape[0]),)}, Units(shape[1]))


def _transposed(weights: Weights, stack: str) -> Tensor:
    """[experts, inputs, outputs]: so transformers keeps the experts of models that have MXFP4 checkpoints."""
    owner, _, part = stack.rpartition(".")
    num = weights.size(f"{stack}_blocks")[0]
    return torch.stack([_layer(weights, f"{owner}.{i}.{part}").dense(weights.dtype).T.cpu() for i in range(num)])
