"""Small configs of every architecture. Every number behind which a mistake could hide has an unusual value."""

from __future__ import annotations

import random

import torch
from transformers import CONFIG_MAPPING

VOCAB = 97
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

LATENT_SIZES = {"num_key_value_heads": 0, "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 14,
                "qk_rope_head_dim": 8, "v_head_dim": 12}  # fmt: skip
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24,
           "n_shared_experts": 2, "routed_scaling_factor": 1.7, "num_hidden_layers": 3}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
        "mscale_all_dim": 0.9}  # fmt: skip
LATENT = {
    "axk1": {**LATENT_SIZES, **GROUPED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {**LATENT_SIZES, **GROUPED, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy",
                    "rope_parameters": YARN, "attention_bias": True},
    "deepseek_v3": {**LATENT_SIZES, **GROUPED, "first_k_dense_replace": 1, "rope_parameters": YARN},
    "glm4_moe_lite": {**LATENT_SIZES, **GROUPED, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    "minicpm3": {**LATENT_SIZES, "dim_model_base": 31, "scale_emb": 3, "tie_word_embeddings": True},
    "mistral4": {**LATENT_SIZES, **GROUPED, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3,
                 "original_max_position_embeddings": 7, "partial_rotary_factor": 8 / 22}},
    "sarvam_mla": {**LATENT_SIZES, **GROUPED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "youtu": {**LATENT_SIZES, "q_lora_rank": 0},
}  # fmt: skip
TURNS = ["sliding_attention", "full_attention"]
SCORED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
          "moe_intermediate_size": 24, "first_k_dense_replace": 1, "norm_topk_prob": True,
          "routed_scaling_factor": 1.5}  # fmt: skip

NATIVE = {
    "llama": {"attention_bias": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 9, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
              "original_max_position_embeddings": 128}},
    "phi3": {"sliding_window": 11, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
             "partial_rotary_factor": 0.5}},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 8, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 8, "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                                        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 56, "norm_topk_prob": False, "decoder_sparse_step": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "olmo2": {"num_key_value_heads": 3},
    "starcoder2": {"sliding_window": 10, "use_bias": True},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 1.7, "residual_multiplier": 0.6,
                "attention_multiplier": 0.3, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4,
                "factor": 2.0}},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "layer_types": None},
    "arcee": {},
    "cwm": {"head_dim": 16, "sliding_window": 9, "layer_types": TURNS},
    "dots1": {**SCORED, "sliding_window": 9, "layer_types": TURNS, "head_dim": 16},
    "exaone4": {"sliding_window": 9, "layer_types": TURNS},
    "glm4_moe": {**SCORED, "use_qk_norm": True, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ministral": {"sliding_window": 9, "layer_types": TURNS, "head_dim": 16},
    "nemotron": {},
    "olmo3": {"num_key_value_heads": 3, "sliding_window": 9, "layer_types": TURNS},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "num_key_value_heads": 3},
    "seed_oss": {"head_dim": 16},
    "stablelm": {"use_qkv_bias": True},
    **LATENT,
}  # fmt: skip


GPT_LIKE = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
OTHERS = {
    "gpt2": {**GPT_LIKE, "initializer_range": 0.2},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 48},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"partial_rotary_factor": 0.5},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "olmo": {},
    "persimmon": {"num_key_value_heads": None},
    "biogpt": {"num_key_value_heads": None},
    "helium": {"head_dim": 0},
    "gpt_bigcode": {**GPT_LIKE, "multi_query": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9, "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "bloom": {"n_layer": 2, "n_head": 6},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gptj": {**GPT_LIKE, "rotary_dim": 8},
    "codegen": {**GPT_LIKE, "rotary_dim": 8},
}  # fmt: skip


MAMBA2 = {
    "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ZAMBA = {"mamba_d_state": 8, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
RECURRENT = {
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "mamba2": {"n_groups": 2, "num_heads": 6, "head_dim": 16, "state_size": 8, "expand": 2, "chunk_size": 16},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 96, "head_dim": 8, "lm_head_multiplier": 0.7},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 40},
    "nemotron_h": {"mamba_num_heads": 6, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16,
                   "num_hidden_layers": 3, "layers_block_type": ["mamba", "mlp", "attention"], "head_dim": 8},
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40, "head_dim": 16},
    "qwen3_5_text": {**DELTA, "head_dim": 16},
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40, "head_dim": 16},
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4,
                    "num_key_value_heads": 6, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
                    "qk_rope_head_dim": 8, "v_head_dim": 12, "mlp_layer_types": ["dense", "dense"]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
                       "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
                       "num_key_value_heads": 6, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
                       "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_experts": 4,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_dense_layers": 1},
    "zamba": {**ZAMBA, "n_mamba_heads": 2, "mamba_dt_rank": 4, "attention_hidden_size": 96, "attention_head_dim": 16},
    "zamba2": {**ZAMBA, "mamba_headdim": 16, "n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 16,
               "hybrid_layer_ids": [1, 3], "adapter_rank": 4, "num_mem_blocks": 1},
}  # fmt: skip


def config(kind: str, seed: int = 0):
    """A small config of this architecture; the seed also draws a shape."""
    rng = random.Random(f"{kind}:{seed}")
    shape = dict(LLAMA_LIKE)
    if seed:
        heads = rng.choice([2, 4, 6])
        shape |= {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": rng.choice([1, 2])}
        shape["intermediate_size"] = rng.choice([40, 64, 100])
    options = {**COMMON, **shape, **(NATIVE | OTHERS | RECURRENT)[kind]}
    if options.get("head_dim") == 0:
        options["head_dim"] = options["hidden_size"] // options["num_attention_heads"]
    heads, keys = options["num_attention_heads"], options["num_key_value_heads"]
    if keys == 0:  # as many as query heads
        options["num_key_value_heads"] = heads
    elif keys is not None:
        options["num_key_value_heads"] = next(n for n in range(min(keys, heads), 0, -1) if heads % n == 0)
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("q_lora_rank") == 0:  # queries are products of the hidden state
        given["q_lora_rank"] = None
    return CONFIG_MAPPING[kind](**given)


def reference_model(config, seed: int = 0):
    """transformers' own model with random weights; norms and biases are random too."""
    from transformers import AutoModelForCausalLM, Mistral4ForCausalLM

    torch.manual_seed(seed)
    build = AutoModelForCausalLM.from_config if config.model_type != "mistral4" else Mistral4ForCausalLM._from_config
    model = build(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.1 * torch.randn_like(value)
            if "experts" in name or "gate.weight" in name:
                value.normal_(0.0, 0.3)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.normal_(0.0, 0.3)
    return model
