"""Recorded steps also serve drafts: the passes of a draft model, and the rows that verify its guesses."""

import pytest
import torch
from labkit_kernels.calls import Function

import labkit as lk
from labkit.loading import dense

PROMPTS = ["def read_lines(path):\n    with open(path) as f:\n", "for i in range(3):\n    x = i\n"]


@Function
def product(out, x, weight, residual):
    with torch._C.DisableTorchFunction():
        torch.mm(x, weight.T, out=out)
        if residual is not None:
            residual.add_(out)


def multiply(x, weight, bias=None):
    out = x.new_empty(len(x), len(weight))
    product(out, x, weight, None)
    return out


def multiply_add(residual, x, weight):
    product(x.new_empty(len(x), len(weight)), x, weight, residual)
    return residual


@pytest.fixture
def recorded_products(monkeypatch):
    """Products that can be recorded, on any machine."""
    ours, usual = {"matmul": multiply, "matmul_add": multiply_add}, dense.picked
    monkeypatch.setattr(dense, "picked", lambda name, *where: ours.get(name) or usual(name, *where))


def serve(draft, graphs):
    eng = lk.Engine(num_blocks=200, dtype="float32", graphs=graphs, draft=draft)
    handles = [
        eng.submit(prompt, lk.SamplingParams(max_tokens=24, temperature=heat, seed=3, ignore_eos=True))
        for prompt in PROMPTS
        for heat in (0, 0.8)
    ]
    eng.run()
    eng.check()
    made = eng.runner.repeats and [list(r.made) for r in (eng.runner.repeats, eng.runner.drafter.repeats)]
    eng.close()
    return [handle.output_ids for handle in handles], made


@pytest.mark.parametrize("num", [3])
def test_repeated_steps_with_drafts_give_the_same_tokens(recorded_products, num):
    draft = lk.ModelDraft("tiny-draft", num, adaptive=False)
    usual, _ = serve(draft, False)
    found, (verified, drafted) = serve(draft, None)
    assert found == usual
    assert {tokens for tokens, *_ in verified} & {rows * (num + 1) for rows in range(2, 9)} and drafted
