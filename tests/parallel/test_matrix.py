"""Greedy tokens on ranks are transformers', however ranks are dealt and whatever is done with requests and blocks.
Ranks are threads."""

import pytest
from transformers import CONFIG_MAPPING

from tests.models.configs import config, reference_model
from tests.parallel.test_engine import engine, greedy, prompts_of, tokens_of
from tests.parallel.test_shards import fitting
from tests.parallel.threads import ThreadWorkers

FAMILIES = ("gemma3_text", "llama", "mixtral", "phi3", "qwen2", "qwen3")
RANKS = [(4, 1), (1, 4), (2, 2)]
NUM = 6  # tokens
PRESSED = {"num_blocks": 20, "max_num_batched_tokens": 9, "max_prefill_chunk": 5, "watermark": 0.0}
CASES = {
    "swap, offloading": {**PRESSED, "num_host_blocks": 48, "preemption": "swap", "kv_offloading": True},
    "keys in 8 bits, drafts": {"kv_cache_dtype": "int8", "draft": lambda ids: ids[-3:]},
}


def deeper(kind: str):
    """A config of four layers that four ranks can share."""
    given = config(kind, fitting(kind, 4)).to_dict()
    return CONFIG_MAPPING[kind](**given | {"num_hidden_layers": 4, "layer_types": None})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, transformers' greedy tokens) by family"""
    made = {}

    def get(kind: str):
        if kind not in made:
            theirs, folder = reference_model(deeper(kind)), tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = folder, [greedy(theirs, prompt, NUM) for prompt in prompts_of(2, 3)]
        return made[kind]

    return get


@pytest.mark.parametrize("ranks", RANKS)
def test_families_give_the_tokens_of_transformers(ranks, saved):
    """With chunks, shared prefixes, and so few blocks that requests are preempted and computed again."""
    num_preempted = 0
    with ThreadWorkers(*ranks) as workers:
        for kind in FAMILIES:
            folder, expected = saved(kind)
            eng = engine(folder, workers=workers, preemption="recompute", **PRESSED | {"num_blocks": 9})
            assert tokens_of(eng, prompts_of(2, 3), max_tokens=NUM) == expected, kind
            num_preempted += eng.scheduler.num_preempted
            eng.close()
    assert num_preempted or ranks == (4, 1)  # with one plan in flight, requests wait instead


@pytest.fixture(scope="module")
def alone(saved):
    """The tokens of one process, by case."""
    made = {}

    def get(case: str):
        if case not in made:
            eng = engine(saved("llama")[0], **CASES[case])
            made[case] = tokens_of(eng, prompts_of(1, 4), max_tokens=NUM, n=2, temperature=0)
            eng.close()
        return made[case]

    return get


@pytest.mark.parametrize("ranks", RANKS)
def test_forks_swaps_drafts_and_keys_in_8_bits_change_nothing(ranks, saved, alone):
    with ThreadWorkers(*ranks) as workers:
        for case, options in CASES.items():
            eng = engine(saved("llama")[0], workers=workers, **options)
            assert tokens_of(eng, prompts_of(1, 4), max_tokens=NUM, n=2, temperature=0) == alone(case), case
            eng.close()
