"""A small config of any model type of transformers: sizes are set by the names of a config's fields. Knows no model."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import CONFIG_MAPPING

VOCAB = 256
HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, SIZE = 64, 96, 4, 4, 2, 16
WINDOW = 8

# Every factor behind which a mistake could hide has an unusual value.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB,
}  # fmt: skip
BY_VALUE = [
    (HIDDEN, "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim input_embedding_size "
            "output_embedding_size backbone_hidden_size projection_dim out_hidden_size text_hidden_size"),
    (INNER, "intermediate_size ffn_dim n_inner dff dim_ff d_ff d_inner decoder_ffn_dim encoder_ffn_dim "
           "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
           "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
           "shared_experts_intermediate_size"),
    (40, "moe_intermediate_size expert_ffn_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (2, "encoder_layers num_encoder_layers depth first_k_dense_replace num_dense_layers n_group num_experts_per_tok "
       "moe_topk moe_k num_kv_shared_layers mamba_n_groups n_groups max_window_layers hc_mult hc_count"),
    (1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_mtp_layers "
       "num_nextn_predict_layers"),
    (HEADS, "num_attention_heads n_head num_heads decoder_attention_heads encoder_attention_heads attention_heads "
           "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
           "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
           "mamba_n_heads linear_num_value_heads n_mamba_heads mamba_num_heads linear_num_heads"),
    (KEY_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads indexer_n_heads "
               "index_n_heads"),
    (SIZE, "head_dim d_kv dim_head swa_head_dim kv_channels qk_nope_head_dim v_head_dim linear_key_head_dim "
          "linear_value_head_dim index_head_dim indexer_head_dim mamba_head_dim kv_lora_rank mamba_d_state "
          "ssm_state_size state_size linear_head_dim attention_head_size global_head_dim"),
    (8, "qk_rope_head_dim rotary_dim index_topk gated_norm_rank rel_extent d_rel"),
    (24, "q_lora_rank"),
    (WINDOW, "sliding_window sliding_window_size attention_chunk_size local_attention attention_window_size "
            "window_size keep_window_size local_attention_window_len"),
    (256, "max_position_embeddings n_positions max_seq_len n_ctx context_length"),
]  # fmt: skip
for _value, _names in BY_VALUE:
    SIZES |= dict.fromkeys(_names.split(), _value)
FACTORS: dict[str, Any] = {
    "initializer_range": 0.2, "init_std": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
    "logits_scaling": 1.7, "attention_multiplier": 0.3, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 20, "logit_scale": 0.5, "floor_scale": 129, "attn_scale": 0.4,
    "routed_scaling_factor": 1.5, "logits_soft_cap": 5.0, "key_multiplier": 1.3, "attention_out_multiplier": 0.7,
}  # fmt: skip
SETS_NONE = {"sliding_window", "num_key_value_heads", "q_lora_rank", "intermediate_size", "head_dim",
             "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "ple_embed_dim", "indexer_n_heads",
             "indexer_kv_heads", "indexer_head_dim"}  # also where the default is None  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
TURNS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
ENCODER = {"is_decoder": True}
DECODER = {"is_encoder_decoder": False, "is_decoder": True, "encoder_layers": 2, "decoder_layers": LAYERS,
           "num_hidden_layers": LAYERS, "encoder_ffn_dim": INNER}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ENCODER,
    ),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "prophetnet", "trocr"),
        DECODER,
    ),
    "reformer": {"is_decoder": True},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": TURNS},
    "kimi_linear": {"layer_types": TURNS},
    "bailing_hybrid": {"layer_types": TURNS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": HEADS, "num_layers": 2},
    "qwen4_exp_text": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": HEADS},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "glm4v_text", "glm4v_moe_text",
         "glm_ocr_text", "glmga_text", "hunyuan_vl_text", "cosmos3_edge_text"),
        MROPE,
    ),
    "glm4v_text": MROPE | {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
}  # fmt: skip


def sized(config_class: Any) -> dict[str, Any]:
    """The options of a small config of this class."""
    options: dict[str, Any] = {}
    subs = config_class.sub_configs
    for field in fields(config_class) if is_dataclass(config_class) else ():
        name, value = field.name, field.default
        if name in subs:
            options[name] = _sized_part(config_class, name)
        elif name in FACTORS and isinstance(value, (int, float)):
            options[name] = FACTORS[name]
        elif name in SIZES and (isinstance(value, int) or name in SETS_NONE):
            options[name] = SIZES[name]
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            options[name] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            options[name] = VOCAB - 6
    options = {name: value for name, value in options.items() if value is not None}
    if "kv_lora_rank" in options:  # each head has keys of its own
        options["num_key_value_heads"] = HEADS
    return options | copy.deepcopy(OVERRIDES.get(config_class.model_type, {}))  # configs change what they are given


def _sized_part(config_class: Any, name: str) -> Any:
    """The options of a config within another one; where its class is open, of the one that is the default."""
    part = config_class.sub_configs[name]
    if not is_dataclass(part) or part.model_type == "":
        try:
            part = type(getattr(config_class(), name, None))
        except (TypeError, ValueError, AttributeError):
            return None
    if not is_dataclass(part):
        return None
    return {"model_type": part.model_type} | sized(part)


def tiny_config(kind: str, **given: Any) -> Any:
    config_class = CONFIG_MAPPING[kind]
    return config_class(**sized(config_class) | given)
