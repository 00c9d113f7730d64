"""Encoders against transformers, which computes each text alone: random weights, mixed lengths, many in one step."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import labkit as lk
from labkit.loading.encoders import ENCODERS

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 70, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
MORE = {
    "modernbert": {
        "cls_token_id": 0, "sep_token_id": 2, "local_attention": 8, "num_hidden_layers": 3,
        "global_attn_every_n_layers": 3,
    },
    "eurobert": {"mask_token_id": 3},
    "albert": {"embedding_size": 24},
}  # fmt: skip


def config_of(kind, **more):
    from transformers import CONFIG_MAPPING

    given = SIZES | MORE.get(kind, {}) | more
    if kind == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                 "intermediate_size": "hidden_dim"}  # fmt: skip
        given = {names.get(name, name): value for name, value in given.items()}
    return CONFIG_MAPPING[kind](**given)


def saved(folder, kind, auto=AutoModel, **more):
    torch.manual_seed(1)
    model = auto.from_config(config_of(kind, **more)).eval()
    model.save_pretrained(folder)
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def texts_of(seed, most=60, num=9):
    print("seed", seed)
    rng = random.Random(seed)
    return [[rng.randrange(5, 99) for _ in range(rng.randint(1, most))] for _ in range(num)]


def states_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]))[0][0]


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_states_in_mixed_batches_are_those_of_transformers(tmp_path, kind):
    model, texts = saved(tmp_path, kind), texts_of(len(kind))
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True, max_num_batched_tokens=100) as engine:
        handles = engine.encode(texts, lk.PoolingParams("token_embed", use_activation=False))
        first = engine.embed(texts)
    for ids, handle, vector in zip(texts, handles, first, strict=True):
        expected = states_of(model, ids).numpy()
        np.testing.assert_allclose(handle.pooled, expected, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(vector, expected[0] / np.linalg.norm(expected[0]), rtol=1e-5, atol=1e-5)
    engine.scheduler.check_idle()


@pytest.mark.parametrize("pooling, pick", [("MEAN", lambda x: x.mean(0)), ("LAST", lambda x: x[-1])])
def test_other_poolings(tmp_path, pooling, pick):
    model, texts = saved(tmp_path, "bert"), texts_of(5)
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        handles = engine.encode(texts, lk.PoolingParams(pooling=pooling, use_activation=False))
    for ids, handle in zip(texts, handles, strict=True):
        np.testing.assert_allclose(handle.pooled, pick(states_of(model, ids)), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close(tmp_path):
    model, texts = saved(tmp_path, "bert"), texts_of(6)
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16") as engine:
        found = engine.embed(texts)
    for ids, vector in zip(texts, found, strict=True):
        expected = states_of(model, ids)[0]
        assert float(torch.tensor(vector) @ expected / expected.norm()) > 0.999


@pytest.mark.parametrize(
    "kind, num",
    [("bert", 1), ("roberta", 3), ("distilbert", 3), ("electra", 1), ("modernbert", 3), ("albert", 1)],
)
def test_classes_are_those_of_transformers(tmp_path, kind, num):
    model, texts = saved(tmp_path, kind, AutoModelForSequenceClassification, num_labels=num), texts_of(7)
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        logits, probabilities = engine.classify(texts, use_activation=False), engine.classify(texts)
        assert len(engine.pooling.labels) == num
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        probabilities, expected.sigmoid() if num == 1 else expected.softmax(-1), rtol=1e-5, atol=1e-6
    )


def test_classes_of_tokens(tmp_path):
    model, texts = saved(tmp_path, "bert", AutoModelForTokenClassification, num_labels=4), texts_of(8)
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        handles = engine.encode(texts)
    for ids, handle in zip(texts, handles, strict=True):
        np.testing.assert_allclose(handle.pooled, states_of(model, ids).softmax(-1), rtol=1e-5, atol=1e-6)


def test_the_second_text_has_its_own_token_type(tmp_path):
    model = saved(tmp_path, "bert", AutoModelForSequenceClassification, num_labels=1)
    first, *others = texts_of(9, most=20, num=5)
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        found = engine.rerank(first, others)
    for other, score in zip(others, found, strict=True):
        ids, types = [*first, *other], [0] * len(first) + [1] * len(other)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        assert score == pytest.approx(float(logits.sigmoid()), abs=1e-6)


def test_what_does_not_fit_is_said_or_cut(tmp_path):
    saved(tmp_path, "roberta")
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        assert engine.runner.max_model_len == 68  # two positions are the padding's
        with pytest.raises(ValueError, match=r"69 tokens, at most 68 .* truncate_prompt_tokens=-1"):
            engine.embed([[5] * 69])
        short, cut = engine.embed([[5] * 68]), engine.embed([[5] * 69], truncate_prompt_tokens=-1)
        np.testing.assert_array_equal(short, cut)
        with pytest.raises(ValueError, match="draws no tokens, it does embed"):
            engine.generate([5], lk.SamplingParams(max_tokens=1))
        with pytest.raises(ValueError, match="'classify' is not what this model does: it does embed"):
            engine.classify([5])
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True, max_num_batched_tokens=30) as engine:
        with pytest.raises(ValueError, match="31 tokens, at most 30"):
            engine.embed([[5] * 31])
        with pytest.raises(ValueError, match="a prompt of 25 tokens"):
            engine.pause()
            engine.submit([5] * 25)
            engine.control(budget=20)
    with pytest.raises(ValueError, match="max_model_len=69 exceeds the 68 positions"):
        lk.Engine(str(tmp_path), skip_tokenizer_init=True, max_model_len=69)
    with pytest.raises(ValueError, match="one process computes it"):
        lk.Engine(str(tmp_path), skip_tokenizer_init=True, tensor_parallel_size=2)


def test_a_model_that_mixes_the_prompts_of_a_step_is_refused(tmp_path, monkeypatch):
    from transformers.models.bert import modeling_bert

    saved(tmp_path, "bert")
    own = modeling_bert.BertOutput.forward
    monkeypatch.setattr(modeling_bert.BertOutput, "forward", lambda self, x, y: own(self, x, y) + x.mean(1))
    with pytest.raises(ValueError, match="'bert' is not supported"):
        lk.load_model(str(tmp_path))


def test_a_sentence_models_dense_layer_normalization_and_length(tmp_path):
    import json

    from safetensors.torch import save_file

    model, texts = saved(tmp_path, "bert"), texts_of(10, most=20)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in zip(paths, kinds, strict=True)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / "2_Dense").mkdir()
    options = {"in_features": 32, "out_features": 6, "activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense/config.json").write_text(json.dumps(options))
    weight, bias = torch.randn(6, 32), torch.randn(6)
    save_file({"linear.weight": weight, "linear.bias": bias}, str(tmp_path / "2_Dense/model.safetensors"))
    with lk.Engine(str(tmp_path), skip_tokenizer_init=True) as engine:
        found = engine.embed(texts)
        assert engine.pooling.size == 6 and engine.runner.max_model_len == 20
    for ids, vector in zip(texts, found, strict=True):
        expected = torch.tanh(weight @ states_of(model, ids).mean(0) + bias)
        np.testing.assert_allclose(vector, expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_forks_and_sleep(tmp_path):
    saved(tmp_path, "bert")
    engine = lk.Engine(str(tmp_path), skip_tokenizer_init=True)
    first = engine.embed([[5, 6, 7]])
    waiting = engine.submit([5, 6, 7])
    fork = engine.fork()
    np.testing.assert_allclose(fork.request(waiting.id).wait().pooled, first[0], rtol=1e-5, atol=1e-6)
    assert waiting.pooled is None
    np.testing.assert_allclose(waiting.wait().pooled, first[0], rtol=1e-5, atol=1e-6)
    fork.close()
    engine.sleep()
    engine.wake_up()
    np.testing.assert_allclose(engine.embed([[5, 6, 7]]), first, rtol=1e-5, atol=1e-6)
    assert engine.close().ok
