"""Models with recurrent layers through the engine: the tokens and logprobs of transformers, however prompts are cut,
shared and continued."""

import random

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import labkit as lk
from labkit.runner.memory import blocks_in
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


@pytest.mark.parametrize("kind", sorted(RECURRENT))
def test_packed_layers_in_bfloat16_are_close(kind, tmp_path):
    """Also those that transformers multiplies by without calling them."""
    reference = saved(kind, tmp_path).to(torch.bfloat16)
    eng = lk.Engine(tmp_path, skip_tokenizer_init=True, **{**OPTIONS, "dtype": "bfloat16", "num_blocks": 40})
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 97) for _ in range(25)] for _ in range(3)]
    for handle in eng.generate(prompts, lk.SamplingParams(max_tokens=12, **GREEDY)):
        ids = torch.tensor([[*handle.prompt.tolist(), *handle.output_ids]])
        with torch.inference_mode():
            logprobs = reference(ids).logits[0, handle.num_prompt - 1 : -1].float().log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(handle.output_ids)[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in handle.logprobs])
        assert (found - expected).abs().mean() < 0.15, (kind, found, expected)
    eng.close()


def test_a_checkpoint_that_sees_is_served_as_text(tmp_path, caplog):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48}
    text = config("qwen3_5_text").to_dict()
    both = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=vision | {"patch_size": 4})
    reference = AutoModelForImageTextToText.from_config(both).eval()
    reference.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "labkit.models"):
        eng = lk.Engine(tmp_path, skip_tokenizer_init=True, **OPTIONS)
    assert "'qwen3_5' is served without its image tower" in caplog.text
    (handle,) = eng.generate([[5, 6, 7, 8]], lk.SamplingParams(max_tokens=6, **GREEDY))
    assert_right(reference, handle)
    with pytest.raises(ValueError, match="serves a model that takes text only"):
        eng.submit({"prompt_token_ids": [5], "multi_modal_data": {"image": b""}})
    eng.close()


def test_states_that_leave_no_room_are_named(tmp_path):
    saved("lfm2", tmp_path)
    options = {name: value for name, value in OPTIONS.items() if name != "num_blocks"}
    with pytest.raises(ValueError, match=r"states of recurrent layers 1.5 MiB: lower max_num_seqs or num_states"):
        lk.Engine(tmp_path, skip_tokenizer_init=True, num_states=4000, memory_size=0.001, **options)
    with pytest.raises(ValueError, match=r"3 MiB of states of recurrent layers and a step of 9.*or num_states"):
        blocks_in(-1.0, 64, 0.9, 9, states=3 * 2**20)
