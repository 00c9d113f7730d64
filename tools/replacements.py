"""What replacing weights costs, and whether it leaves anything behind: `python tools/replacements.py 1000` replaces
those of the embedded model so often, in turn by two sets, while a request runs, and prints processor time, page faults,
tensors and memory. `--dtype float32` gives weights as a trainer has them."""

from __future__ import annotations

import argparse
import gc
import resource
import sys

import torch
from safetensors.torch import load_file

import labkit as lk

PARAMS = lk.SamplingParams(max_tokens=1500, ignore_eos=True, seed=1)
QUESTION = lk.SamplingParams(max_tokens=24, temperature=0)


def used() -> tuple[float, int]:
    """Milliseconds of processor time of this process, and its page faults."""
    said = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (said.ru_utime + said.ru_stime), said.ru_minflt


def held() -> tuple[int, int]:
    """Tensors that Python knows of, and KiB of resident memory."""
    gc.collect()
    tensors = sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return tensors, resident


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantization")
    given = parser.parse_args()
    first = {
        name: tensor.to(getattr(torch, given.dtype))
        for name, tensor in load_file(lk.assets.path("tiny") / "model.safetensors").items()
    }
    other = {name: tensor * 1.05 if "mlp" in name else tensor for name, tensor in first.items()}
    eng = lk.Engine(num_blocks=256, quantization=given.quantization)
    eng.load_weights(first)
    before = eng.generate("def f(x):", QUESTION).output_ids
    running, spent, faults = eng.submit("import os", PARAMS), [], []
    for i in range(given.count):
        if i == min(20, given.count // 2):
            tensors, resident = held()
        if running.ended:
            running = eng.submit("import os", PARAMS)
        eng.step()
        begin = used()
        eng.load_weights(other if i % 2 == 0 else first)
        spent.append(used()[0] - begin[0])
        faults.append(used()[1] - begin[1])
    eng.abort(running)
    after, later = held()
    eng.load_weights(first)
    same = eng.generate("def f(x):", QUESTION).output_ids == before
    eng.check()
    eng.close()
    spent.sort()
    print(
        f"{len(spent)} replacements, ms of processor time: median {spent[len(spent) // 2]:.1f}, p99 "
        f"{spent[len(spent) * 99 // 100]:.1f}, most {spent[-1]:.1f}; {sum(faults) / len(faults):.1f} page faults each\n"
        f"tensors {tensors} -> {after}, resident {resident / 1024:.0f} -> {later / 1024:.0f} MiB, "
        f"the first weights' tokens again: {same}"
    )
    return 0 if same and after <= tensors else 1


if __name__ == "__main__":
    sys.exit(main())
