"""Random settings under which a score must be generation's to the bit: two engines of the same weights, which differ in
everything that decides what is computed together."""

from __future__ import annotations

import random
from typing import Any

import labkit as lk
from labkit.models import load_model
from tests.models.configs import VOCAB, config

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "olmo2", "starcoder2",
         "granite", "phi3")  # fmt: skip


def model_of(kind: str, dtype: str, seed: int = 1) -> Any:
    return load_model(config(kind), load_format="dummy", seed=seed, dtype=dtype, deterministic=True)


def engine_of(model: Any, rng: random.Random, tight: bool) -> lk.Engine:
    """An engine with blocks of a random size, few of them if `tight`, and a random budget."""
    size = rng.choice([4, 8, 16])
    blocks = lk.BlockManager(
        -(-(88 if tight else 2000) // size),
        size,
        num_host_blocks=rng.choice([0, 20]),
        prefix_caching=rng.random() < 0.8,
    )
    sched = lk.Scheduler(
        blocks, max_model_len=256, max_num_batched_tokens=rng.choice([7, 24, 512]), max_num_seqs=rng.choice([3, 5, 16]),
        preemption=rng.choice(["recompute", "swap"]), watermark=0.0,
    )  # fmt: skip
    return lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, seed=rng.randrange(100)))


def check_setting(model: Any, rng: random.Random) -> dict[str, int]:
    """Generate, score in another engine, compare; counts of what has happened on the way."""
    prefix = [rng.randrange(3, VOCAB) for _ in range(rng.choice([0, 9, 40]))]
    prompts = [
        prefix + [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 5, 20]))] for _ in range(rng.choice([1, 3, 5]))
    ]
    params = [
        lk.SamplingParams(max_tokens=rng.choice([1, 6, 15]), temperature=rng.choice([0.0, 0.7, 1.3]),
                          seed=rng.randrange(1000), ignore_eos=True, logprobs=rng.choice([0, 2]))
        for _ in prompts
    ]  # fmt: skip
    first = engine_of(model, rng, tight=rng.random() < 0.5)
    made = first.generate(prompts, params)
    second = engine_of(model, rng, tight=rng.random() < 0.5) if rng.random() < 0.7 else first
    others = [[rng.randrange(3, VOCAB) for _ in range(rng.choice([3, 30]))] for _ in range(rng.choice([0, 2]))]
    beside = [second.submit(prompt, lk.SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in others]
    wanted = list(zip(prompts, made, strict=True))
    rng.shuffle(wanted)
    scored = second.score([(prompt, handle.output_ids) for prompt, handle in wanted])
    for (prompt, handle), one in zip(wanted, scored, strict=True):
        assert one.prompt_ids == prompt and one.output_ids == handle.output_ids
        assert one.logprobs == [entry.logprob for entry in handle.logprobs]
    second.wait_for(beside)
    engines = {id(first): first, id(second): second}.values()
    counts = {
        "preempted": sum(engine.scheduler.num_preempted for engine in engines),
        "hit tokens": sum(engine.blocks.num_hit_tokens for engine in engines),
        "tokens": sum(len(one.logprobs) for one in scored),
    }
    for engine in engines:
        engine.check()
    return counts
