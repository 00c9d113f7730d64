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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawings import TRIAL
from .train import Muon
from .vision_batches import Batch, Maker
from .vision_files import (
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
    save_model,
    save_processor,
    summary,
    write_card,
)  # fmt: skip
from .vision_naming import GROUPS, Naming

TOWER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
# First the tower alone learns to name what lies under each patch, then everything learns to answer.
SEEING, STEPS = 2400, 10000
QUICK_SEEING, QUICK_STEPS = 4, 6
EYES = ("vision_tower", "multi_modal_projector", "embed_tokens")  # what the first steps train
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


# -- training ----------------------------------------------------------------------------------------------------


class Learner(torch.nn.Module):
    """The model, and what is needed to name what lies under each patch. That teaches the tower to see before the
    decoder has learned to ask; its own vectors are thrown away."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.model = make_model()
        self.tower = self.model.model.vision_tower
        with torch.no_grad():  # patches know their places from the start
            self.tower.embeddings.position_embedding.weight[1:] = 0.35 * places(SIDE // PATCH, TOWER["hidden_size"])
        self.names = Naming(tokenizer, TEXT["hidden_size"])
        for layer in self.model.model.language_model.layers:
            look_for_likeness(layer.self_attn)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of the answers and of the early ones, losses of the patches, and for each answer's token whether the
        first choice is right."""
        inner = self.model.model
        seen = self.see(batch.pixels)
        embed = inner.language_model.embed_tokens
        images, length = batch.tokens.shape
        first = embed(torch.full((images, 1), USER))
        inputs = torch.cat((first, seen, embed(batch.tokens)), 1)
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
        soon = batch.early >= 0
        early = F.cross_entropy(self.model.lm_head(hidden[soon]), batch.early[soon])
        return F.cross_entropy(logits, wanted), early, self.naming(seen, batch.seen), logits.argmax(-1) == wanted

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_images, PATCHES, hidden size]: what the decoder is given, without the class token's."""
        return self.model.model.multi_modal_projector(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])

    def naming(self, seen: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.names(seen, words, self.model.model.language_model.embed_tokens.weight)


def places(grid: int, size: int) -> torch.Tensor:
    """Sines and cosines of each patch's column and row, [grid * grid, size]."""
    waves = 1.5 / 30 ** (torch.arange(size // 4) / (size // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = x.flatten()[:, None] * waves, y.flatten()[:, None] * waves
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1)


@torch.no_grad()
def look_for_likeness(attention) -> None:
    """One query head of each group begins by attending to what is like the token itself, wherever it stands: in the
    half of its dimensions that positions turn least, queries and keys are the same projection. Left to chance the
    decoder finds only after thousands of steps that the word "red" should look at red patches."""
    size, heads = attention.head_dim, attention.num_key_value_groups
    slow = torch.cat((torch.arange(size // 4, size // 2), torch.arange(3 * size // 4, size)))
    keys, queries = attention.k_proj.weight, attention.q_proj.weight
    for group in range(len(keys) // size):
        projection = 1.6 * torch.linalg.qr(torch.randn(keys.shape[1], len(slow)))[0].T
        keys[group * size + slow] = projection
        queries[group * heads * size + slow] = projection


@torch.no_grad()
def accuracy(learner: Learner, maker: Maker, stream: int, batches: int, images: int = 64) -> dict[tuple, list[bool]]:
    """For each kind of picture and topic: was each answer right to its end? An answer is what greedy decoding says if
    every token of it is the first choice after those before it, so one pass decides."""
    learner.eval()
    found = defaultdict(list)
    for step in range(batches):
        batch = maker.batch(step, images, 6, stream)
        right = torch.ones_like(batch.wanted, dtype=torch.bool)
        right[batch.wanted >= 0] = learner(batch)[-1]
        for line, places, asked in zip(right.numpy(), batch.place.numpy(), batch.asked, strict=True):
            for n, key in enumerate(asked):
                found[key].append(bool(line[places == n].all()))
    learner.train()
    return found


class Optimizers:
    """Muon for matrices, Adam for the rest: embeddings, norms, biases and the vectors of names."""

    def __init__(self, learner: Learner, only: tuple[str, ...] = ("",)) -> None:
        named = [(n, p) for n, p in learner.model.named_parameters() if any(part in n for part in only)]
        flat = [p for n, p in named if p.ndim > 1 and ("patch_embedding" in n or "embed" not in n)]
        taken = set(map(id, flat))
        self.others = [p for _, p in named if id(p) not in taken]
        self.others += learner.names.parameters()
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
    learner, maker, step, history = Learner(tokenizer), Maker(tokenizer), -seeing, []
    state = torch.load(keep, weights_only=True) if keep and keep.exists() else None
    if state is not None:
        learner.load_state_dict(state["learner"])
        step, history = state["step"], state["history"]
        print(f"resumed at step {step}", flush=True)
    optimizers = Optimizers(learner, EYES if step < 0 else ("",))
    if state is not None:
        optimizers.load(state)
    saved, recent = time.monotonic(), []

    def make(step: int):
        return maker.pictures(step + seeing, SEEN) if step < 0 else maker.batch(step, images, QUESTIONS)

    pool = ThreadPoolExecutor(1)
    made = pool.submit(make, step)
    while step < steps:
        if step < 0:
            pixels, seen = made.result()
            losses = [*learner.naming(learner.see(pixels), seen)]
            total, warm, rate = sum(losses), (step + seeing + 1) / 40, max(0.1, min(1.0, -step / seeing / 0.4))
        else:
            answers, early, patches, right = learner(made.result())
            losses = [*patches, early, answers, right.float().mean()]
            total, warm = answers + 0.5 * early + patches.sum(), (step + 1) / 60
            rate = 0.2 * min(1.0, (1 - step / steps) / 0.4)
            history.append((step, round(answers.item(), 4)))
        made = pool.submit(make, step + 1)  # during `backward`, which leaves Python to other threads
        total.backward()
        torch.nn.utils.clip_grad_norm_(optimizers.others, 1.0)
        optimizers.step(min(1.0, warm) * rate)
        learner.zero_grad(set_to_none=True)
        step += 1
        recent = [*recent[-49:], [loss.item() for loss in losses]]
        if step % 50 == 0 or step == steps:
            named = zip((*GROUPS, "early", "answers", "tokens right"), np.mean(recent, 0), strict=False)
            print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in named), flush=True)
        if step == 0:
            optimizers, recent = Optimizers(learner), []
        if step > 0 and step % 500 == 0:
            print(f"  trial: {summary(accuracy(learner, maker, TRIAL, 2))}", flush=True)
        if keep and (step == 0 or time.monotonic() - saved > every):
            state = {"learner": learner.state_dict(), "history": history, "step": step, **optimizers.state()}
            torch.save(state, keep.with_suffix(".new"))
            keep.with_suffix(".new").replace(keep)
            save(learner.model)
            saved = time.monotonic()
    pool.shutdown()
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
