"""Models with recurrent layers through the engine: the tokens and logprobs of transformers, however prompts are cut,
shared and continued."""

import random

import pytest
import torch

import labkit as lk
from tests.models.configs import RECURRENT, config, reference_model

OPTIONS = {"num_blocks": 20, "block_size": 4, "max_num_seqs": 4, "dtype": "float32", "max_model_len": 128}
GREEDY = {"temperature": 0, "ignore_eos": True, "logprobs": 0}


def saved(kind, folder):
    model = reference_model(config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


def assert_right(reference, handle, tolerance=1e-3):
    """Each token is the likeliest, and as likely as it is to transformers, which sees the whole text at once."""
    ids = torch.tensor([[*handle.prompt.tolist(), *handle.output_ids]])
    with torch.inference_mode():
        logits = reference(ids).logits[0, handle.num_prompt - 1 : -1].float()
    logprobs = logits.log_softmax(-1)
    assert logits.argmax(-1).tolist() == handle.output_ids
    for line, token, found in zip(logprobs, handle.output_ids, handle.logprobs, strict=True):
        assert abs(float(line[token]) - found.logprob) < tolerance


@pytest.mark.parametrize("kind", sorted(RECURRENT))
def test_tokens_are_those_of_transformers(kind, tmp_path):
    """With chunks, shared prefixes, samples, a preemption and a next turn."""
    reference, rng = saved(kind, tmp_path), random.Random(kind)
    eng = lk.Engine(tmp_path, skip_tokenizer_init=True, max_num_batched_tokens=13, num_states=12, **OPTIONS)
    shared = [rng.randrange(3, 97) for _ in range(21)]
    prompts = [shared + [rng.randrange(3, 97) for _ in range(rng.randrange(1, 8))] for _ in range(4)] + [[5]]
    handles = eng.generate(prompts, lk.SamplingParams(max_tokens=16, **GREEDY))
    assert [handle.num_cached for handle in handles] == [0, 20, 20, 20, 0]
    assert sum(handle.num_preemptions for handle in handles) > 0
    turn = eng.generate([[*prompts[3], *handles[3].output_ids, 9]], lk.SamplingParams(max_tokens=4, **GREEDY))
    assert turn[0].num_cached >= 4 * ((len(prompts[3]) + 14) // 4)
    for handle in handles + turn:
        assert_right(reference, handle)
    eng.check()
    texts = [[*handle.prompt.tolist(), *handle.output_ids] for handle in handles]

    def guess(tokens):
        """Two right ones and a wrong one."""
        text = next(text for text in texts if text[: len(tokens)] == tokens.tolist())
        return [*text[len(tokens) : len(tokens) + 2], 3]

    drafting = lk.Engine(tmp_path, skip_tokenizer_init=True, draft=guess, **OPTIONS)
    for handle in drafting.generate(prompts, lk.SamplingParams(max_tokens=16, **GREEDY)):
        assert_right(reference, handle)
    assert sum(event.num_accepted for event in drafting.log.events("Drafted")) > 20
    drafting.close()
    assert repr(eng.close()).startswith("LeakReport(nothing left")
