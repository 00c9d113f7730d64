"""The sampler draws from the right distribution for each parameter, alone and combined, by chi-square tests."""

import numpy as np
import pytest
import torch
from labkit_kernels.sampling.reference import filtered

import labkit as lk
from labkit.core.plan import Join
from labkit.sampling.sampler import Sampler

VOCAB, DRAWS = 24, 6000


def draw(params: lk.SamplingParams, logits: torch.Tensor, prompt: list[int], output: list[int]) -> np.ndarray:
    """The same position of DRAWS requests, each with a seed of its own."""
    from labkit_kernels import sample

    sampler = Sampler(VOCAB, DRAWS, (), 0, torch.device("cpu"))
    tokens = np.array([*prompt, *output], np.int32)
    sampler.join(Join(row, f"r{row}", tokens, len(prompt), params, 0, None, ()) for row in range(DRAWS))
    rows = np.arange(DRAWS)
    pick = sample.pick("cpu", torch.float32, vocab=VOCAB)
    drawn = sampler.draw(logits.repeat(DRAWS, 1), rows, np.full(DRAWS, len(tokens)), pick)
    assert not drawn.errors
    return drawn.tokens.numpy()


def expected(params: lk.SamplingParams, logits: torch.Tensor, prompt: list[int], output: list[int]) -> np.ndarray:
    """The distribution, worked out term by term."""
    x = logits.clone()[0]
    count = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB)
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    x = x - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if params.allowed_token_ids is not None:
        x[[i for i in range(VOCAB) if i not in params.allowed_token_ids]] = -torch.inf
    x = (x / params.temperature)[None]
    kept = filtered(x, torch.tensor([params.top_k]), torch.tensor([params.top_p]), torch.tensor([float(params.min_p)]))
    return kept.softmax(-1)[0].double().numpy()


CASES = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {3: 2.5, 4: -3.0}},
    "allowed": {"allowed_token_ids": [1, 2, 3, 5, 8, 13]},
    "filters": {"temperature": 1.3, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
    "everything": {
        "temperature": 1.2, "top_k": 15, "top_p": 0.9, "min_p": 0.02, "presence_penalty": 0.5,
        "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {7: 1.0},
        "allowed_token_ids": list(range(2, 22)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    params = lk.SamplingParams(**{"temperature": 1.0, **CASES[name]})
    logits = 1.5 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    prompt, output = [1, 2, 2, 9], [2, 5, 5, 5, 11]
    share = expected(params, logits, prompt, output)
    found = np.bincount(draw(params, logits, prompt, output), minlength=VOCAB)
    assert not found[share == 0].any(), "a token was drawn that the parameters forbid"
    seen = share * DRAWS >= 5
    rest = share[~seen].sum() * DRAWS
    statistic = ((found[seen] - share[seen] * DRAWS) ** 2 / (share[seen] * DRAWS)).sum()
    if rest >= 1:
        statistic += (found[~seen].sum() - rest) ** 2 / rest
    degrees = seen.sum() - 1 + (rest >= 1)
    bound = degrees + 4 * np.sqrt(2 * degrees) + 6  # far in the tail: a wrong share of a tenth is beyond it
    assert statistic < bound, f"{name}: {statistic:.1f} for {degrees} degrees of freedom"


def test_a_seed_and_the_position_decide_and_nothing_else():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    first = draw(lk.SamplingParams(seed=3), logits, [1], [2])
    assert len(set(first.tolist())) == 1, "one seed, one position: one token, in whatever row"
    assert len({draw(lk.SamplingParams(seed=s), logits, [1], [2])[0] for s in range(12)}) > 3
    assert len({draw(lk.SamplingParams(seed=3), logits, [1], [2] * n)[0] for n in range(12)}) > 3
