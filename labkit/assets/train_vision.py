"""Trains the embedded vision-language model on drawings that it makes itself.

    python -m labkit.assets.train_vision                         # into this folder: about half an hour on one core
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

from .drawings import KINDS, TRAINING, TRIAL
from .drawings.paint import WHAT, paint
from .drawings.questions import questions
from .drawings.scene import COLOURS, random_scene
from .train import Muon
from .vision_files import (
    ASSISTANT,
    CONTEXT,
    END,
    END_OF_TEXT,
    IMAGE,
    NAME,
    PAD,
    PATCH,
    PATCHES,
    SIDE,
    USER,
    VOCAB,
    examine,
    make_tokenizer,
    pixels_of,
    save_model,
    save_processor,
    summary,
    write_card,
)  # fmt: skip

TOWER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
# First the tower alone learns to name what lies under each patch, then everything learns to answer.
SEEING, STEPS = 1500, 7000
QUICK_SEEING, QUICK_STEPS = 4, 6
SEEN, IMAGES, QUESTIONS = 16, 8, 8  # pictures a step, then pictures a step and questions a picture


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

    def pictures(self, step: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and what lies under each patch, without questions."""
        rng = np.random.default_rng([TRAINING, step, images, 77])
        made = [paint(random_scene(rng, KINDS[i % len(KINDS)]), SIDE) for i in range(images)]
        seen = np.stack([under_patches(found) for _, found in made]).astype(np.int64)
        return torch.from_numpy(np.stack([pixels_of(image) for image, _ in made])), torch.from_numpy(seen)

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
        self.tower = self.model.model.vision_tower
        with torch.no_grad():  # patches know their places from the start
            self.tower.embeddings.position_embedding.weight[1:] = 0.35 * places(SIDE // PATCH, TOWER["hidden_size"])
        self.what = torch.nn.Linear(TOWER["hidden_size"], 1 + len(WHAT))
        self.colour = torch.nn.Linear(TOWER["hidden_size"], 1 + len(COLOURS))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of the answers and of the patches, and for each answer's token whether the first choice is right."""
        inner = self.model.model
        features = self.see(batch.pixels)
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
        return F.cross_entropy(logits, wanted), self.naming(features, batch.seen), logits.argmax(-1) == wanted

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_images, PATCHES, hidden size], without the class token's."""
        return self.tower(pixel_values=pixels).last_hidden_state[:, 1:]

    def naming(self, features: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        what, colour = (seen + 7) // 8, torch.where(seen > 0, (seen - 1) % 8 + 1, 0)
        kinds = F.cross_entropy(self.what(features).flatten(0, 1), what.flatten())
        return kinds + F.cross_entropy(self.colour(features).flatten(0, 1), colour.flatten())


def places(grid: int, size: int) -> torch.Tensor:
    """Sines and cosines of each patch's column and row, [grid * grid, size]."""
    waves = 1.5 / 30 ** (torch.arange(size // 4) / (size // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = x.flatten()[:, None] * waves, y.flatten()[:, None] * waves
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1)


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


class Optimizers:
    """Muon for matrices, Adam for the rest: embeddings, norms, biases and the two heads."""

    def __init__(self, learner: Learner, only: str = "") -> None:
        named = [(n, p) for n, p in learner.model.named_parameters() if only in n]
        flat = [p for n, p in named if p.ndim > 1 and ("patch_embedding" in n or "embed" not in n)]
        taken = set(map(id, flat))
        self.others = [p for _, p in named if id(p) not in taken]
        self.others += [*learner.what.parameters(), *learner.colour.parameters()]
        self.muon = Muon(flat, rounds=3)
        self.adam = torch.optim.AdamW(self.others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, rate: float) -> None:
        self.adam.param_groups[0]["lr"] = 0.004 * rate
        self.adam.step()
        self.muon.step(0.02 * rate)

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.velocity}

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.velocity = state["muon"]


def train(
    tokenizer, seeing: int, steps: int, keep: Path | None, save, images: int = IMAGES, every: float = 120
) -> tuple[Learner, list]:
    """Train the tower for `seeing` steps, then everything for `steps`, with a learning rate that ends at 0. `keep` is a
    file to resume from, written every so many seconds. Until the rate begins to fall, at 60%, nothing depends on the
    number of steps."""
    torch.manual_seed(0)
    learner, maker, step, history = Learner(), Maker(tokenizer), -seeing, []
    state = torch.load(keep, weights_only=True) if keep and keep.exists() else None
    if state is not None:
        learner.load_state_dict(state["learner"])
        step, history = state["step"], state["history"]
        print(f"resumed at step {step}", flush=True)
    optimizers = Optimizers(learner, "vision_tower" if step < 0 else "")
    if state is not None:
        optimizers.load(state)
    saved, recent = time.monotonic(), []
    while step < steps:
        if step < 0:
            pixels, seen = maker.pictures(step + seeing, SEEN)
            losses = [learner.naming(learner.see(pixels), seen)]
            total, warm, rate = losses[0], (step + seeing + 1) / 40, max(0.1, min(1.0, -step / seeing / 0.4))
        else:
            answers, patches, right = learner(maker.batch(step, images, QUESTIONS))
            losses = [patches, answers, right.float().mean()]
            total, warm, rate = answers + patches, (step + 1) / 60, 0.4 * min(1.0, (1 - step / steps) / 0.4)
            history.append((step, round(answers.item(), 4)))
        total.backward()
        torch.nn.utils.clip_grad_norm_(optimizers.others, 1.0)
        optimizers.step(min(1.0, warm) * rate)
        learner.zero_grad(set_to_none=True)
        step += 1
        recent = [*recent[-49:], [loss.item() for loss in losses]]
        if step % 50 == 0 or step == steps:
            named = zip(("patches", "answers", "tokens right"), np.mean(recent, 0), strict=False)
            print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in named), flush=True)
        if step == 0:
            optimizers, recent = Optimizers(learner), []
        if step > 0 and step % 400 == 0:
            print(f"  trial: {summary(accuracy(learner, maker, TRIAL, 2))}", flush=True)
        if keep and time.monotonic() - saved > every:
            state = {"learner": learner.state_dict(), "history": history, "step": step, **optimizers.state()}
            torch.save(state, keep.with_suffix(".new"))
            keep.with_suffix(".new").replace(keep)
            save(learner.model)
            saved = time.monotonic()
    save(learner.model)
    return learner, history


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded vision-language model.")
    parser.add_argument("--seeing", type=int, help=f"steps of the tower alone; default: {SEEING}")
    parser.add_argument("--steps", type=int, help=f"steps of everything; default: {STEPS}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--keep", type=Path, help="a file for the state of the training, to resume from")
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    args = parser.parse_args(argv)
    folder = args.out / NAME
    tokenizer = make_tokenizer()
    save_processor(tokenizer, folder)
    seeing, steps = (QUICK_SEEING, QUICK_STEPS) if args.quick else (args.seeing or SEEING, args.steps or STEPS)
    learner, history = train(tokenizer, seeing, steps, args.keep, lambda model: save_model(model, folder))
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
        "training": f"{seeing:,} steps of the tower alone, each with {SEEN} drawings; {steps:,} steps of everything, "
        f"each with {IMAGES} drawings of up to {QUESTIONS} questions",
        "last loss of the answers": f"{np.mean([loss for _, loss in history[-50:]]):.3f} nats a token",
    }
    write_card(folder, facts, found, count)
    (folder / "training.json").write_text(json.dumps({"loss": history[:: max(1, len(history) // 200)]}) + "\n")


if __name__ == "__main__":
    main()
