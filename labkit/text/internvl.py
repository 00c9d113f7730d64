"""The processor of InternVL checkpoints as OpenGVLab publishes them, which come without one: tiles of images, and the
tokens that stand for them. Runs no code of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START, PLACE, END, IMAGE = "<img>", "<IMG_CONTEXT>", "</img>", "<image>"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # the same in all checkpoints: it is not in their files
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fields_of(folder: Path) -> dict[str, Any] | None:
    """The config of a folder that holds such a checkpoint."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        return None  # loading says so
    return found if isinstance(found, dict) and found.get("model_type") == "internvl_chat" else None


def processor_of(fields: Mapping[str, Any], tokenizer: Any, base: Any) -> Any:
    """transformers' InternVL processor with the checkpoint's tiles: `base` is its class, without videos, and
    `tokenizer` one of transformers."""
    from transformers import GotOcr2ImageProcessorPil

    with_thumbnail, tiles = bool(fields.get("use_thumbnail", False)), bool(fields.get("dynamic_image_size", False))

    class Tiles(GotOcr2ImageProcessorPil):
        """The published algorithm is the one of GOT-OCR2, where the whole image always comes last."""

        def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> Any:
            return super().crop_image_to_patches(*args, **{"use_thumbnail": with_thumbnail, **kwargs})

    vit = fields["vision_config"]
    side = fields.get("force_image_size") or vit.get("image_size", 448)
    ratio = fields.get("downsample_ratio", 0.5)
    images = Tiles(
        size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, crop_to_patches=tiles,
        min_patches=fields.get("min_dynamic_patch", 1), max_patches=fields.get("max_dynamic_patch", 12),
    )  # fmt: skip
    tokens = {"start_image_token": START, "end_image_token": END, "context_image_token": PLACE}
    for name, token in tokens.items():
        id = tokenizer.get_vocab().get(token)
        if id is None:
            raise ValueError(f"InternVL's tokenizer has no token {token!r}")
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", id)
    tokenizer.video_token = "<video>"
    kind = type("InternVLProcessor", (base,), {"images_kwargs": {}, "__module__": base.__module__})
    places = int((side // vit.get("patch_size", 14)) ** 2 * ratio**2)
    made = kind(images, tokenizer, video_processor=None, image_seq_length=places)
    # What a chat template or a caller writes for an image: published prompts have <image>, which is no token.
    made.placeholder = PLACE if PLACE in (tokenizer.chat_template or "") else IMAGE
    return made
