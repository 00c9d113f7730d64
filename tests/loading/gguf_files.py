"""Models as GGUF files: written by gguf-py from transformers' own small models, names and metadata by its tables."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import torch

from tests.models.configs import COMMON, reference_model

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
PERMUTED = {"llama", "mistral3", "smollm3", "granite"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PLAIN = {"rope_type": "default", "rope_theta": 700.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 2.0, 4.0, 8.0], "attention_factor": 1.2,
            "original_max_position_embeddings": 64}  # fmt: skip

# By name: (architecture of the file, model type, options of its config).
MODELS = {
    "llama": ("llama", "llama", {"rope_parameters": PLAIN}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", "llama", {"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 3.0}}),
    "mistral": ("llama", "mistral", {"sliding_window": 9, "head_dim": 32}),
    "mistral3": ("mistral3", "mistral", {"sliding_window": None, "head_dim": 32, "rope_parameters": YARN}),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "phi3": ("phi3", "phi3", {"sliding_window": 11, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "phi3-long": ("phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", "gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3", "gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
               "num_hidden_layers": 7, "rope_parameters": {
                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                   "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}}),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 5}),
    "granite": ("granite", "granite", {"embedding_multiplier": 3.0, "logits_scaling": 1.7, "residual_multiplier": 0.6,
                "attention_multiplier": 0.3}),
    "olmo2": ("olmo2", "olmo2", {}),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": 10, "use_bias": True}),
}  # fmt: skip


def model_of(name: str, **more):
    from transformers import CONFIG_MAPPING

    _, kind, options = MODELS[name]
    return reference_model(CONFIG_MAPPING[kind](**{**COMMON, **SHAPE, **options, **more}))


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama's q and k are stored: rotated pairs side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def stored(name: str, model) -> dict[str, np.ndarray]:
    """The model's tensors with the names and values that a GGUF file has."""
    arch, config = MODELS[name][0], model.config
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for key, value in apart(model.state_dict(), config).items():
        numbers = value.float().numpy()
        if arch in PERMUTED and re.search(r"self_attn\.[qk]_proj\.", key):
            heads = config.num_attention_heads if ".q_proj" in key else config.num_key_value_heads
            numbers = interleaved(numbers, heads)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            numbers = numbers + 1
        if key.endswith("shared_expert_gate.weight"):
            numbers = numbers[0]
        new = known.get_name(key, try_suffixes=(".weight", ".bias"))
        assert new is not None, key
        found[new] = numbers
    return found


def apart(tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Gates and inputs of stacked experts are separate tensors in GGUF; tied heads are not stored."""
    found = {}
    for key, value in tensors.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, 1)
            found[key.replace("gate_up_proj", "gate_proj.weight")] = gate
            found[key.replace("gate_up_proj", "up_proj.weight")] = up
        elif key.endswith("experts.down_proj"):
            found[f"{key}.weight"] = value
        else:
            found[key] = value
    return found


def write(path: Path, name: str, model, quantize: str = "F32", fields=(), rename=None) -> Path:
    """`quantize` is the type of all matrices. `fields` are called with the writer."""
    arch, config = MODELS[name][0], model.config
    writer = gguf.GGUFWriter(path, arch)
    add_config(writer, arch, config)
    for add in fields:
        add(writer)
    tensors = stored(name, model) | rope_tensors(config)
    for key, numbers in tensors.items():
        type = gguf.GGMLQuantizationType[quantize if numbers.ndim > 1 and "gate_inp" not in key else "F32"]
        data = numbers.astype(np.float32)
        if type != gguf.GGMLQuantizationType.F32:
            data = blocks_of(data, type)
        writer.add_tensor(rename(key) if rename else key, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(numbers: np.ndarray, type: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks of the types that gguf-py does not write; their bytes make small scales."""
    try:
        return gguf.quants.quantize(numbers, type)
    except NotImplementedError:
        shape = gguf.quants.quant_shape_to_byte_shape(numbers.shape, type)
        return np.random.default_rng(numbers.size).integers(0, 0x28, shape, dtype=np.uint8)


def rope_tensors(config) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{key}.weight": np.array(rope[f"{key}_factor"], np.float32) for key in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    size = config.hidden_size // config.num_attention_heads
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    wavelength, original = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}


def add_config(writer, arch: str, config) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if arch == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in ("mistral", "phi3", "gemma2", "gemma3_text", "starcoder2") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if count := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_eos_token_id(config.eos_token_id)
    add_rope(writer, config, head_size)


def add_rope(writer, config, head_size: int) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
