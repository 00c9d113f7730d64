"""What the metadata and tensor names of a GGUF file mean: a transformers config, and Hugging Face's tensor names.

It refuses what the native decoder would compute in another way than the file says: an unknown architecture, an unknown
key of the architecture, a tensor with no name here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labkit.loading.gguf_blocks import dequantize
from labkit.loading.gguf_header import StoredTensor

Tensors = Mapping[str, StoredTensor]

GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
BOTH_SIDES = {**AFTER, "ffn_norm": "pre_feedforward_layernorm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Family:
    """A GGUF architecture: its model type in transformers and how its tensors differ."""

    kind: str
    names: Mapping[str, str] = field(default_factory=dict)  # beside LAYER
    interleaved: bool = False  # rows of q and k: pairs that are rotated together lie side by side
    norm_offset: int = 0  # stored norms hold w + 1
    windows: bool = False  # may have a sliding window


FAMILIES = {
    "llama": Family("llama", interleaved=True, windows=True),
    "mistral3": Family("mistral", interleaved=True, windows=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2moe": Family("qwen2_moe", EXPERTS),
    "qwen3moe": Family("qwen3_moe", EXPERTS),
    "phi3": Family("phi3", {"ffn_up": "mlp.gate_up_proj"}, windows=True),
    "gemma": Family("gemma", norm_offset=1),
    "gemma2": Family("gemma2", BOTH_SIDES, norm_offset=1, windows=True),
    "gemma3": Family("gemma3_text", BOTH_SIDES, norm_offset=1, windows=True),
    "smollm3": Family("smollm3", interleaved=True),
    "granite": Family("granite", interleaved=True),
    "olmo2": Family("olmo2", AFTER),
    "starcoder2": Family("starcoder2", {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, windows=True),
}
MIXTRAL_FAMILY = Family("mixtral", MIXTRAL, interleaved=True, windows=True)
MISTRAL_FAMILY = Family("mistral", interleaved=True, windows=True)
HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "leading_dense_block_count"}
ONLY: dict[str, tuple[Any, ...]] = {  # keys of which the native decoder knows these values only
    "use_parallel_residual": (False,), "attention.causal": (True,), "expert_gating_func": (1,),
    "expert_weights_scale": (0.0, 1.0), "expert_shared_count": (0, 1), "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "rope.scaling.yarn_attn_factor": (1.0,),
    "attention.max_alibi_bias": (0.0,), "attention.clamp_kqv": (0.0,),
}  # fmt: skip


class Keys:
    """The architecture's fields. What nobody asked for is refused at the end."""

    def __init__(self, fields: Mapping[str, Any], arch: str, where: str) -> None:
        self.fields, self.arch, self.where = fields, arch, where
        self.taken: set[str] = set()

    def error(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self.where}: field '{self.arch}.{name}': {reason}")

    def get(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self.fields.get(f"{self.arch}.{name}", default)

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number; of an array (one for each layer), the number that all layers share."""
        found = self.get(name, default)
        if isinstance(found, np.ndarray) and found.size and (found == found[0]).all():
            found = found[0].item()
        if isinstance(found, np.ndarray):
            raise self.error(name, "its layers differ, which the native decoder does not support")
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
            raise self.error(name, f"it must be a whole number from {least} to {most}, and is {str(found)[:32]}")
        return found

    def real(self, name: str, default: float | None = None) -> float:
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < 1e30:
            raise self.error(name, f"it must be a number that is not negative, and is {str(found)[:32]}")
        return float(found)

    def text(self, name: str, default: str) -> str:
        found = self.get(name, default)
        if not isinstance(found, str):
            raise self.error(name, f"it must be a text, and is {str(found)[:32]}")
        return found[:64]

    def check_rest(self) -> None:
        prefix = f"{self.arch}."
        for key, value in self.fields.items():
            name = key.removeprefix(prefix)
            if key == name or name in self.taken or name in HARMLESS:
                continue
            if name not in ONLY:
                raise self.error(name, "labkit does not know what it changes in the model")
            if not isinstance(value, (bool, int, float)) or value not in ONLY[name]:
                raise self.error(name, f"the native decoder knows {ONLY[name]}, and it is {str(value)[:32]}")


def family_of(fields: Mapping[str, Any], where: str) -> tuple[str, Family]:
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise ValueError(
            f"{where}: the architecture {str(arch)[:64]!r} is not mapped; labkit reads {', '.join(sorted(FAMILIES))}"
        )
    keys = Keys(fields, arch, where)
    if arch == "llama" and keys.whole("expert_count", 0, least=0):
        return arch, MIXTRAL_FAMILY
    if arch == "llama" and keys.whole("attention.sliding_window", 0, least=0):
        return arch, MISTRAL_FAMILY
    return arch, FAMILIES[arch]


# -- config ------------------------------------------------------------------------------------------------------


def config_of(fields: Mapping[str, Any], tensors: Tensors, where: str) -> Any:
    """The transformers config of the model that the file holds."""
    from transformers import CONFIG_MAPPING

    arch, family = family_of(fields, where)
    keys = Keys(fields, arch, where)
    options = _sizes(keys, tensors)
    head_size = options["head_dim"]
    options |= _windows(keys, family, options["num_hidden_layers"]) | _own(keys, family, options)
    options["rope_parameters"] = _rope(keys, tensors, head_size, options["max_position_embeddings"], family)
    if family.kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}
        options["rope_parameters"] = {"full_attention": options["rope_parameters"], "sliding_attention": local}
    if family.kind == "phi3" and "original_max_position_embeddings" in options["rope_parameters"]:
        options["original_max_position_embeddings"] = options["rope_parameters"]["original_max_position_embeddings"]
    keys.check_rest()
    options |= _special_tokens(fields, options["vocab_size"])
    options["dtype"] = _dtype(tensors)
    try:
        return CONFIG_MAPPING[family.kind](**options)
    except Exception as error:  # transformers' validation has error types of its own
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(f"{where}: its metadata does not make a {family.kind} config: {reason[0]}") from error


def _sizes(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{keys.where}: it has no matrix 'token_embd.weight'")
    vocab_size = tensors["token_embd.weight"].shape[0]
    tokens = keys.fields.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise ValueError(f"{keys.where}: it has {len(tokens)} tokens, and embeddings of {vocab_size}")
    layers = keys.whole("block_count", most=len(tensors))
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count", most=2**16)
    head_size = keys.whole("attention.key_length", hidden // heads, most=2**16)
    if keys.whole("attention.value_length", head_size) != head_size:
        raise keys.error("attention.value_length", f"keys have {head_size}: the native decoder needs equal lengths")
    starcoder = keys.arch == "starcoder2"
    eps = "attention.layer_norm_epsilon" if starcoder else "attention.layer_norm_rms_epsilon"
    return {
        "vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads, most=2**16), "head_dim": head_size,
        "intermediate_size": keys.whole("feed_forward_length", hidden),
        "max_position_embeddings": keys.whole("context_length", least=2),
        "norm_epsilon" if starcoder else "rms_norm_eps": keys.real(eps, 1e-5),
        "tie_word_embeddings": "output.weight" not in tensors,
    }  # fmt: skip


def _windows(keys: Keys, family: Family, layers: int) -> dict[str, Any]:
    """Which layers see a window only. The pattern of gemma2 and gemma3 is part of the architecture."""
    if not family.windows:
        return {}
    window = keys.whole("attention.sliding_window", 0, least=0) or None
    if family.kind == "llama":
        return {}
    if not family.kind.startswith("gemma"):
        return {"sliding_window": window}
    if window is None:
        raise keys.error("attention.sliding_window", "it is missing")
    every = 2 if family.kind == "gemma2" else 6
    pattern = keys.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) == layers:
        slides = [bool(one) for one in pattern]
    else:
        every = keys.whole("attention.sliding_window_pattern", every)
        slides = [(i + 1) % every != 0 for i in range(layers)]
    kinds = ["sliding_attention" if one else "full_attention" for one in slides]
    return {"sliding_window": window, "layer_types": kinds}


def _own(keys: Keys, family: Family, sizes: dict[str, Any]) -> dict[str, Any]:
    """What only some families have."""
    kind, head_size = family.kind, sizes["head_dim"]
    if kind == "granite":
        return {
            "attention_multiplier": keys.real("attention.scale", 0.0) or head_size**-0.5,
            "embedding_multiplier": keys.real("embedding_scale", 0.0) or 1.0,
            "residual_multiplier": keys.real("residual_scale", 0.0) or 1.0,
            "logits_scaling": keys.real("logit_scale", 0.0) or 1.0,
        }
    if kind in ("gemma2", "gemma3_text"):
        largest = sizes["num_hidden_layers"] == (46 if kind == "gemma2" else 62)  # 27B scales by another size
        found: dict[str, Any] = {
            "query_pre_attn_scalar": sizes["hidden_size"] // sizes["num_attention_heads"] if largest else head_size,
            "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0 if kind == "gemma2" else 0.0) or None,
        }
        if kind == "gemma2":
            found["attn_logit_softcapping"] = keys.real("attn_logit_softcapping", 50.0) or None
        return found
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return _experts(keys, kind)
    if keys.whole("expert_count", 0, least=0) or keys.whole("expert_used_count", 0, least=0):
        raise keys.error("expert_count", f"the native decoder of {kind} has no experts")
    return {}


def _experts(keys: Keys, kind: str) -> dict[str, Any]:
    count = keys.whole("expert_count", most=2**16)
    used = keys.whole("expert_used_count", most=count)
    if kind == "mixtral":
        return {"num_local_experts": count, "num_experts_per_tok": used}
    found = {"num_experts": count, "num_experts_per_tok": used}
    found["moe_intermediate_size"] = keys.whole("expert_feed_forward_length", keys.whole("feed_forward_length", 1))
    norm = keys.get("expert_weights_norm", kind == "qwen3_moe")
    if not isinstance(norm, bool):
        raise keys.error("expert_weights_norm", "it must be true or false")
    found["norm_topk_prob"] = norm
    if kind == "qwen2_moe":
        size = keys.whole("expert_shared_feed_forward_length", 0, least=0)
        found |= {"shared_expert_intermediate_size": size} if size else {}
    return found


def _rope(keys: Keys, tensors: Tensors, head_size: int, context: int, family: Family) -> dict[str, Any]:
    size = keys.whole("rope.dimension_count", head_size, least=2, most=head_size)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)}
    if found["rope_theta"] <= 0:
        raise keys.error("rope.freq_base", "it must be positive")
    if size != head_size:
        if family.interleaved or size % 2 or int(head_size * (size / head_size)) != size:
            raise keys.error("rope.dimension_count", f"{size} of {head_size} cannot be expressed for {keys.arch}")
        found["partial_rotary_factor"] = size / head_size
    kind = keys.text("rope.scaling.type", "none")
    linear = keys.real("rope.scale_linear", 0.0)  # as old files say it
    factor = keys.real("rope.scaling.factor", linear)
    original = keys.whole("rope.scaling.original_context_length", context)
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    fast, slow = keys.real("rope.scaling.yarn_beta_fast", 32.0), keys.real("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "none" and linear:
        kind = "linear"
    divisors = _divisors(keys, tensors, size)
    if divisors is not None:
        if kind not in ("none", "longrope"):
            raise keys.error("rope.scaling.type", f"it is {kind!r}, and the file divides frequencies as well")
        short, long = divisors
        return found | {
            "rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention,
            "original_max_position_embeddings": original, "factor": max(context / original, 1.0),
        }  # fmt: skip
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return found
    if kind not in ("linear", "yarn") or factor < 1.0:
        raise keys.error("rope.scaling.type", f"{kind!r} with factor {factor} cannot be expressed")
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    grown = attention * (0.1 * math.log(factor) + 1.0)
    return found | {
        "rope_type": "yarn", "factor": factor, "attention_factor": grown, "beta_fast": fast, "beta_slow": slow,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _divisors(keys: Keys, tensors: Tensors, size: int) -> tuple[list[float], list[float]] | None:
    """What rope frequencies are divided by in short and in long contexts, from the file's tensors."""
    names = [name for name in ROPE_TENSORS if name in tensors]
    if not names:
        return None
    if names not in ([ROPE_TENSORS[0]], list(ROPE_TENSORS[1:])):
        raise ValueError(f"{keys.where}: the tensors {', '.join(names)} do not belong together")
    numbers = []
    for name in reversed(names):
        tensor = tensors[name]
        if tensor.shape != (size // 2,):
            raise ValueError(f"{keys.where}: tensor {name!r} has shape {tensor.shape}, not ({size // 2},)")
        read = dequantize(tensor.type, tensor.rows())[0]
        if not (np.isfinite(read) & (read > 0)).all():
            raise ValueError(f"{keys.where}: tensor {name!r}: its numbers must be positive")
        numbers.append([float(one) for one in read])
    return numbers[0], numbers[-1]


def _special_tokens(fields: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    def id_of(name: str) -> int | None:
        found = fields.get(f"tokenizer.ggml.{name}_token_id")
        fits = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < vocab_size
        return found if fits else None

    ends = [found for name in ("eos", "eot", "eom") if (found := id_of(name)) is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": id_of("bos"), "pad_token_id": id_of("padding"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }  # fmt: skip


def _dtype(tensors: Tensors) -> str:
    """That of the matrices if all have the same, else bfloat16, which holds what quantized ones were made from."""
    kinds = {tensor.type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


# -- tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor as a tensor of the model: [rows, columns], or a vector."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    first_row: int = 0
    head_size: int = 0  # of a tensor whose rows are interleaved within heads; else 0
    offset: int = 0  # to subtract

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        """Where in the stored tensor these rows of the model's lie."""
        if self.head_size:
            head, row = np.divmod(rows, self.head_size)
            which, pair = np.divmod(row, self.head_size // 2)  # first or second of which pair
            rows = head * self.head_size + 2 * pair + which
        return rows + self.first_row


def parts_of(fields: Mapping[str, Any], tensors: Tensors, config: Any, where: str) -> dict[str, Part]:
    """The model's tensors by Hugging Face names."""
    _, family = family_of(fields, where)
    stored = [tensor for name, tensor in tensors.items() if name not in ROPE_TENSORS]
    return {name: part for tensor in stored for name, part in _parts(tensor, family, config, where)}


def _parts(tensor: StoredTensor, family: Family, config: Any, where: str) -> list[tuple[str, Part]]:
    stem, _, suffix = tensor.name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
    names = LAYER | dict(family.names)
    own = match[2] if match else stem
    new = names.get(own) if match else GLOBAL.get(own)
    if new is None or suffix not in ("weight", "bias") or (match and int(match[1]) >= config.num_hidden_layers):
        raise ValueError(f"{where}: tensor {tensor.name!r} has no place in the architecture {config.model_type!r}")
    if match:
        new = f"model.layers.{int(match[1])}.{new}"
    shape = tensor.shape
    if len(shape) == 1 and tensor.type.num_elements > 1:
        raise ValueError(f"{where}: tensor {tensor.name!r}: a vector cannot be stored as {tensor.type.name}")
    if own == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if "{}" in new:
        if len(shape) != 3 or shape[0] > 2**16:
            raise ValueError(f"{where}: tensor {tensor.name!r} has shape {shape}, not (experts, outputs, inputs)")
        one = shape[1:]
        return [(f"{new.format(i)}.{suffix}", Part(tensor, one, i * one[0])) for i in range(shape[0])]
    if len(shape) > 2:
        raise ValueError(f"{where}: tensor {tensor.name!r} has {len(shape)} dimensions")
    head_size = config.head_dim if family.interleaved and own in ("attn_q", "attn_k") else 0
    if head_size and (shape[0] % head_size or head_size % 2):
        raise ValueError(f"{where}: tensor {tensor.name!r} has {shape[0]} rows, and heads have {head_size}")
    offset = family.norm_offset if own.endswith("norm") and suffix == "weight" else 0
    return [(f"{new}.{suffix}", Part(tensor, shape, 0, head_size, offset))]
