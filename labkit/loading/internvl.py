"""InternVL as OpenGVLab publishes it (`InternVLChatModel`): its config and its tensors, under the names that
transformers gives the same model. Runs no code of the checkpoint, and knows no tokens beyond their ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.files import json_object

MODEL_TYPE = "internvl_chat"
PLACE, END_OF_TURN = "<IMG_CONTEXT>", "<|im_end|>"
MARK = "mlp1.0.weight"  # a tensor that only this layout has

LANGUAGE_MODELS = {
    "InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe",
}  # fmt: skip
REFUSED = {"pad2square": "images padded to a square", "use_llm_lora": "unmerged LoRA weights",
           "use_backbone_lora": "unmerged LoRA weights"}  # fmt: skip
VISION_FIELDS = {
    "attention_dropout": "attention_dropout", "dropout": "hidden_dropout_prob", "hidden_act": "hidden_act",
    "hidden_size": "hidden_size", "image_size": "image_size", "initializer_range": "initializer_range",
    "intermediate_size": "intermediate_size", "layer_norm_eps": "layer_norm_eps", "norm_type": "norm_type",
    "num_attention_heads": "num_attention_heads", "num_channels": "num_channels",
    "num_hidden_layers": "num_hidden_layers", "patch_size": "patch_size", "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
}  # fmt: skip
OF_LANGUAGE = ("_name_or_path", "architectures", "auto_map", "model_type", "quantization_config", "torch_dtype")


def config_of(folder: Path, fields: Mapping[str, Any]) -> Any:
    """The config of transformers' own InternVL that computes what this one's code would."""
    from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{folder / 'config.json'}: InternVL with {reason} is not served")

    for name in ("llm_config", "vision_config"):
        if not isinstance(fields.get(name), dict):
            raise ValueError(f"{folder / 'config.json'} has no {name!r}: it is no InternVL chat model")
    llm, vit = fields["llm_config"], fields["vision_config"]
    for name, what in REFUSED.items():
        if fields.get(name):
            raise refuse(f"{what} ({name})")
    if fields.get("ps_version", "v2") != "v2":
        raise refuse(f"ps_version {fields['ps_version']!r}, whose features are transposed,")
    if vit.get("model_type", "intern_vit_6b") != "intern_vit_6b":
        raise refuse(f"a vision tower of type {vit['model_type']!r}")
    if vit.get("qk_normalization") and vit.get("layer_norm_eps", 1e-6) != 1e-6:
        raise refuse("query and key norms whose epsilon is not 1e-6")
    kind = (llm.get("architectures") or [None])[0]
    if kind not in LANGUAGE_MODELS:
        raise ValueError(
            f"{folder / 'config.json'}: InternVL with the language model {kind!r} is not served: "
            f"known are {', '.join(sorted(LANGUAGE_MODELS))}"
        )
    text = {name: value for name, value in llm.items() if name not in OF_LANGUAGE}
    if kind == "InternLM2ForCausalLM":
        text["attention_bias"] = bool(text.pop("bias", False))
    ends = [text.get("eos_token_id"), token_id(folder, END_OF_TURN)]
    ends = [id for given in ends for id in (given if isinstance(given, list) else [given]) if id is not None]
    text["eos_token_id"] = list(dict.fromkeys(ends)) or None
    made = CONFIG_MAPPING[LANGUAGE_MODELS[kind]](**text)
    vision = InternVLVisionConfig(**{new: vit[old] for old, new in VISION_FIELDS.items() if vit.get(old) is not None})
    if "qkv_bias" not in vit:
        vision.attention_bias = False
    dtype = fields.get("torch_dtype") or fields.get("dtype") or llm.get("torch_dtype")
    config = InternVLConfig(
        text_config=made, vision_config=vision, architectures=["InternVLChatModel"], dtype=dtype,
        image_token_id=place_id(folder), downsample_ratio=fields.get("downsample_ratio", 0.5),
        image_seq_length=places_of(fields), vision_feature_layer=fields.get("select_layer", -1),
    )  # fmt: skip
    if (found := fields.get("quantization_config") or llm.get("quantization_config")) is not None:
        config.quantization_config = found
    return config


def places_of(fields: Mapping[str, Any]) -> int:
    """How many places a tile takes."""
    vit = fields["vision_config"]
    side = (fields.get("force_image_size") or vit.get("image_size", 448)) // vit.get("patch_size", 14)
    return int(side**2 * fields.get("downsample_ratio", 0.5) ** 2)


def place_id(folder: Path) -> int:
    found = token_id(folder, PLACE)
    if found is None:
        raise ValueError(f"{folder}: its tokenizer has no token {PLACE!r}, where features of images go")
    return found


def token_id(folder: Path, token: str) -> int | None:
    """The id of an added token, from whichever file of the tokenizer lists it."""
    ids = json_object(folder / "added_tokens.json")
    if token in ids:
        return int(ids[token])
    for id, one in (json_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        if one.get("content") == token:
            return int(id)
    whole = json_object(folder / "tokenizer.json")
    for one in whole.get("added_tokens") or ():
        if one.get("content") == token:
            return int(one["id"])
    vocab = (whole.get("model") or {}).get("vocab")
    return vocab.get(token) if isinstance(vocab, dict) else None


NAMES = tuple((re.compile(old), new) for old, new in (
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"^(model\.vision_tower\..*)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"^(model\.vision_tower\..*)\.attn\.", r"\1.attention."),
    (r"^(model\.vision_tower\..*)\.ls(\d)$", r"\1.lambda_\2"),
    (r"^(model\.vision_tower\..*)\.norm1\.", r"\1.layernorm_before."),
    (r"^(model\.vision_tower\..*)\.norm2\.", r"\1.layernorm_after."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.(lm_head|output)\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.language_model)\.tok_embeddings\.", r"\1.embed_tokens."),
    (r"^(model\.language_model\..*)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(model\.language_model\..*)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.language_model\..*)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"^(model\.language_model\..*)\.attention\.wqkv\.", r"\1.self_attn.wqkv."),
    (r"^(model\.language_model\..*)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"^(model\.language_model\..*)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
    (r"^(model\.language_model\..*)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
))  # fmt: skip
FUSED = re.compile(r"^(.*\.)(qkv|wqkv)\.(weight|bias)$")


def name_of(stored: str) -> str:
    """A stored tensor's name in transformers' InternVL; of fused projections, with `qkv` or `wqkv` left in it."""
    for old, new in NAMES:
        stored = old.sub(new, stored)
    return stored


class Renamed:
    """The checkpoint as transformers' InternVL names its tensors, projections that it stores fused given apart."""

    def __init__(self, source: Any, config: Any) -> None:
        self.source, self.folder = source, source.folder
        text = config.text_config
        self.num_kv_heads = text.num_key_value_heads
        self.per_group = text.num_attention_heads // self.num_kv_heads  # query heads
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, tuple[str, str]] = {}  # by name: the stored tensor and which part of it
        for old in source.shapes:
            new, shape = name_of(old), source.shapes[old]
            fused = FUSED.match(new)
            if fused is None and (".qkv." in new or ".wqkv." in new):
                raise ValueError(
                    f"{self!r}: the fused projection {old!r} is quantized: of InternVL, checkpoints of Qwen2 and Llama "
                    f"may be"
                )
            if fused is None:
                self.shapes[new], self.stored[new] = shape, (old, "")
                continue
            before, kind, after = fused.groups()
            sizes = self._sizes(old, kind, shape[0])
            for part, rows in zip("qkv", sizes, strict=True):
                name = f"{before}{part}_proj.{after}"
                self.shapes[name], self.stored[name] = (rows, *shape[1:]), (old, kind[0] + part)

    def __repr__(self) -> str:
        return repr(self.source)

    def _sizes(self, name: str, kind: str, rows: int) -> tuple[int, int, int]:
        parts = 3 if kind == "qkv" else (self.per_group + 2) * self.num_kv_heads
        if rows % parts:
            raise ValueError(f"{self!r}: tensor {name!r} has {rows} rows, the config divides them by {parts}")
        if kind == "qkv":
            return (rows // 3,) * 3
        head = rows // parts
        return self.per_group * self.num_kv_heads * head, self.num_kv_heads * head, self.num_kv_heads * head

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        if name not in self.stored:
            raise ValueError(f"{self!r} lacks tensor {name!r}")
        old, which = self.stored[name]
        if not which:
            found: Tensor = self.source.read(old, dtype, device, part)
            return found
        whole = self.source.read(old, dtype, device)
        if which[0] == "q":  # one behind the other
            cut = whole.chunk(3)["qkv".index(which[1])]
        else:  # by key head: the queries that share it, the key, the value
            heads = whole.unflatten(0, (self.num_kv_heads, self.per_group + 2, -1))
            at = {"q": slice(0, self.per_group), "k": slice(-2, -1), "v": slice(-1, None)}[which[1]]
            cut = heads[:, at].flatten(0, 2)
        return cut[part].clone()  # its own memory: the fused tensor goes

    def close(self) -> None:
        self.source.close()


def renamed(source: Any, config: Any) -> Any:
    """The source itself, unless it is in this layout."""
    return Renamed(source, config) if MARK in source.shapes else source
