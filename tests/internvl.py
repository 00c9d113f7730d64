"""A random small InternVL of transformers, and the same model written as OpenGVLab publishes its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labkit.text.huggingface import without_video
from tests.seeing import TEXT, Theirs, tokenizer

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
PARTS = {  # ours by the names that the published code has
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "self_attn.wqkv": "attention.wqkv",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def internvl(language: str = "qwen2", *, size: int = 28, layer: int = -1, **vision: Any) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, GotOcr2ImageProcessorPil, InternVLConfig, InternVLVisionConfig

    tokens = tokenizer(
        "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>",
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    tokens.chat_template = CHAT
    tower = InternVLVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, image_size=[28, 28],
        patch_size=[7, 7], **vision,
    )  # fmt: skip
    places = (size // 14) ** 2
    images = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, max_patches=4, **IMAGENET)
    text = CONFIG_MAPPING[language](**(TEXT | {"tie_word_embeddings": False}))
    config = InternVLConfig(
        vision_config=tower, text_config=text, image_token_id=tokens.context_image_token_id, image_seq_length=places,
        vision_feature_layer=layer, tie_word_embeddings=False,
    )  # fmt: skip
    return config, without_video("InternVLProcessor")(images, tokens, video_processor=None, image_seq_length=places)


def write_original(their: Theirs, folder: Path) -> None:
    """`their` model in the published layout, with code that must not run."""
    write_files(their.model.config, their.processor, folder)
    internlm2 = their.model.config.text_config.model_type == "llama"
    save_file(original_tensors(their.model, internlm2), folder / "model.safetensors")


def write_files(config: Any, processor: Any, folder: Path, **fields: Any) -> None:
    """All but the weights."""
    text, tower = config.text_config, config.vision_config
    internlm2 = text.model_type == "llama"
    llm = text.to_dict() | {"architectures": ["InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"]}
    llm |= {"model_type": "internlm2", "bias": False, "auto_map": {"AutoConfig": "x.X"}} if internlm2 else {}
    vit = {
        "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size, "num_hidden_layers": tower.num_hidden_layers,
        "num_attention_heads": tower.num_attention_heads, "image_size": 28, "patch_size": 7,
        "norm_type": tower.norm_type, "qkv_bias": tower.attention_bias, "qk_normalization": tower.use_qk_norm,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "dropout": 0.0, "drop_path_rate": 0.1,
        "use_flash_attn": True,
    }  # fmt: skip
    whole = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}, "llm_config": llm, "vision_config": vit,
        "downsample_ratio": 0.5, "dynamic_image_size": True,
        "force_image_size": processor.image_processor.size.height, "max_dynamic_patch": 4, "min_dynamic_patch": 1,
        "ps_version": "v2", "pad2square": False, "select_layer": config.vision_feature_layer,
        "template": "internvl2_5", "use_thumbnail": True, "use_backbone_lora": 0, "use_llm_lora": 0, **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "code.py").write_text("raise RuntimeError('the code of the checkpoint was run')\n", encoding="utf-8")
    preprocessor = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    processor.tokenizer.save_pretrained(folder)


def original_tensors(model: Any, internlm2: bool) -> dict[str, torch.Tensor]:
    text = model.config.text_config
    groups = text.num_key_value_heads
    state = dict(model.state_dict())
    for name in [name for name in state if ".q_proj." in name]:
        q, k, v = (state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv")
        if "vision_tower" in name:
            state[name.replace("q_proj", "qkv")] = torch.cat((q, k, v))
        elif internlm2:
            rows = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
            state[name.replace("q_proj", "wqkv")] = torch.cat(rows, 1).flatten(0, 1)
        else:
            state |= {name.replace("q_proj", f"{part}_proj"): one for part, one in zip("qkv", (q, k, v), strict=True)}
    found = {}
    for name, value in state.items():
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.", "vision_model.")
            for ours, published in PARTS.items():
                name = name.replace(ours, published)
        elif name.startswith("model.multi_modal_projector."):
            for number, part in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
                name = name.replace(f"model.multi_modal_projector.{part}", f"mlp1.{number}")
        else:
            name = name.replace("model.language_model.", "language_model.model.")
            name = name.replace("lm_head.", "language_model.lm_head.")
            for ours, published in INTERNLM2.items() if internlm2 else ():
                name = name.replace(ours, published)
        found[name] = value.contiguous().clone()
    return found
