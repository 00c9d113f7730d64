"""Shards and stages of a model together compute what the whole model does."""

import itertools
import random

import pytest
import torch

from labkit.core.stages import Load, stages_of
from labkit.loading.checkpoint import Checkpoint
from labkit.models import load_model
from labkit.models.place import WHOLE
from labkit.parallel.balance import Balance, RankLoad
from labkit.parallel.ranks import Ranks
from labkit.quantization.quantize import quantize
from tests.models.configs import NATIVE, VOCAB, config, reference_model
from tests.models.test_decoder import paged_logits
from tests.parallel.threads import on_ranks

QUANTIZED = 9  # the seed of a config whose sizes are multiples of 16 on two ranks


def folder_of(kind: str, seed: int, tmp_path):
    reference_model(config(kind, seed), seed).save_pretrained(tmp_path)
    return tmp_path


def logits_of(folder, place=WHOLE, **options):
    model = load_model(folder, dtype="float32", place=place, **options)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 5, 17)]
    if not place.is_last:
        model.logits = lambda hidden: hidden
    return torch.cat(paged_logits(model, prompts, 4, rng))


def fitting(kind: str, ranks: int) -> int:
    """A seed whose config this many ranks can split."""
    for seed in range(40):
        made = config(kind, seed)
        keys = made.num_key_value_heads
        if made.num_attention_heads % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0):
            return seed
    raise AssertionError(f"no config of {kind} fits {ranks} ranks")


KINDS = [(kind, 2 + 2 * (i % 2)) for i, kind in enumerate(sorted(NATIVE))]


@pytest.mark.parametrize(("kind", "ranks"), KINDS)
def test_shards_compute_the_logits_of_the_whole(kind, ranks, tmp_path):
    folder = folder_of(kind, fitting(kind, ranks), tmp_path)
    whole = logits_of(folder)
    found = on_ranks(Ranks(ranks), lambda place: logits_of(folder, place))
    assert all(torch.equal(found[0], other) for other in found), "ranks differ"
    assert (found[0] - whole).abs().max() <= 2e-5 * whole.abs().max()


WIDE = ("codegen", "cohere2", "deepseek_v3", "glm", "gpt_neox", "olmo")


def wide_folder(kind: str, tmp_path, **options):
    """Of a model that transformers' own code computes, its attention with as many key heads as that code expects."""
    made = config(kind)
    if kind == "codegen":
        made.num_key_value_heads = made.num_attention_heads
    for name, value in options.items():
        setattr(made, name, value)
    reference_model(made).save_pretrained(tmp_path)
    return tmp_path


def same_as_the_whole(folder, ranks: int = 2, **options) -> None:
    whole = logits_of(folder, **options)
    found = on_ranks(Ranks(ranks), lambda place: logits_of(folder, place, **options))
    assert all(torch.equal(found[0], other) for other in found), "ranks differ"
    assert (found[0] - whole).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("kind", WIDE)
def test_shards_by_transformers_plan_compute_the_logits_of_the_whole(kind, tmp_path):
    same_as_the_whole(wide_folder(kind, tmp_path))


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [
        ("cohere", 4, {"num_attention_heads": 4}),  # two ranks hold the same key head
        ("cohere", 2, {"use_qk_norm": True, "attention_bias": True}),  # norms with a weight for each head
        ("phi", 3, {"num_key_value_heads": 6, "qk_layernorm": True, "tie_word_embeddings": True}),
    ],
)
def test_heads_norms_and_biases_of_plans_are_cut_by_rank(kind, ranks, options, tmp_path):
    same_as_the_whole(wide_folder(kind, tmp_path, **options), ranks)


@pytest.mark.parametrize("kind", ["olmo2", "qwen2_moe"])
def test_plans_of_native_families_give_the_same_by_the_other_path(kind, tmp_path):
    """Experts; norms over all heads, for which the plan gathers queries and keys."""
    same_as_the_whole(wide_folder(kind, tmp_path), path="transformers")


def test_a_rank_reads_its_part_of_what_a_plan_cuts(tmp_path, monkeypatch):
    folder, opened = wide_folder("cohere", tmp_path), []

    def open_counted(path):
        opened.append(Counted(path))
        return opened[-1]

    monkeypatch.setattr("labkit.loading.checkpoint.Checkpoint", open_counted)
    held = on_ranks(Ranks(2), lambda place: load_model(folder, dtype="float32", place=place).num_parameters)
    every = sum(torch.Size(shape).numel() for shape in opened[0].shapes.values())
    assert all(checkpoint.num_read < 0.62 * every for checkpoint in opened)
    assert max(held) < 0.62 * every


def test_ranks_of_a_plan_agree_on_the_likeliest_token_without_all_logits(tmp_path):
    folder = wide_folder("cohere", tmp_path, logit_scale=-0.5)  # which turns the order round

    def best(place):
        model = load_model(folder, dtype="float32", place=place)
        hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
        token, value = model.greedy(hidden)
        return token, value, model.logits(hidden)

    for token, value, logits in on_ranks(Ranks(2), best):
        assert torch.equal(token, logits.argmax(-1)) and torch.equal(value, logits.amax(-1))


@pytest.mark.parametrize(
    ("kind", "ranks", "said"),
    [
        ("gpt2", Ranks(2), "'gpt2' cannot be split .* no tensor-parallel plan .* whole engines .data_parallel_size=2"),
        ("gpt_oss", Ranks(2), "'gpt_oss' cannot be split .* no tensor-parallel plan"),
        ("cohere", Ranks(4), "CohereForCausalLM, which has 6 query heads on 2 key heads, .* that fit are 1, 2, 6"),
        ("phi", Ranks(1, 2), "'phi' cannot be split into stages: .* use tensor_parallel_size"),
    ],
)
def test_what_no_plan_can_split_is_refused_by_name(kind, ranks, said, tmp_path):
    folder = wide_folder(kind, tmp_path)
    with pytest.raises(ValueError, match=said):
        on_ranks(ranks, lambda place: load_model(folder, place=place))


def test_a_style_that_is_not_known_is_refused_by_name(tmp_path, monkeypatch):
    folder, made = wide_folder("olmo", tmp_path), type(config("olmo"))
    monkeypatch.setattr(made, "base_model_tp_plan", made.base_model_tp_plan | {"layers.*.mlp.up_proj": "diagonal"})
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' the style 'diagonal', and known are colwise"):
        on_ranks(Ranks(2), lambda place: load_model(folder, place=place))


@pytest.mark.parametrize(
    ("method", "options"), [("int4", {"group": 16}), ("int8", {}), ("nf4", {"blocksize": 64}), ("fp8", {})]
)
def test_shards_of_quantized_checkpoints_compute_the_logits_of_the_whole(method, options, tmp_path):
    folder = folder_of("llama", QUANTIZED, tmp_path / "dense")
    quantize(folder, method, out=tmp_path / method, progress=False, **options)
    whole = logits_of(tmp_path / method)
    found = on_ranks(Ranks(2), lambda place: logits_of(tmp_path / method, place))
    assert torch.equal(*found)
    assert (found[0] - whole).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("ranks", [Ranks(1, 2), Ranks(2, 2)])
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen2"])
def test_stages_compute_the_logits_of_the_whole(kind, ranks, tmp_path):
    folder = folder_of(kind, fitting(kind, ranks.tensor), tmp_path)
    whole = logits_of(folder)
    found = on_ranks(ranks, lambda place: logits_of(folder, place))
    assert (found[-1] - whole).abs().max() <= 2e-5 * whole.abs().max()


class Counted(Checkpoint):
    """Counts what is read."""

    num_read = 0

    def read(self, name, dtype, device, part=()):
        found = super().read(name, dtype, device, part)
        self.num_read += found.numel()
        return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe"])
def test_each_rank_reads_its_own_part_of_a_checkpoint(kind, tmp_path, monkeypatch):
    folder, opened = folder_of(kind, 0, tmp_path), []

    def open_counted(path):
        opened.append(Counted(path))
        return opened[-1]

    monkeypatch.setattr("labkit.loading.checkpoint.Checkpoint", open_counted)
    on_ranks(Ranks(2), lambda place: load_model(folder, dtype="float32", place=place).num_parameters)
    every = sum(torch.Size(shape).numel() for shape in opened[0].shapes.values())
    assert all(checkpoint.num_read < 0.62 * every for checkpoint in opened)  # norms, biases and a few keys twice


@pytest.mark.parametrize(("ranks", "said"), [(3, "sizes that fit are 1, 2, 6"), (5, "sizes that fit are 1, 2, 6")])
def test_head_counts_that_do_not_divide_are_refused_with_the_sizes_that_fit(ranks, said, tmp_path):
    folder = folder_of("llama", 0, tmp_path)  # 6 query heads on 2 key heads
    with pytest.raises(ValueError, match=said):
        on_ranks(Ranks(ranks), lambda place: load_model(folder, place=place))


def test_stages_are_as_equal_as_they_can_be():
    one = Load(1.0, 1.0, 1.0)
    assert stages_of([one] * 8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    head = Load(9.9, 9.9, 9.9)  # as heavy as ten layers
    assert [len(run) for run in stages_of([one] * 28, 4, last=head)] == [9, 9, 9, 1]
    assert [len(run) for run in stages_of([one] * 61, 4)] in ([15, 15, 15, 16], [16, 15, 15, 15])
    with pytest.raises(ValueError, match="2 layers cannot be split into 3 stages: at most 2"):
        stages_of([one] * 2, 3)


def test_stages_are_even_in_prefills_in_decode_steps_and_in_what_they_hold():
    """No other partition has a smaller largest excess."""
    for seed in range(30):
        rng = random.Random(seed)
        num, stages = rng.randint(2, 9), rng.randint(1, 3)
        stages = min(stages, num)
        loads = [Load(*(rng.uniform(0.5, 2) for _ in range(3))) for _ in range(num)]
        first, last = Load(0.0, 0.0, rng.uniform(0, 4)), Load(0.0, rng.uniform(0, 4), rng.uniform(0, 4))

        def excess(runs, loads=loads, first=first, last=last):
            totals = [[sum(loads[i][kind] for i in run) for run in runs] for kind in range(3)]
            for kind in range(3):
                totals[kind][0] += first[kind]
                totals[kind][-1] += last[kind]
            return max(max(each) / (sum(each) / len(each)) for each in totals)

        cuts = itertools.combinations(range(1, num), stages - 1)
        every = [[range(a, b) for a, b in itertools.pairwise((0, *cut, num))] for cut in cuts]
        found = stages_of(loads, stages, first, last)
        assert excess(found) == pytest.approx(min(map(excess, every))), f"seed {seed}"


def test_the_balance_says_what_stands_in_the_way():
    def of(*stages):
        return Balance([RankLoad(i, i, 0, layers, 100 * layers, 100 * layers + ends, 0, busy, 0.0)
                        for i, (layers, ends, busy) in enumerate(stages)])  # fmt: skip

    heavy = of((9, 0, 9.0), (9, 0, 9.0), (9, 0, 9.0), (1, 990, 10.9))
    assert "busy time: the head takes as long as 9.9 layers, so no partition of 28 layers" in repr(heavy)
    uneven = of((5, 100, 5.0), (3, 100, 5.0))
    assert "memory: pp_layer_partition='4,4' would be within 0.0%" in repr(uneven)
    assert "pp_layer_partition" not in repr(of((4, 100, 4.0), (4, 100, 4.1)))
    assert of((12, 0, 12.0), (12, 0, 17.0)).partition == "14,10"  # a head of five layers
    assert of((8, 0, 8.0)).partition is None


@pytest.mark.parametrize("in_pool", [0.0, 7.0])
def test_a_head_of_nine_layers_leaves_both_stages_within_a_sixth_of_the_mean_in_any_kind_of_step(in_pool):
    """The 0.5B shape on two stages: its head takes as long as nine layers in decode steps and none in prefills."""
    layer, first, last = Load(1.0, 1.0, 1.0 + in_pool), Load(0.0, 0.0, 9.0), Load(0.0, 9.0, 9.0)
    found = [len(run) for run in stages_of([layer] * 24, 2, first, last)]
    assert found == [14, 10]
    for head in (0.0, 2.0, 5.0, 9.0):
        times = found[0], found[1] + head
        assert max(times) / (sum(times) / 2) < 1 + 1 / 6 + 1e-9, head
