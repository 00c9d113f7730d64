"""Is a model type served as transformers computes it? One engine over random weights against transformers' own forward
without a cache, position by position."""

from __future__ import annotations

import gc
import random
import tempfile
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import labkit as lk
from labkit.loading.towers import TEXT_ALONE
from labkit.models import load_model
from labkit.models.decoder import Decoder
from labkit.models.encoder import Encoder
from labkit.models.vision import SEEING, language_config
from tests.models.tiny import VOCAB, tiny_config

CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
KINDS = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
NATIVE, WIDE, REFUSED, WRONG, UNBUILT, CRASHED = "native", "transformers", "refused", "WRONG", "not built", "CRASHED"
ENCODER = "encoder"
NUM = 8  # tokens that are generated
SLACK = 5e-3  # of a log-probability
LENGTHS = (3, 21, 40)


class Outcome(NamedTuple):
    kind: str
    how: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.how}{f' ({self.why})' if self.why else ''}"


def random_model(kind: str, seed: int = 0) -> Any:
    """transformers' own model with random weights; norms, biases and everything else that starts as a constant are
    random, too."""
    config = tiny_config(kind)
    auto = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.1 * torch.randn_like(value)
            elif "experts" in name or "gate.weight" in name or "router" in name or value.std() < 1e-3:
                value.normal_(0.0, 0.2)
        for name, value in model.named_buffers():  # biases of routers
            if "bias" in name and value.is_floating_point():
                value.normal_(0.0, 0.1)
    return model


def outcome(kind: str, seed: int = 0) -> Outcome:
    """How this kind of model is served, and what is wrong with it."""
    if (refused := _refused_by_type(kind)) is not None:
        return Outcome(kind, REFUSED, refused)
    try:
        theirs = random_model(kind, seed)
    except Exception as error:  # anything that a config of transformers may raise
        return Outcome(kind, UNBUILT, _said(error))
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs.save_pretrained(folder)
            theirs(torch.tensor([[3, 4, 5]]))
        except Exception as error:
            return Outcome(kind, UNBUILT, _said(error))
        try:
            model = load_model(folder, dtype="float32", max_model_len=128)
        except ValueError as error:
            return Outcome(kind, REFUSED, _said(error).replace(folder, "it"))
        except Exception as error:  # which a user would get
            return Outcome(kind, WRONG, f"raises {_said(error)}")
    if isinstance(model, Encoder):
        return Outcome(kind, ENCODER)
    how = NATIVE if isinstance(model, Decoder) else WIDE
    blocks = lk.BlockManager(64, 4, num_states=12 if getattr(model, "states", ()) else None)
    sched = lk.Scheduler(blocks, max_model_len=128, max_num_batched_tokens=17, max_prefill_chunk=7, watermark=0.0)
    engine = lk.Engine(scheduler=sched, runner=lk.TorchRunner(model))
    try:
        wrong = _difference(engine, theirs, random.Random(seed))
    except Exception as error:
        wrong = f"raises {_said(error)}"
    finally:
        engine.close()
        gc.collect()
    return Outcome(kind, WRONG, f"{how}: {wrong}") if wrong else Outcome(kind, how)


def _refused_by_type(kind: str) -> str | None:
    """What a model that sees is refused with, where it is by its type alone."""
    config_class = CONFIG_MAPPING[kind]
    if "vision_config" not in config_class.sub_configs or kind in (*SEEING, *TEXT_ALONE):
        return None
    try:
        config = tiny_config(kind)
        language_config(config, None)
    except ValueError as error:
        return _said(error) if "not served" in str(error) else None
    except Exception:  # the config is not made, which is said elsewhere
        return None
    return None


def _difference(engine: lk.Engine, theirs: Any, rng: random.Random) -> str:
    """What differs, in words: in chunks that are computed together; then behind a prefix that is cached."""
    prompts = [[rng.randrange(3, VOCAB - 8) for _ in range(length)] for length in LENGTHS]
    first = engine.generate(prompts, lk.SamplingParams(
        max_tokens=NUM, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0,
    ))  # fmt: skip
    again = [prompts[-1][:33] + prompts[0], prompts[-1] + [5]]
    second = engine.generate(again, lk.SamplingParams(max_tokens=NUM, temperature=0, ignore_eos=True, logprobs=0))
    for prompt, handle in zip([*prompts, *again], [*first, *second], strict=True):
        if found := _differs(prompt, handle, theirs):
            return f"{found}, prompt of {len(prompt)}"
    return ""


def _differs(prompt: list[int], handle: Any, theirs: Any) -> str:
    ids = prompt + list(handle.output_ids)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    for at, token in enumerate(ids[1:]):
        if at + 1 < len(prompt):
            if at + 1 not in handle.prompt_logprobs:
                continue
            ours = handle.prompt_logprobs[at + 1].logprob
        else:
            ours = handle.logprobs[at + 1 - len(prompt)].logprob
            if (gap := float(expected[at].max() - expected[at, token])) > SLACK:
                return f"token {at + 1} is not the likeliest: {gap:.3g} below"
        if not abs(ours - float(expected[at, token])) <= SLACK:
            return f"token {at + 1}: log-probability {ours:.4f}, transformers' {float(expected[at, token]):.4f}"
    return ""


def _said(error: Exception) -> str:
    return f"{'' if type(error) is ValueError else type(error).__name__ + ': '}{' '.join(str(error).split())[:300]}"
