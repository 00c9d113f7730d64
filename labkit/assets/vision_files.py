"""The files of the embedded vision-language model: tokenizer, processor, weights, card, and how they are examined.

Knows no training (`train_vision`). Reads and answers with transformers alone, without torchvision."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .drawings import HELD_OUT, KINDS, TRAINING, drawing
from .drawings.questions import questions
from .drawings.scene import random_scene

NAME = "tiny-vision"
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
END_OF_TEXT, PAD, _, USER, ASSISTANT, END, IMAGE = range(7)
TEMPLATE = (  # a message's images stand before its text
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] in ['image', 'image_url'] %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIDE, PATCH = 96, 12
PATCHES = (SIDE // PATCH) ** 2
VOCAB = 544
CONTEXT = 1024


# -- the tokenizer and the processor -----------------------------------------------------------------------------


def make_tokenizer():
    """Byte-level BPE over the questions: their words are one token each, any other text survives too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng([TRAINING, 2**40])
    texts = [text for _ in range(4000) for found in questions(random_scene(rng), rng) for text in found[1:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def processor_settings() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},  # the whole picture, squeezed: nothing is cut off
        "resample": 3,
        "do_center_crop": False,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def save_processor(tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")

    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write("preprocessor_config.json", processor_settings())
    write(
        "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )


def pixels_of(image: Any) -> np.ndarray:
    """What the processor does, [3, SIDE, SIDE]. A test compares them."""
    small = np.asarray(image.resize((SIDE, SIDE), 3), np.float32)
    return ((small / 255 - 0.5) / 0.5).transpose(2, 0, 1)


# -- weights, answers and the card -------------------------------------------------------------------------------


def save_model(model, folder: Path) -> None:
    state = {key: value.bfloat16() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """Model, image processor and tokenizer as transformers reads them, without torchvision."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return model, CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def answers(model, processor, tokenizer, asked: list[tuple[Any, str]]) -> list[str]:
    """transformers' greedy answer to each (image, question), asked alone."""
    texts = []
    for _, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        texts.append(text.replace("<image>", "<image>" * PATCHES))
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    pixels = processor([image for image, _ in asked], return_tensors="pt")["pixel_values"].to(model.dtype)
    made = model.generate(**inputs, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out(count: int) -> list[tuple[str, str, Any, str, str]]:
    """(kind, topic, image, question, answer): up to four questions of each of `count` held-out drawings."""
    found = []
    for seed in range(count):
        made = drawing(seed, KINDS[seed % len(KINDS)], stream=HELD_OUT)
        found += [(made.scene.kind, topic, made.image, q, a) for topic, q, a in made.questions[:4]]
    return found


def examine(folder: Path, count: int) -> dict[tuple[str, str], list[bool]]:
    """The files' answers to held-out questions, by kind of picture and topic."""
    parts, questions_ = load(folder, "bfloat16"), held_out(count)
    found = defaultdict(list)
    for first in range(0, len(questions_), 64):
        some = questions_[first : first + 64]
        for (kind, topic, _, _, answer), said in zip(some, answers(*parts, [q[2:4] for q in some]), strict=True):
            found[kind, topic].append(said == answer)
    return dict(found)


def write_card(folder: Path, facts: dict[str, str], found: dict[tuple[str, str], list[bool]], drawings: int) -> None:
    def line(name: str, values: list[bool]) -> str:
        return f"| {name} | {len(values)} | {100 * float(np.mean(values)):.1f}% |"

    rows = [line("all", [v for values in found.values() for v in values])]
    for kind in KINDS:
        rows.append(line(f"**{kind}**", [v for key, values in found.items() if key[0] == kind for v in values]))
        rows += [line(f"{kind}: {topic}", found[k, topic]) for k, topic in sorted(found) if k == kind]
    listed = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    table = "\n".join(rows)
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: [en]
tags: [llava, clip, labkit]
---
# {NAME}

A LLaVA (CLIP tower, projector, Llama decoder) for tests, lessons and demonstrations of serving vision-language models,
trained from random weights on drawings: coloured shapes, numbers of up to three digits, bar charts with heights from 1
to 10, and line plots in the style of everyday figures. It answers short questions about them in a word or a number.

It knows only what the drawings of `labkit.assets.drawings` look like and only the questions that are asked there, in
those wordings. It cannot read text or axis labels, and photographs mean nothing to it. It was trained on one picture,
which stands at the beginning of a conversation; it says something also about two, and it will be wrong.

| | |
|---|---|
{listed}

Answered exactly, greedy, in bfloat16, by transformers' `generate`: {drawings} held-out drawings, whose seeds are in a
stream of their own that training never draws from, up to four questions each, every question asked alone.

| questions | asked | right |
|---|---|---|
{table}

Made by `python -m labkit.assets.train_vision`; the chat form is `<|user|><image>...<|end|><|assistant|>`, with <image>
repeated {PATCHES} times. Pictures are squeezed to {SIDE} x {SIDE} pixels.
"""
    )


def summary(found: dict[tuple, list[bool]]) -> str:
    everything = [value for values in found.values() for value in values]
    parts = [f"{np.mean(everything):.3f}"]
    kinds = {kind: [v for key, values in found.items() if key[0] == kind for v in values] for kind in KINDS}
    parts += [f"{kind} {np.mean(values):.3f}" for kind, values in kinds.items()]
    worst = sorted(found, key=lambda key: np.mean(found[key]))[:6]
    parts.append("worst " + ", ".join(f"{key[1]} {np.mean(found[key]):.2f}" for key in worst))
    return " | ".join(parts)
