"""What adapters cost on a CPU: python tools/adapter_speed.py [--only room,batch,load,many]

The shape is Qwen2.5-0.5B's with random weights in bfloat16. `room`: base requests with room for 8 adapters against an
engine without. `batch`: 16 requests with 8 adapters of rank 16 in one batch, on all layers and on q and v, against the
same requests without. Engines take turns, and each pair gives a ratio of processor times, of which the median is
printed: other work on the machine counts less. `load`: an adapter of rank 16 from its files to its slot. `many`: 1,000
adapters of the embedded model, 8 on the device, 32 in host memory.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import labkit as lk
from labkit.bench.adapters import LINEAR, load_random, random_adapter
from labkit.bench.gpu.where import make_config

RANK, NUM = 16, 8
SETTINGS = {"layers": 24, "dtype": "bfloat16"}


def engine(**options):
    config = make_config("qwen2.5-0.5b")
    config.num_hidden_layers = SETTINGS["layers"]
    config.layer_types = config.layer_types[: SETTINGS["layers"]]
    return lk.Engine(
        config, load_format="dummy", dtype=SETTINGS["dtype"], num_blocks=512, prefix_caching=False,
        max_num_batched_tokens=256, max_model_len=512, num_threads=torch.get_num_threads(), **options,
    )  # fmt: skip


def serve(eng, names, prompt: int = 48, output: int = 24) -> float:
    """Processor seconds of 16 requests."""
    params = lk.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for i in range(16):
        eng.submit([10 + (i * 7 + j) % 400 for j in range(prompt)], params, adapter=names[i % len(names)])
    begin = time.process_time()
    eng.run()
    return time.process_time() - begin


def ratio(pairs: int, one, names, other, other_names) -> str:
    """The second's time over the first's."""
    for eng, adapters in ((one, names), (other, other_names)):
        serve(eng, adapters, 8, 2)
    found = []
    for _ in range(pairs):
        first, second = serve(one, names), serve(other, other_names)
        found.append(second / first)
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}, {pairs} pairs)"


def room(pairs: int) -> None:
    plain, roomy = engine(), engine(max_adapters=NUM)
    load_random(roomy, NUM, RANK)
    print("room for 8 adapters, base requests only: time", ratio(pairs, plain, [None], roomy, [None]))


def batch(pairs: int) -> None:
    for kinds in (LINEAR, ("q_proj", "v_proj")):
        eng = engine(max_adapters=NUM)
        names = load_random(eng, NUM, RANK, kinds)
        print(f"8 adapters of rank 16 on {', '.join(kinds)}: time", ratio(pairs, eng, [None], eng, names))


def load(pairs: int) -> None:
    eng = engine(max_adapters=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tensors = {}
        for name, delta in random_adapter(eng.runner.model, RANK).deltas.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = delta.a
            tensors[f"base_model.model.{name}.lora_B.weight"] = delta.b
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {RANK}}}')
        found = []
        for i in range(5):
            begin = time.perf_counter()
            info = eng.adapters.load(f"a{i}", path)
            middle = time.perf_counter()
            eng.runner.model.adapters.load([next(reversed(eng.runner.model.adapters.known)), None])
            found.append((middle - begin, time.perf_counter() - middle))
    size = info.num_bytes / 2**20
    read, put = (min(each) * 1e3 for each in zip(*found, strict=True))
    print(f"load an adapter of {size:.0f} MiB: {read:.0f} ms from files, {put:.0f} ms into its slot (least of 5)")


def many(pairs: int) -> None:
    eng = lk.Engine(dtype="float32", num_blocks=256, max_adapters=8, max_cpu_adapters=32)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {}
        for name, delta in random_adapter(eng.runner.model, 4, kinds=("q_proj", "v_proj")).deltas.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = delta.a
            tensors[f"base_model.model.{name}.lora_B.weight"] = delta.b
        begin = time.perf_counter()
        for i in range(1000):
            path = Path(folder) / str(i)
            path.mkdir()
            tensors[min(tensors)] = tensors[min(tensors)] + 1e-3
            save_file(tensors, path / "adapter_model.safetensors")
            (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
            eng.adapters.load(f"a{i}", path)
        loaded = time.perf_counter() - begin
        params = lk.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        handles = [eng.submit([1, 2, 3], params, adapter=f"a{i * 37 % 1000}") for i in range(200)]
        eng.run()
        eng.check()
    assert all(handle.num_output == 4 for handle in handles)
    kept = len(eng.runner.model.adapters.known)
    print(
        f"1,000 adapters registered in {loaded:.1f} s (files written, too), {kept} in host memory; {eng.adapters.slots}"
    )
    print(f"  200 requests with 200 adapters: {eng.adapters.slots.num_loads} loads into slots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="room,batch,load,many")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24, help="fewer are quicker, and the head then counts for more")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where a processor has no products of bfloat16")
    args = parser.parse_args()
    SETTINGS.update(layers=args.layers, dtype=args.dtype)
    parts = {"room": room, "batch": batch, "load": load, "many": many}
    for name in args.only.split(","):
        parts[name](args.pairs)


if __name__ == "__main__":
    main()
