"""The engine on several ranks: greedy tokens are those of one process, whatever is done with requests and blocks. One
pair of workers, in threads, serves most cases of this file; where a process matters, there is one."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.parallel.ranks import Lost
from tests import adapters
from tests.models.configs import VOCAB, config, reference_model
from tests.parallel.threads import ThreadWorkers

PARAMS = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def workers():
    with ThreadWorkers(2) as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(kind: str, seed: int = 0):
        if (kind, seed) not in made:
            made[kind, seed] = tmp_path_factory.mktemp(kind)
            reference_model(config(kind, seed), seed).save_pretrained(made[kind, seed])
        return made[kind, seed]

    return get


def engine(folder, **options) -> lk.Engine:
    options = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True, **options}
    return lk.Engine(folder, **options)


def prompts_of(seed: int, number: int = 6) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(VOCAB) for _ in range(20)]
    return [start[: rng.choice([5, 16, 20])] + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 7, 30]))]
            for _ in range(number)]  # fmt: skip


def tokens_of(eng: lk.Engine, prompts, **options) -> list[list[int]]:
    handles = eng.generate(prompts, lk.SamplingParams(**{"max_tokens": 12, **PARAMS, **options}))
    found = [list(one.output_ids) for handle in handles for one in handle.family]
    eng.check()
    return found


def same(folder, workers, **options):
    """The tokens of one process are those of the workers."""
    found = []
    for ranks in ({}, {"workers": workers}):
        eng = engine(folder, **options, **ranks)
        found.append(tokens_of(eng, prompts_of(1)))
        assert eng.close().ok
    assert found[0] == found[1]


def greedy(theirs, prompt: list[int], num: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, eos_token_id=None,
            pad_token_id=2,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_greedy_tokens_are_those_of_transformers(kind, folders, workers):
    theirs = reference_model(config(kind))
    prompts = prompts_of(2, 3)
    eng = engine(folders(kind), workers=workers, max_num_batched_tokens=16)
    assert tokens_of(eng, prompts) == [greedy(theirs, prompt, 12) for prompt in prompts]
    eng.close()


CASES = {
    "chunks, recompute": {
        "max_num_batched_tokens": 9, "max_prefill_chunk": 5, "num_blocks": 24, "preemption": "recompute",
        "watermark": 0.0,
    },
    "swap": {"num_blocks": 24, "num_host_blocks": 64, "preemption": "swap", "watermark": 0.0, "kv_offloading": True},
    "steps in flight, windows": {"max_in_flight": 2, "hybrid_kv": True},
    "8 bits": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "drafts": {"draft": lambda ids: ids[-3:]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tokens_do_not_depend_on_the_number_of_ranks(case, folders, workers):
    same(folders("gemma3_text"), workers, **CASES[case])


@pytest.mark.parametrize("kind", ["cohere", "glm", "gpt_neox", "phi"])
def test_models_without_a_native_decoder_give_the_same_tokens(kind, folders, workers):
    options = CASES["chunks, recompute"] if kind == "cohere" else CASES["swap"] if kind == "glm" else {}
    same(folders(kind), workers, **options)


def test_a_model_that_transformers_runs_is_loaded_in_another_process(folders):
    with lk.Workers(num_threads=1) as one:
        same(folders("phi"), one, **CASES["chunks, recompute"])


def test_stages_and_gloo_give_the_same_tokens():
    prompts = [[5 + i, 7, 9] * (i + 1) for i in range(5)]
    with engine(None) as one:  # the embedded model, whose config needs no transformers
        expected = tokens_of(one, prompts)
    with lk.Workers(pipeline_parallel_size=2, backend="gloo", num_threads=1) as stages:
        eng = engine(None, workers=stages)
        assert tokens_of(eng, prompts) == expected
        assert eng.scheduler.pipeline_stages == eng.scheduler.max_in_flight == 2
        balance = eng.balance()  # both ends hold the embedding, so that four layers each are even
        assert [rank.layers for rank in balance.ranks] == [4, 4] and balance.memory_spread < 0.1
        eng.close()
        eng = engine(None, workers=stages, pp_layer_partition="3,5")
        assert tokens_of(eng, prompts[:2]) == expected[:2]
        assert [rank.layers for rank in eng.balance().ranks] == [3, 5]
        eng.close()
        with pytest.raises(ValueError, match="pp_layer_partition=3,4 must give the layers of 2 stages, 8 together"):
            engine(None, workers=stages, pp_layer_partition=(3, 4))
        twice_as_large_as_a_rank_may_hold(stages, prompts, expected)


def twice_as_large_as_a_rank_may_hold(stages, prompts, expected):
    weights = 27.2 / 1024  # GiB of the embedded model in float32
    options = {"dtype": "float32", "num_blocks": None, "memory_size": 0.7 * weights, "max_num_seqs": 4}
    with pytest.raises(ValueError, match=r"take 2.\.. MiB, and memory_size=.* split the model among 2 ranks or more"):
        engine(None, **options)
    with pytest.raises(ValueError, match=r"num_blocks=1000 do not fit: with memory_size=.* has room for"):
        engine(None, workers=stages, **options | {"num_blocks": 1000})
    eng = engine(None, workers=stages, **options)
    assert tokens_of(eng, prompts) == expected
    held = [rank.weight_bytes + rank.kv_bytes for rank in eng.balance().ranks]
    assert max(held) <= 0.7 * weights * 2**30 and eng.blocks.num_blocks > 100
    eng.close()


def test_a_draft_model_guesses_on_every_rank(workers):
    """The same tokens, and as many right guesses, as in one process."""
    found, config = [], {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3, "adaptive": False}
    params = [lk.SamplingParams(max_tokens=16, temperature=heat, seed=5, ignore_eos=True) for heat in (0.0, 0.8)]
    for ranks in ({}, {"workers": workers}):
        eng = lk.Engine(dtype="float32", num_blocks=64, speculative_config=config, **ranks)
        handles = eng.generate(["def add(a, b):\n", "import os\n"], params)
        drafted = eng.log.events("Drafted")
        found.append(([h.output_ids for h in handles], [(e.request, e.num_drafts, e.num_accepted) for e in drafted]))
        eng.check()
        eng.close()
    assert found[0] == found[1] and sum(right for _, _, right in found[0][1]) > 5
    with pytest.raises(ValueError, match="a loaded model cannot be sent to several processes"):
        lk.Engine(workers=workers, draft=lk.ModelDraft(lk.load_model(lk.assets.path("tiny-draft"))))


SAMPLING = [
    {"n": 3, "temperature": 1.0, "seed": 7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logit_bias": {3: 5.0}, "bad_word_ids": [[3, 3], [4]], "min_tokens": 2},
    {"temperature": 0.0, "allowed_token_ids": [5, 6, 90, 91, 96]},
]


def test_what_is_drawn_does_not_depend_on_the_number_of_ranks(folders, workers):
    found = []
    for ranks in ({}, {"workers": workers}):
        eng = engine(folders("qwen2"), **ranks)
        handles = eng.generate(prompts_of(1, 5), [lk.SamplingParams(max_tokens=12, **own) for own in SAMPLING])
        found.append([list(one.output_ids) for handle in handles for one in handle.family])
        eng.close()
    assert found[0] == found[1]


def test_adapters_are_split_like_the_layers_that_they_change(folders, workers, tmp_path):
    theirs = reference_model(config("llama"))
    paths = {
        "a": adapters.save(theirs, tmp_path / "a", rank=4, seed=1, kinds=("lm_head", "q_proj", "v_proj", "down_proj")),
        "b": adapters.save(theirs, tmp_path / "b", rank=3, seed=2, kinds=("k_proj", "o_proj", "up_proj")),
    }
    found, params = [], lk.SamplingParams(max_tokens=8, **PARAMS)
    for ranks in ({}, {"workers": workers}):
        eng = engine(folders("llama"), max_adapters=1, adapters={"a": paths["a"]}, **ranks)
        eng.adapters.load("b", paths["b"])
        handles = [eng.submit([3, 1, 4, i], params, adapter=name) for i, name in enumerate(("a", None, "b", "a"))]
        eng.run()
        found.append([list(handle.output_ids) for handle in handles])
        eng.adapters.unload("b")
        with pytest.raises(ValueError, match="has rank 40, above max_adapter_rank"):
            eng.adapters.load("c", adapters.save(theirs, tmp_path / "c", rank=40, seed=2))
        eng.close()
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) > 2


def test_logprobs_captured_layers_and_embeddings_are_those_of_one_process(folders, workers):
    prompt = [3, 1, 4, 1, 5, 9, 2]
    rows = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
    params = lk.SamplingParams(
        max_tokens=3, logprobs=2, prompt_logprobs=1, capture={"hidden": [0, 2], "attention": [1]},
        edit={0: np.linspace(-2, 2, 48), 1: lk.edit.Project(rows[0], positions=[2, -1])}, **PARAMS,
    )  # fmt: skip
    found = []
    for ranks in ({}, {"workers": workers}):
        eng = engine(folders("llama"), **ranks)
        handle = eng.submit(prompt, params, spans=[lk.Span(1, 2, embeddings=rows)])
        eng.wait_for([handle])
        found.append(handle)
        eng.close()
    one, two = found
    assert one.output_ids == two.output_ids and one.num_edited == two.num_edited == 11
    for ours, theirs in zip(two.logprobs, one.logprobs, strict=True):
        assert ours.top_ids == theirs.top_ids and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert two.prompt_logprobs[3].logprob == pytest.approx(one.prompt_logprobs[3].logprob, abs=1e-4)
    for what in (("hidden", 0), ("hidden", 2), ("attention", 1)):
        torch.testing.assert_close(two.captured(*what), one.captured(*what), rtol=1e-4, atol=1e-4)


def test_experts_are_captured_and_given_on_ranks_as_in_one_process(folders, workers):
    prompt, found = [3, 1, 4, 1, 5, 9, 2], []
    capture = {"router": [0, 1], "router_weights": [1], "positions": "all"}
    for ranks in ({}, {"workers": workers}):
        eng = engine(folders("mixtral"), **ranks)
        made = eng.generate(prompt, lk.SamplingParams(max_tokens=3, logprobs=0, capture=capture, **PARAMS))
        own = {layer: made.activations["router", layer] for layer in (0, 1)}
        other = {layer: (experts + 1) % 4 for layer, experts in own.items()}
        scores = eng.score([made, made, made], routing=[None, own, other])
        found.append((own, made.activations["router_weights", 1], [one.logprobs for one in scores]))
        with pytest.raises(ValueError, match="names layer 7: layers with experts are 0, 1"):
            eng.score(made, routing={7: own[0]})
        eng.check()
        assert eng.close().ok
    (own, weights, scores), (theirs, their_weights, their_scores) = found
    assert all(torch.equal(own[layer], theirs[layer]) and len(own[layer]) == 9 for layer in own)
    torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores, their_scores, atol=1e-4)
    assert scores[2] != pytest.approx(scores[0], abs=1e-2)
    with ThreadWorkers(stages=2) as stages:  # each has a layer with experts
        eng = engine(folders("mixtral"), workers=stages)
        pair = (made.prompt.tolist(), made.output_ids)
        other = {layer: (experts + 1) % 4 for layer, experts in own.items()}
        np.testing.assert_allclose(eng.score(pair, routing=other).logprobs, scores[2], atol=1e-4)
        assert eng.close().ok


def test_a_grammar_is_followed_on_all_ranks(workers):
    pytest.importorskip("llguidance")
    params = lk.SamplingParams(max_tokens=12, structured_outputs={"regex": "[a-c]{3,8}"}, seed=1)
    eng = lk.Engine(dtype="float32", workers=workers, num_blocks=64)
    text = eng.generate("x = ", params).text
    eng.close()
    assert text.strip("abc") == "" and 3 <= len(text) <= 8


def test_a_snapshot_holds_each_rank_s_part(folders, workers):
    eng = engine(folders("llama"), workers=workers, num_blocks=24, preemption="recompute", max_num_batched_tokens=9)
    params = lk.SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    handles = [eng.submit(prompt, params) for prompt in prompts_of(4, 4)]
    for _ in range(9):
        eng.step()
    snapshot = eng.snapshot()
    found = []
    for _ in range(3):
        eng.run()
        eng.check()
        found.append([list(handle.output_ids) for handle in handles])
        tokens_of(eng, [[1, 2, 3]])  # writes over what was there
        eng.restore(snapshot)
    assert found[0] == found[1] == found[2] and all(len(tokens) == 12 for tokens in found[0])
    del snapshot
    eng.snapshot()
    eng.close()


def test_ranks_sleep_and_wake_to_the_same_answers(folders, workers):
    eng = engine(folders("llama"), workers=workers)
    expected, held = tokens_of(eng, [[1, 2, 3]]), sum(rank.kv_bytes for rank in eng.balance().ranks)
    assert eng.sleep().kv_bytes == held
    with pytest.raises(RuntimeError, match="this engine sleeps"):
        eng.submit([1, 2])
    eng.wake_up()
    assert tokens_of(eng, [[1, 2, 3]]) == expected
    eng.close()


def test_functions_are_refused(folders, workers):
    eng = engine(folders("llama"), workers=workers)
    with pytest.raises(ValueError, match="logits_processors are functions of this process"):
        eng.submit([1, 2], lk.SamplingParams(logits_processors=[lambda prompt, output, logits: logits]))
    assert len(tokens_of(eng, [[1, 2, 3]])[0]) == 12
    eng.close()


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=["shards", "stages"])
def test_a_fork_goes_on_by_itself_on_the_same_ranks(ranks, folders):
    """Both take steps in turn while plans of the other are in flight; the engine is closed first."""
    params = lk.SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    after, expected = prompts_of(6, 2), []
    eng = engine(folders("llama"))
    expected = [tokens_of(eng, prompts_of(4, 4), max_tokens=12, temperature=1.0, seed=3), tokens_of(eng, after)]
    eng.close()
    with ThreadWorkers(*ranks) as own:
        eng = engine(folders("llama"), workers=own, num_blocks=24, preemption="recompute", max_num_batched_tokens=9)
        handles = [eng.submit(prompt, params) for prompt in prompts_of(4, 4)]
        for _ in range(9):
            eng.step()
        fork = eng.fork()
        snapshot = fork.snapshot()
        copies = [fork.request(handle.id) for handle in handles]
        going = [eng, fork]
        while going:
            going = [one for one in going if one.step() is not None]
        found = [[list(handle.output_ids) for handle in several] for several in (handles, copies)]
        assert found == [expected[0], expected[0]]
        fork.restore(snapshot)
        assert tokens_of(eng, after) == expected[1]
        fork.run()
        assert [list(handle.output_ids) for handle in copies] == expected[0]
        with pytest.raises(ValueError, match="already serve an engine"):
            engine(folders("llama"), workers=own)
        eng.close()
        assert tokens_of(fork, after) == expected[1] and len(fork.balance().ranks) == 2
        fork.close()
        other = engine(folders("llama"), workers=own)
        assert tokens_of(other, after) == expected[1]
        other.close()


def test_an_engine_and_its_fork_may_run_in_threads_at_once(folders, workers):
    eng = engine(folders("llama"), workers=workers)
    fork, prompts = eng.fork(), [prompts_of(seed, 3) for seed in (1, 2)]
    expected = [tokens_of(eng, several) for several in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = list(pool.map(lambda pair: tokens_of(*pair), zip((fork, eng), prompts, strict=True)))
            assert found == expected
    fork.close()
    assert tokens_of(eng, prompts[0]) == expected[0]
    eng.close()


def test_a_fork_ends_with_its_ranks_and_the_engine_goes_on_with_others(folders):
    with ThreadWorkers(2, restart=True) as own:
        eng = engine(folders("llama"), workers=own)
        expected, fork = tokens_of(eng, [[1, 2, 3]]), eng.fork()
        handle = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=12, **PARAMS))
        fork.submit([1, 2, 3])
        eng.step(), fork.step(), eng.step()
        own.lose("a rank was ended")
        for one in (eng, fork):
            with pytest.raises(Lost, match="a rank was ended"):
                for _ in range(3):
                    one.step()
            assert own.lost is not None
        with pytest.raises(Lost, match=r"the ranks that held this fork have ended.*fork again"):
            fork.step()
        eng.run()
        assert [list(handle.output_ids)] == expected
        assert tokens_of(eng.fork(), [[1, 2, 3]]) == expected
        fork.close(), eng.close()


def test_a_step_that_fails_on_all_ranks_is_rolled_back_and_taken_again(folders, workers):
    eng = engine(folders("llama"), workers=workers)
    expected = tokens_of(eng, [[1, 2, 3]])
    handle, launch = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=12, **PARAMS)), eng.runner.launch
    eng.step()
    eng.runner.launch = lambda plan: launch(plan._replace(rows=plan.rows + 10_000))
    with pytest.raises(RuntimeError, match="IndexError: index"):
        eng.run()  # the step that was in flight is committed first
    eng.runner.launch = launch
    eng.run()
    assert list(handle.output_ids) == expected[0] and workers.lost is None
    eng.check()
    eng.close()


def test_errors_of_loading_name_what_is_wrong_and_the_workers_go_on(folders, workers, tmp_path):
    with pytest.raises(ValueError, match="has no native decoder"):
        engine(folders("gpt2"), workers=workers)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide"):
        engine(folders("olmo2"), workers=workers)  # 3 key heads
    eng = engine(folders("llama"), workers=workers)
    with pytest.raises(ValueError, match="already serve an engine: close it"):
        engine(folders("llama"), workers=workers)
    assert tokens_of(eng, [[1, 2, 3]])
    eng.close()


def test_memory_is_split_evenly_and_what_travels_is_counted(folders, workers):
    eng = engine(folders("llama"), workers=workers)
    eng.generate([[1, 2, 3]] * 2, lk.SamplingParams(max_tokens=12, **PARAMS))
    layers, hidden = eng.runner.num_layers, eng.runner.embedding_size
    balance = eng.balance()
    assert balance.steps == 12  # each: the embedding, two sums a layer, and the likeliest tokens of each rank
    assert {rank.exchanges for rank in balance.ranks} == {12 * (2 * layers + 2)}
    tokens = 2 * (3 + 11)
    assert {rank.sent for rank in balance.ranks} == {tokens * (2 * layers + 1) * hidden * 4 + 12 * 2 * 2 * 8}
    assert f"{2 * (2 * layers + 2):.1f} exchanges" in repr(balance)
    cost = lk.study.AnalyticCost.of(lk.study.ModelShape.of(config("llama"), dtype="float32"), "H100", tp=2)
    num, given = cost.exchanges(tokens=tokens, sampled=2 * 12)
    assert balance.ranks[0].exchanges == 12 * num and balance.ranks[0].sent == given
    noted = eng.log.events("RankLoad")
    assert {event.rank for event in noted} == {0, 1} and noted[0].weight_bytes == balance.ranks[0].weight_bytes
    each = workers.call("memory")
    assert max(one["weights"] for one in each) <= 1.1 * min(one["weights"] for one in each)
    assert each[0]["kv"] == each[1]["kv"]
    eng.close()


def test_calls_between_steps_lose_no_answer_to_those_in_flight(folders, workers):
    eng = engine(folders("llama"), workers=workers, max_in_flight=1)
    expected = tokens_of(eng, [[1, 2, 3], [4, 5]])
    handles = [eng.submit(prompt, lk.SamplingParams(max_tokens=12, **PARAMS)) for prompt in ([1, 2, 3], [4, 5])]
    while eng.step():
        eng.balance()  # asks the ranks, which have a plan to answer first
    assert [handle.output_ids for handle in handles] == expected and workers.lost is None
    eng.check()
    eng.close()
