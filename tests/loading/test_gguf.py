"""GGUF files give the numbers that gguf-py reads, the tokens that transformers generates, and errors that name what is
wrong with them."""

import json
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.loading import gguf as module
from labkit.loading import integers
from labkit.loading.gguf import GGUFFile
from labkit.loading.gguf_blocks import TYPES, dequantize
from labkit.loading.integers import IntegerLinear
from labkit.models import load_model
from labkit.text.gguf import tokenizer_of
from tests.loading.gguf_files import MODELS, model_of, write
from tests.models.test_decoder import paged_logits, prompts_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", sorted(TYPES), ids=lambda number: TYPES[number].name)
def test_blocks_are_dequantized_to_the_bit_as_gguf_py_does(number):
    own, theirs = TYPES[number], gguf.GGMLQuantizationType(number)
    assert (own.name, (own.num_elements, own.num_bytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
    data = np.random.default_rng(number).integers(0, 256, (64, 3 * own.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite scales
        expected = gguf.quants.dequantize(data.view({0: np.float32, 1: np.float16}.get(number, np.uint8)), theirs)
    found = dequantize(own, data)
    assert found.dtype == np.float32
    missing = np.isnan(expected)
    assert np.array_equal(missing, np.isnan(found))
    assert np.array_equal(expected.view(np.uint32)[~missing], found.view(np.uint32)[~missing])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_those_of_transformers_in_every_family(name, tmp_path):
    reference = model_of(name)
    short = 64 if name == "phi3-long" else None  # up to here it uses its short factors
    model = load_model(write(tmp_path / "model.gguf", name, reference), max_model_len=short)
    assert model.dtype == torch.float32
    rng = random.Random(0)
    prompts = prompts_of(rng)
    for prompt, found in zip(prompts, paged_logits(model, prompts, 16, rng), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_long_factors_are_used_where_a_request_may_be_longer_than_the_original_context(tmp_path):
    reference = model_of("phi3-long")
    model = load_model(write(tmp_path / "model.gguf", "phi3-long", reference))
    prompt = [i % 90 for i in range(70)]
    found = paged_logits(model, [prompt], 16, random.Random(0))[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


# -- serving -----------------------------------------------------------------------------------------------------


def rounded(model, type: gguf.GGMLQuantizationType):
    """The model with the matrices that a file of this type holds."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                data = gguf.quants.quantize(value.numpy(), type)
                value.copy_(torch.from_numpy(gguf.quants.dequantize(data, type)))
    return model


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [31]]


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_engine_generates_the_tokens_of_transformers(name, type, tmp_path):
    model = model_of(name)
    path = write(tmp_path / "model.gguf", name, model, quantize=type)
    engine = lk.Engine(path, dtype="float32", device="cpu", skip_tokenizer_init=True, num_blocks=64)
    handles = engine.generate(PROMPTS, lk.SamplingParams(temperature=0, max_tokens=12))
    reference = rounded(model, gguf.GGMLQuantizationType[type])
    for prompt, handle in zip(PROMPTS, handles, strict=True):
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, attention_mask=torch.ones(1, len(prompt))
            )
        assert list(handle.output_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_types_that_gguf_py_only_reads_are_served_with_the_numbers_that_it_reads(type, tmp_path):
    settings = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = model_of("llama", **settings)
    path = write(tmp_path / "model.gguf", "llama", model, quantize=type)
    numbers = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for key, value in model.named_parameters():
            found = numbers[gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(key, (".weight",))]
            if "q_proj" in key or "k_proj" in key:
                found = found.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(found.shape)  # heads of 64
            value.copy_(torch.from_numpy(found.copy()))
    loaded = load_model(path, dtype="float32", max_model_len=64)
    found = paged_logits(loaded, [PROMPTS[1]], 16, random.Random(0))[0]
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0]
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                                  "IQ4_NL", "MXFP4"])  # fmt: skip
def test_blocks_stay_quantized_where_there_are_kernels(type, tmp_path):
    settings = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True}
    path = write(tmp_path / "model.gguf", "llama", model_of("llama", **settings), quantize=type)
    exact = load_model(path, dtype="float32", max_model_len=64)
    loaded = load_model(path, dtype="bfloat16", max_model_len=64)
    if not integers.available():
        pytest.skip("this machine has no AVX2, or no compiler")
    assert loaded.embedding is loaded.head  # which is tied
    for found, expected in [
        (loaded.head, exact.head.weight),
        (loaded.layers[0].attention.qkv, exact.layers[0].attention.qkv.weight),
        (loaded.layers[0].mlp.up, exact.layers[0].mlp.up.weight),
        (loaded.layers[0].mlp.down, exact.layers[0].mlp.down.weight),
    ]:
        assert isinstance(found, IntegerLinear)
        assert found.weight.bits == (8 if type in ("Q5_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K") else 4)
        off = (found.dense(torch.float32) - expected).abs().max()  # scales of two numbers are rounded to float16
        assert off <= expected.abs().max() * (0 if type in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4") else 2**-10)
    if type in ("Q4_K", "Q8_0", "IQ4_NL"):
        a, b = (paged_logits(model, [PROMPTS[1]], 16, random.Random(0))[0] for model in (exact, loaded))
        assert (a - b.float()).norm() <= 0.05 * a.norm()


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    backend = lk.Tokenizer.load(lk.assets.path("tiny")).backend
    described = json.loads(backend.to_str())
    special = {token["content"] for token in described["added_tokens"]}
    tokens = sorted(vocab := backend.get_vocab(), key=vocab.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}")
    writer.add_eot_token_id(5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The embedded model as a GGUF file, tokenizer included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lk.assets.path("tiny"), dtype="float32")
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", model, fields=[add_tokenizer])


def test_text_in_text_out_from_a_file_alone(tiny):
    engine = lk.Engine(tiny, device="cpu", num_blocks=64)
    expected = lk.Engine(dtype="float32", device="cpu", num_blocks=64)
    params = lk.SamplingParams(temperature=0, max_tokens=16)
    texts = ["import os\nimport ", "def f(x):", "class "]
    assert [h.text for h in engine.generate(texts, params)] == [h.text for h in expected.generate(texts, params)]
    assert engine.tokenizer.chat_text([{"role": "user", "content": "hi"}]) == "<|user|>hi<|assistant|>"
    assert engine.runner.eos_token_ids == (0, 5)


def test_a_folder_with_one_gguf_file_is_a_model(tiny, tmp_path):
    shutil.copy(tiny, tmp_path / "a.gguf")
    assert load_model(tmp_path).shape.num_layers == 8
    shutil.copy(tiny, tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF models: name one of them"):
        load_model(tmp_path)


def test_only_the_native_decoder_reads_it(tiny):
    with pytest.raises(ValueError, match="is read by the native decoder only"):
        load_model(tiny, path="transformers")
    assert load_model(tiny, load_format="dummy").shape.num_layers == 8


def test_the_dtype_is_that_of_the_matrices(tmp_path):
    for type, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)):
        assert load_model(write(tmp_path / f"{type}.gguf", "qwen2", model_of("qwen2"), quantize=type)).dtype == dtype
    path = write(tmp_path / "F16.gguf", "qwen2", model_of("qwen2"), quantize="F16")
    assert load_model(path).dtype == torch.bfloat16, "on a CPU"
    assert load_model(path, dtype="float16").dtype == torch.float16


# -- parts and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q4_1"])
def test_a_part_is_that_part_of_the_whole_and_nothing_else_is_dequantized(type, tmp_path, monkeypatch):
    file = GGUFFile(write(tmp_path / "model.gguf", "llama3", model_of("llama3"), quantize=type))
    sizes = []
    monkeypatch.setattr(
        module, "dequantize", lambda type, data: sizes.append(data.shape) or dequantize(type, data)
    )  # fmt: skip
    rng = random.Random(type)
    for name, shape in file.shapes.items():
        whole = file.read(name, torch.float32, CPU)
        assert tuple(whole.shape) == shape
        for _ in range(5):
            cuts = [sorted(rng.sample(range(size + 1), 2)) for size in shape]
            part = tuple(slice(*cut) for cut in cuts[: rng.randint(0, len(shape))])
            sizes.clear()
            assert torch.equal(file.read(name, torch.float32, CPU, part), whole[part])
            if len(shape) == 2:
                assert sum(rows for rows, _ in sizes) == len(whole[part])
    with pytest.raises(ValueError, match=r"lacks tensor 'model.layers.0.surprise'"):
        file.read("model.layers.0.surprise", torch.float32, CPU)
    file.close()
    with pytest.raises(ValueError, match=r"model.gguf is closed"):
        file.read("model.norm.weight", torch.float32, CPU)


def split(folder: Path, count: int, numbers=None) -> list[Path]:
    """A llama in several files, by hand: the metadata in the first one, and tensors in all."""
    whole = gguf.GGUFReader(write(folder / "whole", "llama", model_of("llama")))
    paths = [folder / f"x-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for field in whole.fields.values():
            if i == 0 and field.name.startswith("llama."):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", (numbers or range(count))[i])
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[i::count]:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "whole").rename(folder / "whole.bin")
    return paths


def test_a_split_model_is_read_from_any_of_its_files(tmp_path):
    paths = split(tmp_path, 3)
    expected = list(
        load_model(write(tmp_path / "one", "llama", model_of("llama")).rename(tmp_path / "o.gguf")).tensors()
    )
    (tmp_path / "o.gguf").unlink()
    for source in (*paths, tmp_path):
        for a, b in zip(load_model(source).tensors(), expected, strict=True):
            assert torch.equal(a, b)
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 3 parts, x-00002-of-00003.gguf first"):
        load_model(paths[0])


def test_files_of_another_split_are_refused(tmp_path):
    paths = split(tmp_path, 2, numbers=[0, 0])
    with pytest.raises(
        ValueError, match=r"x-00002-of-00002.gguf: its metadata says part 0 of 2 .* its name says 1 of 2"
    ):
        load_model(paths[0])


# -- refused -----------------------------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GGUFFile(path)
    assert path.name in str(error.value)


def test_architectures_and_keys_without_a_meaning_here_are_named(tmp_path):
    model, path = model_of("llama"), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(path, r"architecture 'rwkv7' is not mapped; labkit reads gemma, gemma2, .*starcoder2")
    for add, message in (
        (lambda w: w.add_float32("llama.attention.temperature_scale", 0.1), "does not know what it changes"),
        (lambda w: w.add_bool("llama.attention.causal", False), r"knows \(True,\), and it is False"),
        (lambda w: w.add_array("llama.attention.causal", [True, True]), "and it is "),
        (lambda w: w.add_array("llama.expert_count", [2, 3]), "its layers differ"),
        (lambda w: w.add_array("llama.rope.scaling.type", [2, 3]), "it must be a text"),
        (lambda w: w.add_array("split.no", [0, 0]), "its metadata says part"),
        (lambda w: w.add_array("split.tensors.count", [0, 0]), "the parts hold 21 tensors together, not"),
        (lambda w: w.add_token_list([str(i) for i in range(98)]), "it has 98 tokens, and embeddings of 97"),
        (lambda w: w.add_string("llama.rope.scaling.type", "ntk"), "'ntk' with factor 0.0 cannot be expressed"),
        (
            lambda w: w.add_tensor("blk.0.attn_surprise.weight", np.ones(3, np.float32)),
            "has no place in the architecture",
        ),
        (lambda w: w.add_tensor("blk.9.attn_norm.weight", np.ones(3, np.float32)), "has no place in the architecture"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), r"has shape \(3,\), not \(8,\)"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "its numbers must be positive"),
    ):
        refused(write(path, "llama", model, fields=[add]), message)


def test_types_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, r"tensor 'token_embd.weight': its type is IQ2_XXS, which labkit does not read; it reads F32, F16")


def text(value: str | bytes, count: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if count is None else count) + data


def header(*, magic=b"GGUF", version=3, tensors=(), fields=(), num_tensors=None, num_fields=None, data=bytes(256)):
    counts = (len(tensors) if num_tensors is None else num_tensors, len(fields) if num_fields is None else num_fields)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join((*fields, *tensors))
    return head + bytes(-len(head) % 32) + data


def tensor(name: str | bytes = "a", shape=(4,), type=0, offset=0, num_dims=None) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape) if num_dims is None else num_dims, *shape)
    return text(name) + dims + struct.pack("<IQ", type, offset)


U32 = struct.pack("<I", 4)
HOSTILE = {
    "no magic": (header(magic=b"GGML"), "the magic: it is not that of a GGUF file"),
    "version": (header(version=1), "the version: it is 1"),
    "big-endian": (header(version=3 << 24), "the file is big-endian"),
    "empty": (b"", "it has 0 bytes, fewer than a header"),
    "many tensors": (header(num_tensors=2**60), "the number of tensors: 1152921504606846976 do not fit"),
    "many fields": (header(num_fields=2**64 - 1), "the number of fields: .* do not fit"),
    "long key": (header(fields=[text("k", 2**62)]), "field 0: its name has .* bytes, more than 65535"),
    "key beyond the end": (header(fields=[text("k", 60000)]), "field 0: it needs 60000 bytes, and .* are left"),
    "long text": (header(fields=[text("k") + struct.pack("<IQ", 8, 2**63)]), "field 'k': it needs 9223372036854775808"),
    "long array": (header(fields=[text("k") + struct.pack("<IIQ", 9, 5, 2**62)]), "field 'k': it needs 18446744"),
    "long list": (header(fields=[text("k") + struct.pack("<IIQ", 9, 8, 2**61)]), "field 'k': .* strings do not fit"),
    "nested array": (header(fields=[text("k") + struct.pack("<IIQ", 9, 9, 1)]), "field 'k': it is an array of arrays"),
    "unknown kind": (header(fields=[text("k") + struct.pack("<I", 77)]), "field 'k': there is no value type 77"),
    "not UTF-8": (header(fields=[text(b"\xff\xfe")]), "field 0: its text is not UTF-8"),
    "field twice": (header(fields=[text("k") + U32 + bytes(4)] * 2), "field 'k': it is there twice"),
    "tensor twice": (header(tensors=[tensor()] * 2), "tensor 'a': it is there twice"),
    "long name": (header(tensors=[tensor("n" * 64)]), "tensor 0: its name has 64 bytes, more than 63"),
    "five dimensions": (header(tensors=[tensor(shape=(1,) * 5)]), "tensor 'a': it has 5 dimensions"),
    "no dimensions": (header(tensors=[tensor(shape=())]), "tensor 'a': it has 0 dimensions"),
    "a dimension of 0": (header(tensors=[tensor(shape=(4, 0))]), r"'a': shape \(0, 4\) is not made of whole blocks"),
    "overflow": (header(tensors=[tensor(shape=(2**32, 2**32, 4))]), "tensor 'a': it ends at byte .* of .*cut short"),
    "half a block": (header(tensors=[tensor(shape=(33,), type=8)]), "tensor 'a': .* whole blocks of 32 .Q8_0"),
    "unknown type": (header(tensors=[tensor(type=1000)]), "tensor 'a': its type is 1000, which labkit does not read"),
    "offset": (header(tensors=[tensor(offset=4)]), "tensor 'a': its offset 4 is no multiple of 32"),
    "offset beyond the end": (header(tensors=[tensor(offset=2**63)]), "tensor 'a': it ends at byte"),
    "cut short": (header(tensors=[tensor(shape=(64,))])[:-1], "tensor 'a': it ends at byte .* is the file cut short"),
    "alignment": (header(fields=[text("general.alignment") + U32 + b"\x18\0\0\0"]), "a power of two, and is 24"),
    "alignment 0": (header(fields=[text("general.alignment") + U32 + bytes(4)]), "a power of two, and is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_headers_are_refused_and_the_reason_is_named(name, tmp_path):
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    refused(path, message)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A whole model with a tokenizer of a few tokens."""

    def tokens(writer):
        names = ["<s>", "</s>", "\u2581", "a", "b", "ab", *(f"t{i}" for i in range(91))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(names)
        writer.add_token_types([3, 3, *[1] * 95])
        writer.add_token_scores([-float(i) for i in range(97)])

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write(path, "llama3", model_of("llama3"), quantize="Q8_0", fields=[tokens]).read_bytes()


WORDS = [0, 1, 2, 3, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_a_header_is_a_value_error_or_a_readable_model(small, tmp_path_factory, data):
    damaged, end = bytearray(small), 7000  # the header ends before
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        kind = data.draw(st.sampled_from(["byte", "word", "cut", "insert", "remove"]))
        if kind == "byte":
            damaged[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "word":
            size = data.draw(st.sampled_from([4, 8]))
            damaged[at : at + size] = (data.draw(st.sampled_from(WORDS)) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "cut":
            del damaged[data.draw(st.integers(0, len(damaged))) :]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=40))
        else:
            del damaged[at : at + data.draw(st.integers(1, 40))]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = GGUFFile(path)
        for name in file.shapes:
            file.read(name, torch.float32, CPU)
        tokenizer_of(file.fields, str(path))
    except ValueError as error:
        assert "damaged.gguf" in str(error)
