"""The embedded models: small, in ordinary files, better than xz, and reproducible by a script."""

import json
import re
import runpy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import labkit as lk
from labkit.assets import EMBEDDED, path


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_the_files_are_ordinary_and_small(name):
    model = AutoModelForCausalLM.from_pretrained(path(name))
    tokenizer = lk.Tokenizer.load(path(name))
    assert model.config.model_type == "llama" and model.config.vocab_size == tokenizer.vocab_size == 4096
    assert model.dtype == torch.bfloat16
    assert path(name).joinpath("tokenizer.json").read_bytes() == path("tiny").joinpath("tokenizer.json").read_bytes()


def test_all_of_it_stays_below_twenty_five_megabytes():
    files = [file for name in EMBEDDED for file in path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 25e6


def test_unknown_names_are_answered():
    with pytest.raises(ValueError, match="unknown embedded model 'tinny'; did you mean 'tiny'"):
        path("tinny")


def card(name: str, row: str) -> float:
    found = re.search(rf"\| {row} \| ([\d.]+) \|", path(name).joinpath("README.md").read_text())
    return float(found[1])


def test_the_card_says_it_beats_xz_and_a_sample_bears_it_out():
    assert card("tiny", "bits per byte, held out") < card("tiny", "xz -9e on the same bytes")
    from labkit.assets.train import bits_per_byte, sources, xz_bits_per_byte

    model = AutoModelForCausalLM.from_pretrained(path("tiny")).eval()
    held_out = sorted((text for text in sources()[1] if len(text) > 3000), key=len)[:6]
    ours = bits_per_byte(model, lk.Tokenizer.load(path("tiny")).backend, held_out)
    assert ours < xz_bits_per_byte(held_out)


def test_the_engine_has_the_perplexity_of_transformers():
    """Teacher-forced in bfloat16: KL at most 1e-2, the same first choice for 99 of 100 tokens."""
    text = (path("tiny").parent / "train.py").read_text()
    with lk.Engine(num_blocks=256) as eng:
        ids = eng.tokenizer.encode(text)[:600]
        found = eng.generate(ids, lk.SamplingParams(max_tokens=1, prompt_logprobs=20, temperature=0)).prompt_logprobs
    model = AutoModelForCausalLM.from_pretrained(path("tiny"), dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    same = kl = 0.0
    for position, entry in found.items():
        line = scores[position - 1]
        same += entry.top_ids[0] == int(line.argmax())
        theirs, ours = line[list(entry.top_ids)].double(), torch.tensor(entry.top).double()
        kl += float((theirs.exp() * (theirs - ours)).sum())
    assert kl / len(found) <= 1e-2
    assert same / len(found) >= 0.98  # of 600 tokens one or two may be a tie in bfloat16


def test_the_script_that_made_them_runs_and_learns(tmp_path, monkeypatch):
    words = ["train", "--quick", "--which", "tiny-draft", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "labkit.assets.train", raising=False)
    runpy.run_module("labkit.assets.train", run_name="__main__", alter_sys=True)  # as python -m, without a new process
    loss = [value for _, value in json.loads((tmp_path / "tiny-draft" / "training.json").read_text())["loss"]]
    assert loss[-1] < loss[0] - 0.5
    assert lk.load_model(tmp_path / "tiny-draft").vocab_size == 4096
