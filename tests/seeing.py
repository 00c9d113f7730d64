"""Random small models with images, in transformers' own files, and what transformers itself answers with them."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from labkit.text.huggingface import without_video

CHARACTERS = [chr(i) for i in range(32, 127)]
SPECIAL = ("<unk>", "<image>", "<start>", "<end>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}~{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def picture(seed: int, width: int = 40, height: int = 30) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def tokenizer(*more: str, **named: str) -> Any:
    """A token a character; `named` special tokens become its attributes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {text: i for i, text in enumerate((*CHARACTERS, *SPECIAL, *more))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    unnamed = {f"extra_{i}_token": text for i, text in enumerate((*SPECIAL[1:], *more)) if text not in named.values()}
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", extra_special_tokens=named | unnamed
    )
    made.chat_template = TEMPLATE
    return made


def llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokens = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=42, patch_size=14,
        projection_dim=32,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    processor = LlavaProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    token = tokens.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=token)
    return config, processor


def internvl() -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLVisionConfig, Qwen2Config

    tokens = tokenizer(
        "<video>",
        start_image_token="<start>",
        end_image_token="<end>",
        context_image_token="<image>",
        video_token="<video>",
    )
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=[28, 28],
        patch_size=[7, 7],
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=tokens.context_image_token_id,
        image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    return config, without_video("InternVLProcessor")(images, tokens, video_processor=None, image_seq_length=4)


def _qwen_processor(kind: str, images: Any) -> Any:
    return without_video(kind)(
        images, tokenizer("<video>", image_token="<image>", video_token="<video>"), video_processor=None
    )


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    processor = _qwen_processor("Qwen2_5_VLProcessor", images)
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    token = processor.image_token_id
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=token), processor


def qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    processor = _qwen_processor("Qwen2VLProcessor", images)
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
    token = processor.image_token_id
    return Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=token), processor


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig

    images = Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=32 * 32 * 12, patch_size=16)
    processor = _qwen_processor("Qwen3VLProcessor", images)
    text = TEXT | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                   "mrope_section": [4, 2, 2], "mrope_interleaved": True}}  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "patch_size": 16,
    }  # fmt: skip
    token = processor.image_token_id
    return Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=token), processor


def llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessorPil,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokens, pinpoints = tokenizer(), [[28, 28], [28, 56], [56, 28], [56, 56]]
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_grid_pinpoints=pinpoints,
        image_token_id=tokens.convert_tokens_to_ids("<image>"), vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return config, without_video("LlavaOnevisionProcessor")(
        images,
        tokens,
        video_processor=None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def llava_next() -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextImageProcessorPil

    tokens, pinpoints = tokenizer(), [[28, 56], [56, 28], [56, 56]]
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
        projection_dim=32,
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_grid_pinpoints=pinpoints,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, without_video("LlavaNextProcessor")(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokens = tokenizer(image_token="<image>", boi_token="<start>", eoi_token="<end>")
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_id=tokens.image_token_id, mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id, eoi_token_index=tokens.eoi_token_id,
    )  # fmt: skip
    return config, Gemma3Processor(images, tokens, image_seq_length=4)


def _idefics(kind: str, images: Any, more: dict[str, Any]) -> tuple[Any, Any]:
    import transformers
    from transformers import LlamaConfig

    tokens = tokenizer(*("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"), *(
        f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)
    ))  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=LlamaConfig(**TEXT), scale_factor=2, pad_token_id=0,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, without_video(f"{kind}Processor")(images, tokens, image_seq_len=4, **more)


def idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3ImageProcessorPil

    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    return _idefics("Idefics3", Idefics3ImageProcessorPil(**size), {})


def smolvlm() -> tuple[Any, Any]:
    from transformers import SmolVLMImageProcessorPil

    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    return _idefics("SmolVLM", SmolVLMImageProcessorPil(**size), {"video_processor": None})


FAMILIES = {
    made.__name__: made
    for made in (
        llava, internvl, qwen2_5_vl, qwen2_vl, qwen3_vl, llava_next, llava_onevision, gemma3, idefics3, smolvlm,
    )
}  # fmt: skip
PROMPT_TOKEN = {"gemma3": "<start>"}  # what stands for an image in a prompt; <image> elsewhere


def save_processor(processor: Any, folder: Path) -> None:
    """As `save_pretrained`, which fails without a video processor."""
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    named = inspect.signature(type(processor).__init__).parameters
    plain = {name: value for name in named if isinstance(value := getattr(processor, name, None), (int, str))}
    fields = {"processor_class": type(processor).__name__, **plain}
    (folder / "processor_config.json").write_text(json.dumps(fields), encoding="utf-8")


class Theirs:
    """transformers' model and processor, saved in `folder`."""

    def __init__(self, name: str, folder: Path, made: tuple[Any, Any] | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.folder = folder
        config, self.processor = made or FAMILIES[name]()
        torch.manual_seed(0)
        self.model = AutoModelForImageTextToText.from_config(config).float().eval()
        with torch.no_grad():
            for value in self.model.parameters():  # large, so that answers depend on what is seen
                if value.ndim > 1:
                    value.normal_(0.0, 0.12)
            if name == "gemma3":  # its text embeddings are scaled up
                self.model.model.multi_modal_projector.mm_input_projection_weight.normal_(0.0, 2.0)
        self.model.generation_config.eos_token_id = None
        self.model.save_pretrained(folder)
        save_processor(self.processor, folder)

    def inputs(self, text: str, images: list[Any]) -> dict[str, Any]:
        return dict(self.processor(text=text, images=images or None, return_tensors="pt"))

    def answer(self, text: str, images: list[Any], num: int) -> list[int]:
        import torch

        given = self.inputs(text, images)
        with torch.inference_mode():
            out = self.model.generate(**given, max_new_tokens=num, do_sample=False)
        return out[0, given["input_ids"].shape[1] :].tolist()


@functools.cache
def theirs(name: str, folder: Path) -> Theirs:
    return Theirs(name, folder)
