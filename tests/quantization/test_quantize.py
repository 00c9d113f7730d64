"""Quantized folders hold, bit for bit, the weights that the quantizer chose, in layouts that other programs read."""

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import labkit as lk
from labkit.loading.formats import BY_METHOD
from labkit.models import load_model
from labkit.quantization import awq, folder, gptq, moments
from labkit.quantization import quantize as module
from labkit.quantization.folder import DenseModel
from labkit.quantization.methods import AWQ, GPTQ, METHODS, method_of
from labkit.quantization.stack import Stack, last_hidden
from tests.models.configs import LATENT, NATIVE, config, reference_model

TINY = lk.assets.path("tiny")
READ = [name for name in METHODS if name != "nf4" or "bitsandbytes" in BY_METHOD]  # by labkit's loaders


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw_seed() -> int:
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    return seed


def dense_folder(kind: str, path, seed: int = 0):
    reference_model(config(kind), seed).save_pretrained(path)
    return path


def texts(seed: int, vocabulary: int = 97) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary) for _ in range(256)]]


@pytest.fixture
def chosen(monkeypatch):
    """The weights that a quantizer stood for, by layer."""
    found: dict[str, torch.Tensor] = {}
    original = moments.Change.of.__func__

    def of(cls, name, before, rounded, second=None):
        found[name] = rounded.dense.clone()
        return original(cls, name, before, rounded, second)

    monkeypatch.setattr(moments.Change, "of", classmethod(of))
    return found


# -- the layouts, each unpacked value by value from its description ---------------------------------------------


def bits_of(words: np.ndarray, bits: int, count: int) -> list[int]:
    number = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [number >> bits * i & 2**bits - 1 for i in range(count)]


def unpack_gptq(t, fields, outputs, inputs):
    bits = fields["bits"]
    q = np.array([bits_of(column, bits, inputs) for column in t["qweight"].numpy().T])  # [N, K]
    zeros = np.array([bits_of(row, bits, outputs) for row in t["qzeros"].numpy()]) + 1  # [G, N]
    groups = t["g_idx"].numpy()
    scales = t["scales"].float().numpy()
    assert t["scales"].dtype == torch.float16
    return scales[groups].T * (q - zeros[groups].T).astype(np.float32)


def unpack_awq(t, fields, outputs, inputs):
    place = [0, 2, 4, 6, 1, 3, 5, 7]

    def nibbles(words):  # [rows, N / 8] -> [rows, N]
        found = np.zeros((len(words), outputs), np.int64)
        for c in range(outputs // 8):
            for i in range(8):
                found[:, 8 * c + place[i]] = words[:, c].astype(np.int64) >> 4 * i & 15
        return found

    group = inputs if fields["group_size"] == -1 else fields["group_size"]
    q, z, s = nibbles(t["qweight"].numpy()), nibbles(t["qzeros"].numpy()), t["scales"].float().numpy()
    of = np.arange(inputs) // group
    return (s[of] * (q - z[of]).astype(np.float32)).T


def unpack_nf4(t, fields, outputs, inputs):
    state = json.loads(bytes(t["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["shape"] == [outputs, inputs] and state["quant_type"] == "nf4"
    codes = t["weight"].numpy().flatten()
    flat = np.stack((codes >> 4, codes & 15), 1).flatten()
    levels = t["weight.quant_map"].numpy()[flat]
    return (levels.reshape(-1, state["blocksize"]) * t["weight.absmax"].numpy()[:, None]).reshape(outputs, inputs)


UNPACK = {"gptq": unpack_gptq, "awq": unpack_awq, "nf4": unpack_nf4}
SETTINGS = [
    ("gptq", {"group": 16}), ("gptq", {"group": 8, "symmetric": False, "act_order": False}),
    ("gptq", {"bits": 8, "group": 16}), ("gptq", {"bits": 2, "group": 16, "search": False}),
    ("gptq", {"group": -1}), ("awq", {"group": -1}),
    ("awq", {"group": 16}), ("awq", {"group": 8, "zero_point": False}), ("nf4", {}),
]  # fmt: skip


def tensors_of(path, name):
    stored = load_file(path / "model.safetensors")
    return {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(("method", "options"), SETTINGS)
def test_a_layout_unpacked_by_hand_has_the_chosen_weights(method, options, tmp_path, chosen):
    seed = draw_seed()
    source = dense_folder("llama", tmp_path / "dense", seed)
    given = {"calibration": texts(seed), "length": 64} if METHODS[method].needs_texts else {}
    skip = () if method == "nf4" else ("mlp.",)  # of 72 inputs or outputs: neither groups of 16 nor whole words
    found = lk.quantize(source, method, out=tmp_path / "out", skip=skip, progress=False, **given, **options)
    fields = json.loads((found.folder / "config.json").read_text())["quantization_config"]
    assert len(chosen) == (14 if not skip else 8)
    for name, weight in chosen.items():
        by_hand = UNPACK[method](tensors_of(found.folder, name), fields, *weight.shape)
        np.testing.assert_array_equal(by_hand.astype(np.float32), weight.numpy())


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3_moe"])
def test_labkit_reads_back_exactly_the_chosen_weights(method, kind, tmp_path, chosen):
    seed = draw_seed()
    source = dense_folder(kind, tmp_path / "dense", seed)
    given = {"calibration": texts(seed), "length": 64} if METHODS[method].needs_texts else {}
    found = lk.quantize(source, method, out=tmp_path / "out", progress=False, **given)
    assert len(chosen) == len(found.changes) >= 8
    for name, weight in chosen.items():
        assert torch.equal(lk.load_linear(found.folder, name).dense(torch.float32), weight), name
    ids = torch.tensor(texts(seed)[0])[None, :32]
    hidden = last_hidden(load_model(found.folder, dtype="float32"), ids)
    assert torch.isfinite(hidden).all()


COMPRESSED = [
    ("int4", {"group": 8}), ("int4", {"group": 8, "symmetric": False}), ("int4", {"group": -1, "bits": 3}),
    ("int8", {}), ("fp8", {}), ("fp8", {"block": (16, 32)}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), COMPRESSED)
def test_the_compressed_tensors_library_decompresses_to_the_chosen_weights(method, options, tmp_path, chosen):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    seed = draw_seed()
    source = dense_folder("llama", tmp_path / "dense", seed)
    found = lk.quantize(source, method, out=tmp_path / "out", progress=False, **options)
    fields = json.loads((found.folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(fields).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(fields["format"])
    for name, weight in chosen.items():
        theirs = compressor.decompress(tensors_of(found.folder, name), scheme)["weight"]
        torch.testing.assert_close(theirs.float(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_transformers_reads_the_folder(method, tmp_path, chosen):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    seed = draw_seed()
    source = dense_folder("qwen2", tmp_path / "dense", seed)
    found = lk.quantize(source, method, out=tmp_path / "out", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
    ids = torch.tensor(texts(seed)[0])[None, :32]
    logits = theirs(ids, use_cache=False).logits[0]  # decompresses; of int8 and fp8 also rounds the inputs
    for name, weight in chosen.items():
        assert torch.equal(theirs.get_submodule(name).weight, weight), name
    if method == "int4":
        ours = load_model(found.folder, dtype="float32")
        torch.testing.assert_close(ours.logits(last_hidden(ours, ids)), logits, rtol=1e-3, atol=1e-3)


# -- calibrated methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(NATIVE.keys() - LATENT.keys()))
def test_scales_change_nothing_before_weights_are_rounded(kind, tmp_path):
    """AWQ multiplies columns and divides what comes before: for every family the model stays the same."""
    seed = draw_seed()
    source = DenseModel(dense_folder(kind, tmp_path, seed))
    has_biases = kind in ("starcoder2", "nemotron", "stablelm")  # of norms, which are rounded apart from the weight
    source.dtype = torch.float32 if has_biases else torch.bfloat16  # scales follow a norm's rounded weight
    ids = torch.tensor(texts(seed)).view(4, 64)
    stack, method = Stack(source, 64), AWQ(group=8)
    names, x, scaled = source.layers((), False), stack.embed(ids), 0
    expected = stack.logits(last_hidden(stack.model, ids))
    for layer in range(len(stack.layers)):
        shared = []
        for slots in stack.slots(layer):
            found = moments.Moments.of(stack, layer, x, 64, slots[0])
            shared.append(awq.Shared(slots, found, torch.ones_like(found.size)))
        awq._scale(stack, method, layer, shared, names)
        scaled += sum(float((one.scale - 1).abs().max()) > 0.01 for one in shared)
        x = stack.run(layer, x, 64)
    torch.testing.assert_close(stack.logits(last_hidden(stack.model, ids)), expected, rtol=2e-3, atol=2e-3)
    assert scaled >= (1 if kind in ("olmo2", "olmo3", "exaone4") else 2)


def test_calibration_is_refused_where_heads_share_a_latent(tmp_path):
    with pytest.raises(ValueError, match="int4, int8, fp8 and nf4 need no calibration"):
        Stack(DenseModel(dense_folder("youtu", tmp_path, draw_seed())), 64)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "starcoder2", "granite"])
def test_a_calibrated_folder_is_the_model_that_calibration_ended_with(method, kind, tmp_path, monkeypatch):
    seed = draw_seed()
    source = dense_folder(kind, tmp_path / "dense", seed)
    stacks = []
    original = Stack.__init__
    monkeypatch.setattr(Stack, "__init__", lambda self, *a, **o: (stacks.append(self), original(self, *a, **o))[1])
    found = lk.quantize(source, method, out=tmp_path / "out", calibration=texts(seed), length=64, progress=False)
    ids = torch.tensor(texts(seed)[0])[None, :48]
    ours = load_model(found.folder, dtype="float32")
    torch.testing.assert_close(last_hidden(ours, ids), last_hidden(stacks[0].model, ids), rtol=1e-4, atol=1e-4)


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest():
    torch.manual_seed(draw_seed())
    x = torch.randn(2000, 64) @ (torch.randn(64, 64) * torch.logspace(-0.7, 0.7, 64))  # inputs that go together
    weight, second = torch.randn(48, 64), x.T @ x / len(x)
    nearest = moments.lost(GPTQ(group=16, search=False).round(weight, torch.float16).dense - weight, second).sum()
    for share, options in ((0.45, {}), (0.95, {"act_order": False}), (0.4, {"symmetric": False})):
        found = gptq.solve(weight, second, GPTQ(group=16, **options)).dense(4)
        assert moments.lost(found - weight, second).sum() < share * nearest, options


def test_awq_loses_less_of_the_output_where_a_few_inputs_are_large():
    torch.manual_seed(draw_seed())
    x, weight, method = torch.randn(2000, 64), torch.randn(48, 64), AWQ(group=16)
    x[:, ::16] *= 10
    seen = moments.Moments(x.T @ x / len(x), x.abs().mean(0))
    nearest = moments.lost(method.round(weight, torch.float16).dense - weight, seen.second).sum()
    scale = awq.best_scale(weight, seen, method)
    scaled = method.round(weight * scale, torch.float16).dense / scale
    assert moments.lost(scaled - weight, seen.second).sum() < 0.6 * nearest
    clipped = awq.clipped(weight, seen.second, method).dense(4)
    assert moments.lost(clipped - weight, seen.second).sum() <= nearest


def test_gptq_survives_inputs_that_never_occur():
    torch.manual_seed(draw_seed())
    x = torch.randn(10, 32)  # fewer texts than inputs
    x[:, 5] = 0
    weight = torch.randn(16, 32)
    found = gptq.solve(weight, x.T @ x / 10, GPTQ(group=8)).dense(4)
    assert float((found - weight).abs().max()) < 1.5 * float(weight.abs().max())


# -- the folder -------------------------------------------------------------------------------------------------


def test_an_engine_serves_the_folder_and_another_can_be_quantized_from_an_engine(tmp_path):
    with lk.Engine(num_blocks=64) as eng:
        found = lk.quantize(eng, "int8", out=tmp_path / "eight", progress=False)
    assert {path.name for path in found.folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    }  # fmt: skip
    assert found.bytes_after == pytest.approx((found.folder / "model.safetensors").stat().st_size, rel=0.01)
    with lk.Engine(found.folder, num_blocks=64) as eng:
        text = eng.generate("import os\nimport ", lk.SamplingParams(temperature=0, max_tokens=4)).text
    assert text
    assert repr(found).startswith(f"Quantized('{found.folder}': int8, 56 layers at 8.11 bits a weight, 13.1 MiB -> 7.6")
    assert "layer by layer" in found._repr_html_() and len(found.frame()) == 56


def test_a_large_model_is_written_in_shards_with_an_index(tmp_path, monkeypatch):
    whole = lk.quantize(TINY, "int8", out=tmp_path / "whole", progress=False)
    monkeypatch.setattr(folder, "SHARD_BYTES", 2**20)
    found = lk.quantize(TINY, "int8", out=tmp_path / "shards", progress=False)
    index = json.loads((found.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 4 and index["metadata"]["total_size"] == found.bytes_after
    parts = {}
    for path in sorted(found.folder.glob("*.safetensors")):
        parts |= load_file(path)
    stored = load_file(whole.folder / "model.safetensors")
    assert parts.keys() == stored.keys() and all(torch.equal(parts[name], stored[name]) for name in stored)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that results of torch's operations held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.sizes, self.most, self.refs = {}, {}, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                self.live[key] = self.live.get(key, 0) + 1
                self.sizes[key] = storage.nbytes()
                weakref.finalize(tensor, self.end, key)
        self.most = max(self.most, sum(self.sizes.values()))
        return out

    def end(self, key):
        self.live[key] -= 1
        if not self.live[key]:
            del self.live[key], self.sizes[key]


@pytest.mark.parametrize("method", ["int4", "int8", "fp8", "nf4"])
def test_memory_holds_a_shard_and_one_layer(method, tmp_path, monkeypatch):
    hidden, inner, layers = 64, 192, 24
    fields = json.loads((TINY / "config.json").read_text()) | {
        "num_hidden_layers": layers, "vocab_size": 16, "hidden_size": hidden, "intermediate_size": inner,
    }  # fmt: skip
    shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {f"model.layers.{i}.{name}.weight": torch.randn(shape).bfloat16()
               for i in range(layers) for name, shape in shapes.items()}  # fmt: skip
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    source = tmp_path / "dense"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    del tensors
    (source / "config.json").write_text(json.dumps(fields))
    shard, largest = 2**16, 4 * inner * hidden  # the layer in float32
    monkeypatch.setattr(folder, "SHARD_BYTES", shard)
    options = {"search": False} if method == "int4" else {}
    with Peak() as peak:
        lk.quantize(source, method, out=tmp_path / "out", progress=False, **options)
    assert shard < peak.most < shard + 10 * largest < size / 4, (peak.most, size)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    original = module.Change.of.__func__
    done = []

    def of(cls, name, *args):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(name)
        return original(cls, name, *args)

    monkeypatch.setattr(module.Change, "of", classmethod(of))
    (tmp_path / "here").mkdir()
    with pytest.raises(KeyboardInterrupt):
        lk.quantize(TINY, "int8", out=tmp_path / "here" / "out", progress=False)
    assert len(done) == 10 and not list((tmp_path / "here").iterdir())


def test_what_exists_is_not_overwritten_by_mistake(tmp_path):
    out = tmp_path / "out"
    lk.quantize(TINY, "int8", out=out, progress=False)
    with pytest.raises(ValueError, match=r"out' exists: choose another out=, or overwrite=True"):
        lk.quantize(TINY, "fp8", out=out, progress=False)
    lk.quantize(TINY, "fp8", out=out, overwrite=True, progress=False)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("important")
    with pytest.raises(ValueError, match="is no model's folder"):
        lk.quantize(TINY, "int8", out=mine, overwrite=True, progress=False)
    assert (mine / "notes.txt").read_text() == "important"


@pytest.mark.parametrize(
    ("method", "key"), [("int8", "ignore"), ("gptq", "dynamic"), ("awq", "modules_to_not_convert")]
)
def test_skipped_layers_stay_dense_and_are_listed(method, key, tmp_path):
    source = dense_folder("llama", tmp_path / "dense")
    given = {"calibration": texts(0), "length": 64} if METHODS[method].needs_texts else {}
    found = lk.quantize(source, method, out=tmp_path / "out", skip=("down_proj", "layers.1."), progress=False, **given)
    listed = json.loads((found.folder / "config.json").read_text())["quantization_config"][key]
    assert "model.layers.0.mlp.down_proj" in found.kept and len(found.kept) == 8 and len(found.changes) == 6
    if method == "gptq":
        assert "-:model\\.layers\\.1\\.mlp\\.up_proj$" in listed
    else:
        assert set(found.kept) <= set(listed)
    for name in found.kept:
        assert torch.equal(lk.load_linear(found.folder, name).weight, lk.load_linear(source, name).weight)
    with lk.Engine(found.folder, num_blocks=32, skip_tokenizer_init=True) as eng:
        params = lk.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        assert eng.generate([5, 6, 7], params).num_output == 2


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_a_head_of_its_own_can_be_quantized(method, tmp_path):
    source = dense_folder("mistral", tmp_path / "dense")
    stays = lk.quantize(source, method, out=tmp_path / "a", progress=False)
    assert type(load_model(stays.folder, dtype="float32").head).__name__ == "DenseLinear"
    found = lk.quantize(source, method, out=tmp_path / "b", head=True, progress=False)
    assert type(load_model(found.folder, dtype="float32").head).__name__ != "DenseLinear"
    ignored = [json.loads((one.folder / "config.json").read_text())["quantization_config"]["ignore"]
               for one in (stays, found)]  # fmt: skip
    assert ignored == [["lm_head"], []]


def test_the_group_is_the_largest_that_fits_unless_it_is_given(tmp_path):
    assert str(method_of("int4", {}).fitted([(8, 4096), (8, 11008)])) == "int4(group=128)"
    message = (
        r"int4\(group=64\) cannot quantize model\.layers\.\d\.mlp\.down_proj: groups of 64 do not divide its 688 "
        r"inputs \(group=16 does\); skip=\('down_proj',\)"
    )
    with pytest.raises(ValueError, match=message):
        lk.quantize(TINY, "int4", group=64, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "int5"}, "unknown method 'int5'; did you mean 'int"),
        ({"method": "int4", "grop": 32}, "method 'int4' has no option 'grop'; did you mean 'group'"),
        ({"method": "gptq", "bits": 5}, "2, 3, 4 or 8 bits, got bits=5"),
        ({"method": "awq", "bits": 3}, "AWQ weights have 4 bits"),
        ({"method": "nf4", "blocksize": 100}, "power of two"),
        ({"method": "fp8", "block": 128}, r"two numbers \(outputs, inputs\)"),
        ({"method": "int8", "calibration": ["x"]}, "needs no calibration"),
        ({"method": "awq", "calibration": "one string"}, "got one string"),
        ({"method": "gptq", "calibration": ["short"]}, "at least 16 are needed"),
        ({"method": "awq", "head": True}, "leaves the head dense"),
        ({"method": "int8", "head": True}, "has no lm_head of its own"),
        ({"method": "int8", "skip": "dwn_proj"}, "is part of no linear layer's name; did you mean 'down_proj'"),
    ],
)
def test_mistakes_are_named(given, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        lk.quantize(TINY, out=tmp_path / "out", progress=False, **given)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_quantized_are_refused(tmp_path):
    dense_folder("gpt2", tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2' has no native decoder"):
        lk.quantize(tmp_path / "gpt2", out=tmp_path / "out")
    found = lk.quantize(TINY, "int8", out=tmp_path / "int8", progress=False)
    with pytest.raises(ValueError, match=r"is quantized already \(compressed-tensors\)"):
        lk.quantize(found.folder, out=tmp_path / "out")
    with pytest.raises(ValueError, match="serves no model from a folder"):
        lk.quantize(lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(num_blocks=4, block_size=4)),
                              runner=lk.FakeRunner(), clock=lk.VirtualClock()))  # fmt: skip
