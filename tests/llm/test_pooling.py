"""vLLM's names for models that pool, rerankers of causal models, and decoders with a classifier."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen3Config,
)

import labkit as lk
from labkit.llm import AsyncEngineArgs, AsyncLLMEngine
from tests.models.test_encoder import states_of, texts_of

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def saved(folder, config, auto):
    torch.manual_seed(3)
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def test_an_llm_returns_vllms_outputs(tmp_path):
    model, texts = saved(tmp_path, Qwen3Config(**SIZES), AutoModel), texts_of(1)
    prompts = [{"prompt_token_ids": ids} for ids in texts]
    with lk.LLM(str(tmp_path), runner="pooling", skip_tokenizer_init=True, max_num_batched_tokens=64) as llm:
        found, every = llm.embed(prompts), llm.encode(prompts, pooling_task="token_embed")
        scores = llm.score([texts[0]], [list(ids) for ids in texts[1:]])
        with pytest.raises(ValueError, match="draws no tokens"):
            llm.generate(prompts, lk.SamplingParams())
        with pytest.raises(ValueError, match="'classify' is not what this model does"):
            llm.classify(prompts)
    units = []
    for ids, one, lines in zip(texts, found, every, strict=True):
        states = states_of(model, ids)
        units.append(states[-1] / states[-1].norm())
        np.testing.assert_allclose(one.outputs.embedding, units[-1], rtol=1e-4, atol=1e-5)
        assert one.prompt_token_ids == ids and one.finished and one.outputs.hidden_size == 32
        torch.testing.assert_close(lines.outputs.data, states / states.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    for one, unit in zip(scores, units[1:], strict=True):
        assert one.outputs.score == pytest.approx(float(units[0] @ unit), abs=1e-5)


@pytest.mark.parametrize("num", [1, 3])
def test_a_decoder_with_classes(tmp_path, num):
    config = Qwen3Config(**SIZES, num_labels=num)
    model, texts = saved(tmp_path, config, AutoModelForSequenceClassification), texts_of(2)
    with lk.LLM(str(tmp_path), skip_tokenizer_init=True, max_num_batched_tokens=32) as llm:  # in chunks
        found = llm.classify(texts)
        again = llm.classify(texts)
        assert sum(one.num_cached_tokens for one in again) > 0  # the prefix cache serves the last token's state
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts])
    expected = logits.sigmoid() if num == 1 else logits.softmax(-1)
    for results in (found, again):
        np.testing.assert_allclose([one.outputs.probs for one in results], expected, rtol=1e-4, atol=1e-5)


def test_a_reranker_of_a_causal_model_compares_two_tokens(tmp_path):
    model, texts = saved(tmp_path, Qwen3Config(**SIZES), AutoModelForCausalLM), texts_of(3)
    overrides = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": [7, 11],
                 "is_original_qwen3_reranker": True}  # fmt: skip
    with lk.LLM(str(tmp_path), runner="pooling", hf_overrides=overrides, skip_tokenizer_init=True) as llm:
        found = [one.outputs.probs[0] for one in llm.classify(texts)]
        pair = llm.score([texts[0]], [texts[1]])[0]

    def score(ids):
        logits = states_of(model, ids)[-1]
        return float(logits[[7, 11]].softmax(0)[1])

    assert found == pytest.approx([score(ids) for ids in texts], abs=1e-5)
    assert pair.outputs.score == pytest.approx(score([*texts[0], *texts[1]]), abs=1e-5)
    with pytest.raises(ValueError, match="classifier_from_token: the last id is 98, got 99"):
        lk.Engine(str(tmp_path), skip_tokenizer_init=True, classifier_from_token=[7, 99])
    with pytest.raises(ValueError, match="hf_overrides"):
        lk.LLM(str(tmp_path), hf_overrides={"rope_theta": 1.0})


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, use_bidirectional_attention=True, sliding_window=8, query_pre_attn_scalar=8,
                         layer_types=["sliding_attention", "full_attention"]),
        Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, is_causal=False),
    ],
    ids=["gemma3", "qwen2"],
)  # fmt: skip
def test_decoders_that_see_both_directions(tmp_path, config):
    model, texts = saved(tmp_path, config, AutoModel), texts_of(4)
    one, other = texts[0][:4], [*texts[0][:3], 98]
    assert not torch.allclose(states_of(model, one)[0], states_of(model, other)[0])  # the first token sees the last
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        handles = engine.encode(texts, lk.PoolingParams("token_embed", use_activation=False))
    for ids, handle in zip(texts, handles, strict=True):
        np.testing.assert_allclose(handle.pooled, states_of(model, ids), rtol=1e-4, atol=2e-5)


def test_settings_of_the_pooler_and_an_async_engine(tmp_path):
    model, texts = saved(tmp_path, Qwen3Config(**SIZES), AutoModel), texts_of(5, num=3)
    with lk.LLM(str(tmp_path), pooler_config={"pooling_type": "MEAN", "normalize": False},
                skip_tokenizer_init=True) as llm:  # fmt: skip
        found = [one.outputs.embedding for one in llm.embed(texts)]
    expected = [states_of(model, ids).mean(0) for ids in texts]
    np.testing.assert_allclose(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pooler_config"):
        lk.LLM(str(tmp_path), pooler_config={"colour": "red"})

    async def main():
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(tmp_path), skip_tokenizer_init=True))
        params = lk.PoolingParams("embed", pooling="MEAN", use_activation=False)

        async def one(i):
            return [output async for output in engine.encode(texts[i], params, f"r{i}")]

        outputs = await asyncio.gather(*map(one, range(len(texts))))
        return outputs, engine.shutdown()

    outputs, report = asyncio.run(main())
    assert report.ok
    for (output,), vector in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.outputs.data, vector, rtol=1e-4, atol=1e-5)
