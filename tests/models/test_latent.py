"""Multi-head latent attention: what is cached, what is refused, and checkpoints as they are stored."""

import random

import pytest
import torch
from labkit_kernels.attention import make_batch, paged_attention, reference
from safetensors.torch import load_file, save_file

import labkit as lk
from labkit.models import load_model
from labkit.models.base import Batch, Capture
from labkit.runner.groups import one_group
from labkit.runner.memory import make_caches
from tests.loading.packers import fp8
from tests.models.configs import VOCAB, config, reference_model
from tests.models.test_decoder import paged_logits, prompts_of

CPU = torch.device("cpu")


def dummy(kind="deepseek_v3", **options):
    return load_model(config(kind), load_format="dummy", seed=1, **{"dtype": "float32", **options})


def engine(model, num_blocks=40, **options):
    sched = lk.Scheduler(lk.BlockManager(num_blocks, 4), watermark=0.0)
    return lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, **options))


def test_the_cache_holds_one_latent_a_token_and_no_values():
    model = dummy()
    runner = engine(model).runner
    assert runner.bytes_per_block(4) == len(model.kv) * 4 * (20 + 8) * 4
    assert sum(tensor.nbytes for tensor in runner.store.flat) == 41 * runner.bytes_per_block(4)
    for keys, values in runner.caches:
        assert values.data_ptr() == keys.data_ptr() and keys.shape[3] == 28 and values.shape[3] == 20


def test_a_snapshot_and_a_fork_keep_tokens():
    seed = random.randrange(10**6)
    prompt = [random.Random(seed).randrange(VOCAB) for _ in range(11)]
    params = lk.SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    eng = engine(dummy())
    handle = eng.submit(prompt, params)
    for _ in range(5):
        eng.step()
    saved, fork = eng.snapshot(), eng.fork()
    eng.run()
    expected = list(handle.output_ids)
    eng.restore(saved)
    eng.run()
    assert handle.output_ids == expected and len(expected) == 12, f"seed {seed}"
    fork.run()
    assert fork.request(handle.id).output_ids == expected, f"seed {seed}"


@pytest.mark.parametrize(
    "kind, dtype, most",
    [("deepseek_v2", "float32", 2e-5), ("mistral4", "float32", 2e-5), ("youtu", "float32", 2e-5),
     ("youtu", "bfloat16", 0.05)],
)  # fmt: skip
def test_prefills_by_head_equal_attention_to_latents(kind, dtype, most, monkeypatch, tmp_path):
    """Long prompts, short ones and a decode row in a step, with and without a past."""
    seed = random.randrange(10**6)
    reference_model(config(kind)).save_pretrained(tmp_path)
    model, rng = load_model(tmp_path, dtype=dtype), random.Random(seed)
    lengths, past = (29, 1, 40, 6, 23), (0, 22, 8, 5, 0)
    ids = [torch.tensor([rng.randrange(VOCAB) for _ in range(length)]) for length in lengths]
    table = torch.arange(1, 1 + 5 * 10, dtype=torch.int32).view(5, 10)

    def batch(begin, end):
        at = [torch.arange(a, b) for a, b in zip(begin, end, strict=True)]
        counts = torch.tensor([0, *(len(one) for one in at)]).cumsum(0).int()
        slots = [row[one // 5] * 5 + one % 5 for row, one in zip(table, at, strict=True)]
        tokens = torch.cat([one[a % len(one)] for one, a in zip(ids, at, strict=True)])
        bounds = {"max_query_len": max(map(len, at)), "max_seq_len": max(end)}
        return Batch(tokens, torch.cat(at), torch.cat(slots).long(), table, counts, torch.tensor(end).int(), **bounds)

    steps = batch((0,) * 5, past), batch(past, (29, 23, 40, 11, 23))
    steps = steps[1:] if not any(past) else steps
    attention, found = type(model.layers[0].attention), []
    by_head = attention._seen_by_head
    for large in (True, False):
        calls = []
        monkeypatch.setattr(attention, "_seen_by_head", lambda *given, calls=calls: calls.append(1) or by_head(*given))
        if not large:
            monkeypatch.setattr(attention, "_large", lambda *_: [])
        caches = make_caches(model, one_group(model.kv), model.dtype, 51, 5, CPU)
        with torch.inference_mode():
            found.append([model.forward(step, caches).float() for step in steps][-1])
        assert bool(calls) == large
    assert (found[0] - found[1]).abs().max() <= most * found[1].abs().max(), f"{kind}, seed {seed}"


def test_attention_that_is_captured_is_that_of_the_model(tmp_path):
    theirs = reference_model(config("deepseek_v2"))
    theirs.save_pretrained(tmp_path)
    model, rng = load_model(tmp_path, dtype="float32"), random.Random(0)
    rng.randint = lambda low, high: high  # the whole prompt in one step
    capture = Capture(attention_layers=frozenset({1}))
    prompt = [3, 1, 4, 1, 5, 9, 2]
    paged_logits(model, [prompt], 4, rng, capture)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt]), output_attentions=True).attentions[1][0]
    torch.testing.assert_close(capture.attention[1][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [(16, 16), (128, 128)])
def test_a_checkpoint_in_fp8_blocks_with_layers_that_guess_further_tokens(block, tmp_path):
    """As DeepSeek-V3's own: attention and experts in float8, routers dense; the last layers are for drafts."""
    settings = config("deepseek_v3")
    settings.quantization_config = {"quant_method": "fp8", "weight_block_size": list(block)}
    theirs = reference_model(config("deepseek_v3"))
    theirs.save_pretrained(tmp_path)
    tensors, dense = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight") or "kv_a_proj" in name]:
        packed, weight = fp8(tensors.pop(name), block=block)
        tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in packed.items()}
        dense[name] = weight
    stored = dict(tensors)
    stored |= {name.replace(".layers.2.", ".layers.3."): x for name, x in tensors.items() if ".layers.2." in name}
    save_file({name: x.contiguous().clone() for name, x in stored.items()}, tmp_path / "model.safetensors")
    settings.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    plain = tmp_path / "dense"
    theirs.save_pretrained(plain)
    save_file(load_file(plain / "model.safetensors") | dense, plain / "model.safetensors")
    expected = load_model(plain, dtype="float32")
    prompts = prompts_of(random.Random(1))
    ours, other = (paged_logits(one, prompts, 4, random.Random(2)) for one in (model, expected))
    for a, b in zip(ours, other, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_no_bit_depends_on_the_batch_in_deterministic_mode():
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    model = dummy("deepseek_v3", deterministic=True)
    prompt = [rng.randrange(VOCAB) for _ in range(60)]
    others = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 30]))] for _ in range(4)]
    alone = paged_logits(model, [prompt], 16, random.Random(1))[0]
    beside = paged_logits(model, [*others, prompt], 4, random.Random(2))[-1]
    assert torch.equal(alone, beside), f"seed {seed}"


def test_what_latents_do_not_allow_is_refused_by_name():
    model = dummy()
    with pytest.raises(ValueError, match=r"kv_cache_dtype='int8' is not there .* latents: use kv_cache_dtype='auto'"):
        lk.TorchRunner(model, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="kv= needs keys and values of each head"):
        engine(model).submit([1, 2, 3], lk.SamplingParams(max_tokens=4, kv=lk.StreamingLLM(window=8)))
    with pytest.raises(ValueError, match="all its heads share a latent"):
        engine(model).submit([1, 2, 3], lk.SamplingParams(max_tokens=4, capture={"k": [0]}))


def test_other_weights_are_written_in_place(tmp_path):
    model, prompts = dummy(), prompts_of(random.Random(1))
    theirs = reference_model(config("deepseek_v3"), seed=5)
    theirs.save_pretrained(tmp_path)
    eng = engine(model)
    eng.load_weights(tmp_path)
    fresh = load_model(tmp_path, dtype="float32")
    for a, b in zip(*(paged_logits(one, prompts, 4, random.Random(2)) for one in (model, fresh)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_a_part_of_their_keys(dtype):
    """16 heads on one key of 576, as DeepSeek-V2-Lite has."""
    seed = random.randrange(10**6)
    given = ([(1, 130), (37, 37), (1, 1), (3, 70)], 16, 1, 576, 512, 16, ("joined",))
    args, options = make_batch(CPU, dtype, torch.Generator().manual_seed(seed), *given)
    assert args[2].data_ptr() == args[1].data_ptr()
    found = paged_attention.pick(CPU, dtype)(*args, **options)
    expected = reference.paged_attention(*(x.float() if x.is_floating_point() else x for x in args), **options)
    assert (found.float() - expected).abs().max() <= (2e-5 if dtype == torch.float32 else 0.03), f"seed {seed}"
