"""Shards and stages of a model together compute what the whole model does."""

import random

import pytest
import torch

from labkit.loading.checkpoint import Checkpoint
from labkit.models import load_model
from labkit.models.place import WHOLE, stages_of
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


def test_models_without_a_native_decoder_are_refused_by_name(tmp_path):
    folder = folder_of("gpt2", 0, tmp_path)
    with pytest.raises(ValueError, match="'gpt2' cannot be split among processes: it has no native decoder"):
        on_ranks(Ranks(2), lambda place: load_model(folder, place=place))


def test_stages_are_as_equal_as_they_can_be():
    assert stages_of([1.0] * 8, 0.0, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(run) for run in stages_of([1.0] * 28, 9.9, 4)] == [9, 9, 9, 1]  # the head weighs as much as ten layers
    assert [len(run) for run in stages_of([1.0] * 61, 0.0, 4)] in ([15, 15, 15, 16], [16, 15, 15, 15])
    with pytest.raises(ValueError, match="2 layers cannot be split into 3 stages: at most 2"):
        stages_of([1.0, 1.0], 0.0, 3)
