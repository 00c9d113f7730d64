"""Adapters give what the merged model gives, on every architecture and beside any others in a batch."""

import copy
import random

import pytest
import torch

import labkit as lk
from labkit.loading.format import Shard
from labkit.loading.peft import read_adapter
from labkit.models import load_model
from labkit.models.lora import make_room
from tests import adapters
from tests.models.configs import VOCAB, config, reference_model

RANKS = (1, 2, 3, 8, 16, 33, 64, 5)


def engine(folder, **options):
    defaults = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True}
    return lk.Engine(str(folder), **defaults | options)


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.choice([3, 9, 21]))]


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen2",
        "gemma2",
        "phi3",
        "starcoder2",
        "qwen2_moe",
        "gpt2",
        "gpt_neox",
        "lfm2",
        "granitemoehybrid",
        "qwen3_next",
    ],
)
def test_a_batch_of_eight_adapters_and_none_equals_the_merged_models(kind, tmp_path):
    seed = 5
    rng = random.Random(seed)
    reference = reference_model(config(kind))
    reference.save_pretrained(tmp_path / "base")
    kinds = sorted({name.rpartition(".")[2] for name, _ in adapters.layers(reference)} - {"lm_head", "embed_out"})
    paths = {}
    for i, rank in enumerate(RANKS):
        some = None if i == 0 else rng.sample(kinds, min(len(kinds), 3))
        paths[f"a{i}"] = adapters.save(reference, tmp_path / f"a{i}", rank=rank, seed=i, kinds=some or kinds)
    eng = engine(
        tmp_path / "base", adapters=paths, max_adapters=5, num_blocks=20, max_num_batched_tokens=24, max_num_seqs=7
    )
    names = [None, *paths, None, *rng.sample(sorted(paths), 6)]
    shared = prompt(rng)  # the same tokens with several adapters: the prefix cache must tell them apart
    handles = []
    for i, name in enumerate(names):
        tokens = shared + [i % 2] * 4 if i % 3 == 0 else prompt(rng)
        handles.append(
            eng.submit(tokens, lk.SamplingParams(max_tokens=9, temperature=0, ignore_eos=True), adapter=name)
        )
    most = 0
    while eng.step():
        eng.check()
        most = max(most, len({r.adapter for r in eng.scheduler.row_request if r is not None}))
    assert most >= 4 and eng.scheduler.num_preempted, f"seed {seed}: {most} adapters at once"
    models = {name: adapters.merged(reference, path) for name, path in paths.items()} | {None: reference}
    for handle in handles:
        adapters.assert_greedy(models[handle.adapter], handle)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "how",
    [
        {"dora": True},
        {"use_rslora": True, "alpha": 3},
        {"ranks": {"c_attn|q_proj": 2, r"h\.1\.mlp\.c_fc|1\.mlp\.down_proj": 7}, "alpha_pattern": {"c_attn|v_proj": 9}},
        {"added_bias": True},
        {"bias": True, "dora": True},
    ],
    ids=lambda how: " ".join(how),
)
def test_each_kind_of_lora_equals_its_merged_model(kind, how, tmp_path):
    reference = reference_model(config(kind))
    reference.save_pretrained(tmp_path / "base")
    path = adapters.save(reference, tmp_path / "a", rank=4, seed=3, **how)
    plain = adapters.save(reference, tmp_path / "plain", rank=6, seed=4)
    eng = engine(tmp_path / "base", adapters={"a": path, "plain": plain}, max_adapters=2)
    rng = random.Random(1)
    params = lk.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    handles = [eng.submit(prompt(rng), params, adapter=name) for name in ("a", None, "plain", "a")]
    eng.run()
    models = {"a": adapters.merged(reference, path), "plain": adapters.merged(reference, plain), None: reference}
    for handle in handles:
        adapters.assert_greedy(models[handle.adapter], handle)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_adapters_of_embeddings_and_head(kind, tmp_path):
    reference = reference_model(config(kind))
    reference.save_pretrained(tmp_path / "base")
    options = {"kinds": ("lm_head", "q_proj") if kind == "llama" else ("q_proj",), "embedding": "model.embed_tokens"}
    path = adapters.save(reference, tmp_path / "a", rank=4, **options)
    eng = engine(tmp_path / "base", adapters={"a": path}, max_adapters=2)
    params = lk.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, prompt_logprobs=1)
    handles = [eng.submit([5, 6, 7, 8 + i], params, adapter=name) for i, name in enumerate(("a", None, "a"))]
    eng.run()
    tied = reference.get_output_embeddings().weight
    models = {"a": adapters.merged(reference, path), None: reference}
    if kind == "gemma":  # the head reads the embedding's own weight: PEFT leaves it as it is
        models["a"].lm_head.weight = torch.nn.Parameter(tied)
    for handle in handles:
        adapters.assert_greedy(models[handle.adapter], handle)
        with torch.inference_mode():
            scores = models[handle.adapter](torch.tensor([handle.prompt.tolist()])).logits[0].log_softmax(-1)
        for at, found in handle.prompt_logprobs.items():
            assert abs(found.logprob - float(scores[at - 1, handle.prompt[at]])) < 1e-3


def test_a_product_is_added_to_whatever_a_format_computes(tmp_path):
    reference = reference_model(config("llama")).to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "base")
    path = adapters.save(reference, tmp_path / "a", rank=8, seed=2)
    for quantization, dora in ((None, False), ("int8", False), ("nf4", True), ("int4-g32", True)):
        folder = adapters.save(reference, tmp_path / "dora", rank=8, seed=2, dora=True) if dora else path
        model = load_model(tmp_path / "base", dtype="bfloat16", quantization=quantization)
        plain = load_model(tmp_path / "base", dtype="bfloat16", quantization=quantization)
        slots = make_room(model, 2, 16)
        slots.known["a"] = read_adapter(folder, torch.bfloat16)
        slots.load([None, "a"])
        layer, base = model.layers[0].mlp.down, plain.layers[0].mlp.down
        x = torch.randn(5, base.shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
        slots.use(groups := _groups([1, 2, 1, 0, 2], 2))
        found = layer(x)
        assert groups.tokens.tolist() == [3, 0, 2]
        delta = slots.known["a"].deltas["model.layers.0.mlp.down_proj"]
        eye = torch.eye(base.shape[0]).bfloat16()
        weight = base(eye).float().T + delta.b.float() @ delta.a.float()
        if dora:
            weight *= (delta.magnitude / weight.norm(dim=1))[:, None]
        for i in (0, 2):
            off = (found[i].float() - weight @ x[i].float()).abs().max()
            assert off <= 0.03 * (weight @ x[i].float()).abs().max(), (quantization, float(off))
        assert torch.equal(found[[1, 3, 4]], base(x)[[1, 3, 4]]) or dora


def _groups(slots, num):
    from labkit_kernels.lora import Groups, grouped

    tokens, tiles = (torch.from_numpy(part) for part in grouped(torch.tensor(slots).numpy(), num))
    return Groups(tokens, tiles, torch.tensor(slots))


def test_the_shards_of_all_ranks_add_up_to_the_whole():
    from labkit.loading.dense import DenseLinear
    from labkit.loading.format import LinearSpec, Units
    from labkit.models.lora import AdaptedLinear, Slots

    class Model:
        device, dtype, name = torch.device("cpu"), torch.float32, "toy"

    generator = torch.Generator().manual_seed(0)
    deltas = {name: _delta(generator, out, 24) for name, out in (("q", 32), ("k", 8), ("o", 24))}
    column = LinearSpec({"q": (Units(4, 8),), "k": (Units(1, 8, shared=True),)}, Units(24), "column")
    row = LinearSpec({"o": (Units(24),)}, Units(6, 4), "row")
    fused = LinearSpec({"f": (Units(4, 8), Units(1, 8, shared=True))}, Units(24), "column")
    deltas["f"] = _delta(generator, 40, 24)
    x = torch.randn(3, 24, generator=generator)

    def product(spec, shard, x):
        slots = Slots(Model, 1, 16)
        out, inner = spec.shape(shard)
        layer = AdaptedLinear(DenseLinear(torch.zeros(out, inner)), spec.pieces(shard), slots)
        layer.put(0, [deltas[part.name] for part in layer.parts])
        slots.use(_groups([0, 1, 0], 1))
        return layer(x)

    whole = product(column, Shard(), x)
    assert whole[1].abs().max() == 0 and whole[0].abs().max() > 0
    halves = [product(column, Shard(rank, 2), x) for rank in range(2)]
    assert torch.allclose(torch.cat([half[:, :16] for half in halves], 1), whole[:, :32], atol=1e-6)
    assert all(torch.allclose(half[:, 16:], whole[:, 32:], atol=1e-6) for half in halves)
    summands = [product(row, Shard(rank, 2), x[:, 12 * rank : 12 * rank + 12]) for rank in range(2)]
    assert torch.allclose(sum(summands), product(row, Shard(), x), atol=1e-6)
    first = product(fused, Shard(0, 2), x)
    assert torch.allclose(first, product(fused, Shard(), x)[:, [*range(16), *range(32, 40)]], atol=1e-6)


def _delta(generator, out, inner):
    from labkit.loading.peft import Delta

    return Delta(torch.randn(3, inner, generator=generator), torch.randn(out, 3, generator=generator))


@pytest.mark.filterwarnings("ignore")  # of peft's, for transformers' newest version
def test_peft_itself_reads_these_files_and_merges_them_alike(tmp_path):
    peft = pytest.importorskip("peft")
    reference = reference_model(config("llama"))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for how in ({}, {"dora": True}, {"use_rslora": True, "embedding": "model.embed_tokens"}, {"ranks": {"q_proj": 2}}):
        path = adapters.save(reference, tmp_path / "a", rank=4, **how)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(path)).merge_and_unload()
        with torch.inference_mode():
            expected, found = theirs(ids).logits, adapters.merged(reference, path)(ids).logits
        assert torch.allclose(expected, found, atol=1e-4), how


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_peft_writes_is_served_as_peft_computes_it(kind, tmp_path):
    peft = pytest.importorskip("peft")
    reference = reference_model(config(kind))
    reference.save_pretrained(tmp_path / "base")
    eng = engine(tmp_path / "base", max_adapters=2)
    for i, how in enumerate(
        (
            {"use_dora": True},
            {"use_rslora": True, "bias": "lora_only"},
            {"lora_bias": True},
            {"rank_pattern": {"q_proj": 2}},
        )
    ):
        settings = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, **how)
        torch.manual_seed(i)
        theirs = peft.get_peft_model(copy.deepcopy(reference), settings).eval()
        theirs.save_pretrained(tmp_path / f"a{i}")
        eng.adapters.load(f"a{i}", tmp_path / f"a{i}")
        params = lk.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        adapters.assert_greedy(theirs, eng.generate([3, 1, 4, 1, 5], params, adapter=f"a{i}"))


def test_drafts_are_verified_with_each_rows_adapter(tmp_path):
    reference = reference_model(config("llama"))
    reference.save_pretrained(tmp_path / "base")
    paths = {f"a{i}": adapters.save(reference, tmp_path / f"a{i}", rank=3 + i, seed=i) for i in range(3)}
    eng = engine(tmp_path / "base", adapters=paths, max_adapters=2, draft=lambda ids: ids[-4:])
    params = lk.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    handles = [eng.submit([5 + i] * 7, params, adapter=name) for i, name in enumerate((None, "a0", "a1", "a2", "a0"))]
    eng.run()
    assert any(type(event).__name__ == "Drafted" for event in eng.log)
    models = {name: adapters.merged(reference, path) for name, path in paths.items()} | {None: reference}
    for handle in handles:
        adapters.assert_greedy(models[handle.adapter], handle)
