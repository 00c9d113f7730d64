"""Random small models with images, in transformers' own files, and what transformers itself answers with them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

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


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {text: i for i, text in enumerate((*CHARACTERS, *SPECIAL))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", extra_special_tokens=list(SPECIAL[1:])
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


FAMILIES = {"llava": llava}


class Theirs:
    """transformers' model and processor, saved in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.folder = folder
        config, self.processor = FAMILIES[name]()
        torch.manual_seed(0)
        self.model = AutoModelForImageTextToText.from_config(config).float().eval()
        with torch.no_grad():
            for value in self.model.parameters():  # large, so that answers depend on what is seen
                if value.ndim > 1:
                    value.normal_(0.0, 0.12)
        self.model.generation_config.eos_token_id = None
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

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
