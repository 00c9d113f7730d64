"""Files that are damaged, incomplete or of another kind are named, and what is wrong with them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import labkit as lk
from labkit.models import load_model


@pytest.fixture
def folder(tmp_path):
    """A copy of the small embedded model, to break."""
    copy = tmp_path / "model"
    shutil.copytree(lk.assets.path("tiny-draft"), copy)
    return copy


def weights(folder):
    return folder / "model.safetensors"


def test_a_file_cut_short_is_named(folder):
    data = weights(folder).read_bytes()
    for cut in (data[: len(data) // 2], data[:4], b""):
        weights(folder).write_bytes(cut)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short"):
            load_model(folder)


def test_missing_and_misshapen_tensors_are_named(folder):
    tensors = load_file(weights(folder))
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights(folder))
    with pytest.raises(ValueError, match=f"lacks tensor '{name}'"):
        load_model(folder)
    save_file(tensors | {name: tensors[name][:-1].clone()}, weights(folder))
    with pytest.raises(ValueError, match=f"tensor '{name}' has shape .*, the config makes it"):
        load_model(folder)
    save_file(tensors | {"model.layers.0.surprise": torch.zeros(3)}, weights(folder))
    with pytest.raises(ValueError, match=r"1 tensors have no place .* model.layers.0.surprise"):
        load_model(folder)


def test_shards_are_read_and_a_missing_one_is_named(folder):
    tensors = load_file(weights(folder))
    expected = load_model(folder)
    names = sorted(tensors)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    weights(folder).unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for a, b in zip(load_model(folder).tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b)
    index.write_text(json.dumps({"weight_map": files | {"ghost": "model-0.safetensors"}}))
    with pytest.raises(ValueError, match="the index names 1 tensors that no shard holds, 'ghost' first"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": files}))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-1.safetensors of its 3 shards"):
        load_model(folder)


def test_folders_that_hold_no_model_say_what_they_lack(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_model(tmp_path)
    weights(folder).unlink()
    with pytest.raises(ValueError, match=r'no weights .*: load_format="dummy"'):
        load_model(folder)
    assert load_model(folder, load_format="dummy").vocab_size == 4096
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        load_model(folder)


def test_configs_that_cannot_be_served_are_named(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"model_type": "lama"}, "names the model type 'lama', which transformers does not know; did you mean 'llama'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "pass trust_remote_code=True"),
        ({"hidden_act": "swoosh"}, "activation 'swoosh' is not known"),
    ]:
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            lk.Engine(folder, num_blocks=8).generate([1], lk.SamplingParams(max_tokens=1))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_model(folder)


def test_a_name_that_is_no_folder_is_asked_of_the_hub_and_the_answer_is_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="model 'nobody/nothing': there is no such folder here, and the hub did not"):
        load_model("hf:nobody/nothing")
    with pytest.raises(ValueError, match="needs the package modelscope"):
        load_model("ms:nobody/nothing")
    with pytest.raises(ValueError, match=r"there is no folder './nothing'"):
        load_model("./nothing")


MEASURE = """
import sys, re
from labkit.models import load_model
from transformers import LlamaConfig
import torch
def peak(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
import threading, time
before, most, done = peak(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        most[0] = max(most[0], peak()); time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
model = load_model(sys.argv[1], dtype="bfloat16")
done.set(); watcher.join()
print(most[0] - before, sum(t.numel() * t.element_size() for t in model.tensors()) / 2**20)
"""


def test_loading_takes_no_more_memory_than_the_weights_and_one_shard(tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    from transformers import LlamaConfig, LlamaForCausalLM

    big = LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).bfloat16()
    big.save_pretrained(tmp_path, max_shard_size="40MB")
    del big
    found = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    grown, size = map(float, found.stdout.split())
    assert size > 200 and grown < size + 40 + 60, f"{grown:.0f} MiB for {size:.0f} MiB of weights"


def test_a_gguf_file_of_a_hub_is_named_by_its_type(monkeypatch, tmp_path):
    import huggingface_hub

    from labkit.loading.checkpoint import resolve

    asked = []
    for name in (
        "m-Q4_0.gguf",
        "m-iq4_0.gguf",
        "m.q8_0.gguf",
        "m-Q6_K-00001-of-00002.gguf",
        "m-Q6_K-00002-of-00002.gguf",
    ):
        (tmp_path / name).write_bytes(b"")

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/m:Q4_0").name == "m-Q4_0.gguf"
    assert asked == [("org/m", ["*Q4_0*.gguf", "*q4_0*.gguf", "*Q4_0*.gguf"])]
    assert resolve("hf:org/m:q8_0").name == "m.q8_0.gguf"
    assert resolve("org/m:Q6_K").name == "m-Q6_K-00001-of-00002.gguf"
    with pytest.raises(ValueError, match="'org/m:Q5_K_M': one GGUF file of type 'Q5_K_M' is wanted, the hub has none"):
        resolve("org/m:Q5_K_M")
