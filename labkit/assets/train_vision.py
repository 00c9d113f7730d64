"""Trains the embedded vision-language model on drawings that it makes itself.

    python -m labkit.assets.train_vision                         # into this folder: about an hour on one core
    python -m labkit.assets.train_vision --quick --out /tmp/try  # seconds: checks that everything runs

Start with `main`: tokenizer, training, the model card. A LLaVA of ordinary parts (CLIP tower, two-layer projector,
Llama decoder), from random weights. Does not use the engine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawings import HELD_OUT, KINDS, TRAINING, TRIAL, drawing
from .drawings.paint import WHAT, paint
from .drawings.questions import questions
from .drawings.scene import COLOURS, random_scene
from .train import Muon

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
VOCAB = 552
CONTEXT = 1024
TOWER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
STEPS, QUICK_STEPS = 3000, 6
IMAGES, QUESTIONS = 16, 8  # pictures a step, questions a picture


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


def make_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, hidden_act="gelu", projection_dim=128, **TOWER)
    text = LlamaConfig(
        vocab_size=VOCAB,
        num_key_value_heads=TEXT["num_attention_heads"] // 2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
        **TEXT,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.bos_token_id = END_OF_TEXT
    model.generation_config.eos_token_id = [END_OF_TEXT, END]
    model.generation_config.pad_token_id = PAD
    return model


# -- batches -----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Pictures, and behind each picture's tokens its questions with their answers in one row of tokens."""

    pixels: torch.Tensor  # [num_images, 3, SIDE, SIDE]
    tokens: torch.Tensor  # [num_images, length], without <|user|> and the picture's tokens in front of them
    segment: torch.Tensor  # [num_images, length]: 0 sees all before it, n only the picture and its own question
    position: torch.Tensor  # [num_images, length]
    wanted: torch.Tensor  # [num_images, length]: the next token where it belongs to an answer, else -100
    seen: torch.Tensor  # [num_images, PATCHES]: what lies under each patch (see `paint`), 0 for paper
    asked: list[list[tuple[str, str]]]  # kind of picture and topic, in the order of a row's questions
    place: torch.Tensor  # [num_images, length]: which question's answer is wanted here, else -1


def pixels_of(image: Any) -> np.ndarray:
    """What the processor does, [3, SIDE, SIDE]. A test compares them."""
    small = np.asarray(image.resize((SIDE, SIDE), 3), np.float32)
    return ((small / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def under_patches(found: np.ndarray) -> np.ndarray:
    """[PATCHES] labels: of each patch the middle one of the map's labels that are not paper."""
    grid = SIDE // PATCH
    cells = np.sort(found.reshape(grid, PATCH, grid, PATCH).transpose(0, 2, 1, 3).reshape(PATCHES, -1), axis=1)
    filled = (cells > 0).sum(1)
    middle = cells[np.arange(PATCHES), cells.shape[1] - 1 - filled // 2]
    return np.where(filled > 4, middle, 0)


class Maker:
    """Makes the batch of a step from the step's number alone, so that training can be resumed."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text).ids
        return self.known[text]

    def batch(self, step: int, images: int, most: int, stream: int = TRAINING) -> Batch:
        rng = np.random.default_rng([stream, step, images])
        apart = stream != TRAINING or rng.random() < 0.7  # questions that do not see each other, or a conversation
        rows, pixels, seen, asked = [], [], [], []
        for i in range(images):
            scene = random_scene(rng, KINDS[i % len(KINDS)])
            image, found = paint(scene, SIDE)
            pixels.append(pixels_of(image))
            seen.append(under_patches(found))
            pairs = questions(scene, rng, most)
            asked.append([(scene.kind, topic) for topic, _, _ in pairs])
            rows.append(self.row(pairs, apart))
        length = max(len(row[0]) for row in rows)
        columns = []
        for column, blank in enumerate((PAD, -1, 0, -100, -1)):
            block = np.full((images, length), blank, np.int64)
            for line, row in zip(block, rows, strict=True):
                line[: len(row[column])] = row[column]
            columns.append(torch.from_numpy(block))
        tokens, segment, position, wanted, place = columns
        return Batch(
            torch.from_numpy(np.stack(pixels)), tokens, segment, position, wanted,
            torch.from_numpy(np.stack(seen).astype(np.int64)), asked, place,
        )  # fmt: skip

    def row(self, pairs: list[tuple[str, str, str]], apart: bool) -> tuple[list[int], ...]:
        """Token, segment, position, wanted token and question of each token after the picture."""
        tokens, segment, position, wanted, place = [], [], [], [], []
        start = PATCHES + 1
        for n, (_, question, answer) in enumerate(pairs):
            ask = ([USER] if n and not apart else []) + [*self.ids(question), END, ASSISTANT]
            say = [*self.ids(answer), END]
            tokens += ask + say
            segment += [n + 1 if apart else 0] * (len(ask) + len(say))
            position += range(start, start + len(ask) + len(say))
            start = start if apart else start + len(ask) + len(say)
            wanted += [-100] * (len(ask) - 1) + say + [-100]
            place += [-1] * (len(ask) - 1) + [n] * len(say) + [-1]
        return tokens, segment, position, wanted, place


# -- training ----------------------------------------------------------------------------------------------------


class Learner(torch.nn.Module):
    """The model, and two heads that name what lies under each patch. They teach the tower to see before the decoder
    has learned to ask, and are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.what = torch.nn.Linear(TOWER["hidden_size"], 1 + len(WHAT))
        self.colour = torch.nn.Linear(TOWER["hidden_size"], 1 + len(COLOURS))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of the answers and of the patches, and for each answer's token whether the first choice is right."""
        inner = self.model.model
        features = inner.vision_tower(pixel_values=batch.pixels).last_hidden_state[:, 1:]
        embed = inner.language_model.embed_tokens
        images, length = batch.tokens.shape
        first = embed(torch.full((images, 1), USER))
        inputs = torch.cat((first, inner.multi_modal_projector(features), embed(batch.tokens)), 1)
        before = PATCHES + 1
        segment = F.pad(batch.segment, (before, 0))
        position = torch.cat((torch.arange(before).expand(images, -1), batch.position), 1)
        total = before + length
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        mine = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        hidden = inner.language_model(
            inputs_embeds=inputs, attention_mask=(causal & mine)[:, None], position_ids=position, use_cache=False
        ).last_hidden_state[:, before:]
        at = batch.wanted >= 0
        logits = self.model.lm_head(hidden[at])
        wanted = batch.wanted[at]
        what, colour = (batch.seen + 7) // 8, torch.where(batch.seen > 0, (batch.seen - 1) % 8 + 1, 0)
        patches = F.cross_entropy(self.what(features).flatten(0, 1), what.flatten())
        patches = patches + F.cross_entropy(self.colour(features).flatten(0, 1), colour.flatten())
        return F.cross_entropy(logits, wanted), patches, logits.argmax(-1) == wanted


@torch.no_grad()
def accuracy(learner: Learner, maker: Maker, stream: int, batches: int, images: int = 64) -> dict[tuple, list[bool]]:
    """For each kind of picture and topic: was each answer right to its end? An answer is what greedy decoding says if
    every token of it is the first choice after those before it, so one pass decides."""
    learner.eval()
    found = defaultdict(list)
    for step in range(batches):
        batch = maker.batch(step, images, 6, stream)
        right = torch.ones_like(batch.wanted, dtype=torch.bool)
        right[batch.wanted >= 0] = learner(batch)[2]
        for line, places, asked in zip(right.numpy(), batch.place.numpy(), batch.asked, strict=True):
            for n, key in enumerate(asked):
                found[key].append(bool(line[places == n].all()))
    learner.train()
    return found


def summary(found: dict[tuple, list[bool]]) -> str:
    everything = [value for values in found.values() for value in values]
    parts = [f"{np.mean(everything):.3f}"]
    kinds = {kind: [v for key, values in found.items() if key[0] == kind for v in values] for kind in KINDS}
    parts += [f"{kind} {np.mean(values):.3f}" for kind, values in kinds.items()]
    worst = sorted(found, key=lambda key: np.mean(found[key]))[:6]
    parts.append("worst " + ", ".join(f"{key[1]} {np.mean(found[key]):.2f}" for key in worst))
    return " | ".join(parts)


def train(tokenizer, steps: int, images: int, keep: Path | None, save, every: float = 120) -> tuple[Learner, list]:
    """Train for this many steps, with a learning rate that ends at 0. `keep` is a file to resume from, written every
    so many seconds. Until the rate begins to fall, at 60%, nothing depends on the number of steps."""
    torch.manual_seed(0)
    learner, maker = Learner(), Maker(tokenizer)
    named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    flat = [p for n, p in named if p.ndim == 2 and "embed" not in n and not n.startswith(("what", "colour"))]
    other = [p for n, p in named if not any(p is q for q in flat)]
    muon, adam = Muon(flat, rounds=3), torch.optim.AdamW(other, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    history, step = [], 0
    if keep and keep.exists():
        state = torch.load(keep, weights_only=False)
        learner.load_state_dict(state["learner"])
        adam.load_state_dict(state["adam"])
        muon.velocity, history, step = state["muon"], state["history"], state["step"]
        print(f"resumed at step {step}", flush=True)
    begin, saved, first = time.process_time(), time.monotonic(), step
    recent: list[tuple[float, float, float]] = []
    while step < steps:
        spent = step / steps
        rate = min(1.0, (step + 1) / 60) * min(1.0, (1 - spent) / 0.4)
        batch = maker.batch(step, images, QUESTIONS)
        answers, patches, right = learner(batch)
        (answers + (0.5 if step < 1000 else 0.2) * patches).backward()
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        adam.param_groups[0]["lr"] = 0.004 * rate
        adam.step()
        muon.step(0.02 * rate)
        learner.zero_grad(set_to_none=True)
        step += 1
        recent = [*recent[-49:], (answers.item(), patches.item(), right.float().mean().item())]
        history.append((step, round(recent[-1][0], 4)))
        if step % 50 == 0 or step == steps:
            a, p, r = np.mean(recent, 0)
            speed = (time.process_time() - begin) / (step - first)
            print(f"step {step} {step / steps:.0%} answers {a:.3f} patches {p:.3f} tokens right {r:.3f} "
                  f"{speed:.2f} s of processor a step", flush=True)  # fmt: skip
        if step % 400 == 0:
            print(f"  trial: {summary(accuracy(learner, maker, TRIAL, 2))}", flush=True)
        if keep and time.monotonic() - saved > every:
            state = {"learner": learner.state_dict(), "adam": adam.state_dict(), "muon": muon.velocity}
            torch.save({**state, "history": history, "step": step}, keep.with_suffix(".new"))
            keep.with_suffix(".new").replace(keep)
            save(learner.model)
            saved = time.monotonic()
    save(learner.model)
    return learner, history


# -- files and the card ------------------------------------------------------------------------------------------


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded vision-language model.")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--keep", type=Path, help="a file for the state of the training, to resume from")
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    args = parser.parse_args(argv)
    folder = args.out / NAME
    tokenizer = make_tokenizer()
    save_processor(tokenizer, folder)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    images = 8 if args.quick else IMAGES
    learner, history = train(tokenizer, steps, images, args.keep, lambda model: save_model(model, folder))
    count = 8 if args.quick else 800
    found = examine(folder, count)
    print(summary(found), flush=True)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in learner.model.model.named_children()}
    millions = {name: f"{size / 1e6:.2f} M" for name, size in (*parts.items(), ("all", sum(parts.values())))}
    facts = {
        "parameters": "{all}, bfloat16: tower {vision_tower}, decoder {language_model}".format(**millions),
        "pictures": f"{SIDE} x {SIDE} pixels, {PATCHES} patches of {PATCH} x {PATCH}: {PATCHES} tokens a picture",
        "tower": "hidden {}, {} layers, {} heads, intermediate {}".format(*TOWER.values()),
        "decoder": "hidden {}, {} layers, {} heads, intermediate {}".format(*TEXT.values()),
        "vocabulary": f"{VOCAB}, byte-level BPE",
        "steps, drawings, questions": f"{steps:,}, {steps * images:,}, up to {QUESTIONS} a drawing; every drawing new",
        "last loss of the answers": f"{np.mean([loss for _, loss in history[-50:]]):.3f} nats a token",
    }
    write_card(folder, facts, found, count)
    (folder / "training.json").write_text(json.dumps({"loss": history[:: max(1, len(history) // 200)]}) + "\n")


if __name__ == "__main__":
    main()
