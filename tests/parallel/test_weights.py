"""Weights are replaced on ranks, each of which reads its part of a folder; all or nothing."""

import pytest
import torch

import labkit as lk
from tests.models.configs import config, reference_model
from tests.parallel.test_shards import fitting
from tests.parallel.threads import ThreadWorkers

PROMPTS = [[5, 6, 7] * 5, [9, 8] * 6]
PARAMS = lk.SamplingParams(temperature=0, ignore_eos=True, max_tokens=10)


def engine(folder, **options) -> lk.Engine:
    options = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True} | options
    return lk.Engine(folder, **options)


def tokens_of(eng) -> list[list[int]]:
    return [handle.output_ids for handle in eng.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, kind, seed in (("one", "qwen2", 1), ("two", "qwen2", 2), ("other", "llama", 1)):
        made[name] = tmp_path_factory.mktemp(name)
        reference_model(config(kind), seed).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_ranks_read_their_parts_of_other_weights(folders, ranks):
    answers = [tokens_of(engine(folders[name])) for name in ("one", "two")]
    assert answers[0] != answers[1]
    workers = ThreadWorkers(*ranks)
    with workers, engine(folders["one"], workers=workers) as eng:
        assert tokens_of(eng) == answers[0]
        assert eng.load_weights(folders["two"]).version == 1
        assert tokens_of(eng) == answers[1]
        with pytest.raises(ValueError, match="does not fit Qwen2ForCausalLM"):
            eng.load_weights(folders["other"])
        with pytest.raises(ValueError, match="save them, and give the folder"):
            eng.load_weights({})
        assert tokens_of(eng) == answers[1] and eng.weights_version == 1
        eng.load_weights(str(folders["one"]), keep_cache=True)
        assert eng.weights_version == 2


def test_scores_of_stages_are_those_of_one_process_to_the_bit(folders):
    made = engine(folders["one"], deterministic=True).generate(
        PROMPTS, lk.SamplingParams(max_tokens=10, ignore_eos=True, seed=1, logprobs=0)
    )
    wanted = [[entry.logprob for entry in handle.logprobs] for handle in made]
    workers = ThreadWorkers(1, 2)
    with workers, engine(folders["one"], workers=workers, deterministic=True, max_num_batched_tokens=7) as eng:
        assert [one.logprobs for one in eng.score(made)] == wanted


SHARDED = [
    ("llama", "bfloat16"), ("llama", "float32"), ("olmo2", "bfloat16"), ("olmo2", "float32"), ("qwen3", "bfloat16"),
    ("gemma2", "float32"), ("mixtral", "bfloat16"), ("qwen2_moe", "float32"), ("starcoder2", "float32"),
    ("granite", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), SHARDED)
def test_scores_of_shards_are_those_of_one_process_to_the_bit(kind, dtype, tmp_path):
    """Also with more ranks than key heads, and with chunks on the ranks."""
    given = config(kind, fitting(kind, 4))
    reference_model(given).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    params = lk.SamplingParams(max_tokens=10, ignore_eos=True, seed=1, logprobs=0)
    with engine(tmp_path, deterministic=True, dtype=dtype) as eng:
        made = eng.generate(PROMPTS, params)
        scored = [one.logprobs for one in eng.score(made)]
    wanted = [[entry.logprob for entry in handle.logprobs] for handle in made]
    assert scored == wanted
    for ranks in ((4, 1), (2, 2)):
        options = {"deterministic": True, "dtype": dtype, "max_num_batched_tokens": 7}
        with ThreadWorkers(*ranks) as workers, engine(tmp_path, workers=workers, **options) as eng:
            assert [one.logprobs for one in eng.score(made)] == wanted, ranks
            again = eng.generate(PROMPTS, params)
            assert [handle.output_ids for handle in again] == [handle.output_ids for handle in made], ranks
            assert [[entry.logprob for entry in handle.logprobs] for handle in again] == wanted, ranks
