"""Trains the embedded models on the source code of the running Python's standard library.

    python -m labkit.assets.train                         # both models, into this folder: an hour on two cores
    python -m labkit.assets.train --quick --out /tmp/try  # seconds: checks that everything runs and the loss falls

Start with `main`: corpus, tokenizer, training for a number of steps, model card. Does not use the engine.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB = 4096
SHAPES = {  # hidden size, layers, heads, key heads, intermediate size
    "tiny": (256, 8, 8, 4, 688),
    "tiny-draft": (128, 3, 4, 2, 344),
}
STEPS = {"tiny": 1800, "tiny-draft": 2600}
QUICK_STEPS = 40
CONTEXT, LONG = 1024, 2048  # most steps; the last sixth


# -- the corpus --------------------------------------------------------------------------------------------------


def sources(most_files: int | None = None) -> tuple[list[str], list[str]]:
    """The standard library's files as text, split into training and held-out files by a file's own path."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    paths = [path for path in paths if not {"site-packages", "dist-packages"} & set(path.parts)]
    for path in paths[:: max(1, len(paths) // most_files)] if most_files else paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests are written in other encodings on purpose
            continue
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        (held_out if digest[0] < 6 else train).append(text)  # 6 of 256: about 2%
    return train, held_out


def chats(texts: list[str], rng: random.Random) -> list[list[dict[str, str]]]:
    """Question and answer pairs taken from the sources: what a function does, what its code is."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # sources that are wrong on purpose
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            doc = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
            if 20 < len(doc) < 600:
                ask = rng.choice(["What does `{}` do?", "Explain `{}`.", "What is `{}` for?"]).format(node.name)
                found.append((ask, doc))
            code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef) and 60 < len(code) < 900 and rng.random() < 0.25:
                arguments = ", ".join(argument.arg for argument in node.args.args)
                found.append((rng.choice(["Write `{}`.", "Show me `{}`."]).format(f"{node.name}({arguments})"), code))
    rng.shuffle(found)
    system = {"role": "system", "content": "You know Python's standard library."}
    return [
        [*([system] if rng.random() < 0.3 else []), {"role": "user", "content": ask},
         {"role": "assistant", "content": answer}]
        for ask, answer in found
    ]  # fmt: skip


# -- the tokenizer -----------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]):
    """Byte-level BPE, so that any text survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": LONG,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def chat_text(messages: list[dict[str, str]]) -> str:
    """The same text that TEMPLATE produces."""
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """One stream of tokens, each text followed by <|endoftext|>."""
    end = tokenizer.token_to_id("<|endoftext|>")
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream += [end, *encoding.ids]
    return np.array([*stream, end], np.uint16)


# -- training ----------------------------------------------------------------------------------------------------


class Muon:
    """Momentum whose matrix updates are orthogonalized (Newton-Schulz). Matrices of one shape are updated as one
    batch. A convolution's weight is the matrix of its outputs."""

    def __init__(self, matrices: list[torch.Tensor], momentum: float = 0.95, rounds: int = 5) -> None:
        self.groups: dict[torch.Size, list[torch.Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.flatten(1).shape, []).append(matrix)
        self.velocity = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}
        self.momentum, self.rounds = momentum, rounds

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad.flatten(1) for matrix in group])
            velocity = self.velocity[shape].mul_(self.momentum).add_(gradient)
            update = orthogonal(gradient + self.momentum * velocity, self.rounds)
            update = update * math.sqrt(max(1, shape[0] / shape[1]))
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - 0.05 * rate).sub_(change.view_as(matrix), alpha=rate)


def orthogonal(x: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


def make_model(name: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, key_heads, intermediate = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=VOCAB,
        max_position_embeddings=LONG,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [0, SPECIAL.index("<|end|>")]
    model.generation_config.pad_token_id = 1
    return model


def batches(stream: np.ndarray, length: int, tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """Random windows of the stream, [tokens / length, length + 1]."""
    starts = rng.integers(0, len(stream) - length - 1, max(1, tokens // length))
    return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(name: str, stream: np.ndarray, steps: int, tokens_a_step: int, quick: bool, save) -> tuple:
    """Train for this many steps, with a learning rate that ends at 0. Returns the model, steps, tokens, [(step,
    loss)]."""
    seed = 0
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model(name)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    compiled = loss_of if quick else torch.compile(loss_of)  # 1.4 times as fast on two cores, after a minute
    history, begin, step, num_tokens, saved = [], time.monotonic(), 0, 0, time.monotonic()
    while (spent := step / steps) < 1:
        rate = min(1.0, (step + 1) / (5 if quick else 30)) * min(1.0, (1 - spent) / 0.5)
        late = spent > 0.84 and not quick
        batch = batches(stream, LONG if late else CONTEXT, tokens_a_step, rng)
        loss = (loss_of if late else compiled)(model, batch)
        loss.backward()
        adam.param_groups[0]["lr"] = 0.006 * rate
        adam.step()
        muon.step(0.02 * rate)
        model.zero_grad(set_to_none=True)
        step, num_tokens = step + 1, num_tokens + batch[:, 1:].numel()
        history.append((step, loss.item()))
        if step % 20 == 1:
            speed = num_tokens / (time.monotonic() - begin)
            print(f"{name} step {step} {spent:.0%} loss {np.mean([x for _, x in history[-20:]]):.3f} {speed:.0f} tok/s",
                  flush=True)  # fmt: skip
        if time.monotonic() - saved > 300:
            save(model)
            saved = time.monotonic()
    save(model)
    return model, step, num_tokens, history


# -- evaluation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: list[str], length: int = 1024, stride: int = 512) -> float:
    """Teacher-forced over overlapping windows; every byte of each text counts."""
    bits = 0.0
    for text in texts:
        ids = torch.from_numpy(encode(tokenizer, [text])[:-1].astype(np.int64))
        done = 1
        while done < len(ids):
            first = max(0, done - (length - stride))
            window = ids[first : first + length]
            logits = model(window[None]).logits[0].float()
            losses = F.cross_entropy(logits[:-1], window[1:], reduction="none")
            new = losses[done - first - 1 :]
            bits += new.sum().item() / math.log(2)
            done += len(new)
    return bits / max(1, num_bytes(texts))


def xz_bits_per_byte(texts: list[str]) -> float:
    """xz -9e over all texts as one stream. This is the harder comparison, as xz then learns from one file for the
    next."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(data))


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def write_card(folder: Path, name: str, facts: dict[str, object]) -> None:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: [en]
tags: [python, llama, labkit]
---
# {name}

A Llama-architecture model for tests, lessons and demonstrations of LLM serving, trained on the standard library of
Python {sys.version.split()[0]} (whose sources are under the PSF licence). It writes text that looks like Python and
short answers in the manner of docstrings; it has no reliable knowledge, so do not trust its answers.

| | |
|---|---|
{rows}

Made by `python -m labkit.assets.train`; the chat form is `<|user|>...<|end|><|assistant|>`.
"""
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded models.")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--which", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="a few seconds on a few files")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    texts, held_out = sources(60 if args.quick else None)
    held_out = held_out or texts[:1]
    existing = args.out / "tiny" / "tokenizer.json"
    if args.which == "tiny-draft" and existing.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(existing))
    else:
        tokenizer = make_tokenizer(texts)
    code = encode(tokenizer, texts)
    talks = [chat_text(messages) for messages in chats(texts, random.Random(0))]
    talk = encode(tokenizer, talks)
    stream = np.concatenate((code, talk, talk[: len(talk) // 2]))
    print(
        f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(code)} + {len(talk)} tokens",
        flush=True,
    )
    for name in SHAPES if args.which == "both" else [args.which]:
        folder = args.out / name
        save_tokenizer(tokenizer, folder)
        steps = args.steps or (QUICK_STEPS if args.quick else STEPS[name])

        def save(model, folder: Path = folder) -> None:
            state = {key: value.bfloat16() for key, value in model.state_dict().items() if key != "lm_head.weight"}
            model.save_pretrained(folder, state_dict=state)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")

        model, steps, num_tokens, history = train(
            name, stream, steps, CONTEXT if args.quick else 8192, args.quick, save
        )
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        sample = held_out[:1] if args.quick else held_out
        ours, xz = bits_per_byte(model, tokenizer, sample), xz_bits_per_byte(sample)
        print(f"{name}: {ours:.3f} bits per byte held out, xz -9 {xz:.3f}", flush=True)
        facts = {
            "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, bfloat16",
            "shape": "hidden {}, {} layers, {} heads, {} key heads, intermediate {}".format(*SHAPES[name]),
            "vocabulary": f"{tokenizer.get_vocab_size()}, byte-level BPE",
            "context": f"{LONG} ({CONTEXT} for five sixths of the training)",
            "trained on": f"{len(texts)} files, {num_bytes(texts):,} bytes; {len(talks):,} questions made from them",
            "steps, tokens": f"{steps:,}, {num_tokens:,}",
            "last training loss": f"{np.mean([loss for _, loss in history[-50:]]):.3f} nats a token",
            "held out": f"{len(sample)} files, {num_bytes(sample):,} bytes, chosen by a hash of their path",
            "bits per byte, held out": f"{ours:.3f}",
            "xz -9e on the same bytes": f"{xz:.3f}",
        }
        write_card(folder, name, facts)
        (folder / "training.json").write_text(json.dumps({"loss": history[:: max(1, len(history) // 200)]}) + "\n")


if __name__ == "__main__":
    main()
