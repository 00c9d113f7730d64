"""A program for test_interpreted.py: engines with Triton variants for every op, in Triton's interpreter. Prints the
tokens of each as JSON."""

import json
import random
import sys
from contextlib import ExitStack

import torch
from labkit_kernels import OPS
from labkit_kernels.launches import mend_interpreter

import labkit as lk
from labkit.models import load_model
from labkit.runner import steps
from tests.models.configs import VOCAB, config

OTHER = "triton, interpreted"


def serve(model, graphs: bool | str, seed: int, lag: int, kept: str = "auto") -> list[list[int]]:
    rng = random.Random(seed)
    blocks = lk.BlockManager(24, 16, num_host_blocks=8)
    options = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "max_in_flight": lag, "watermark": 0.0}
    eng = lk.Engine(
        scheduler=lk.Scheduler(blocks, **options), runner=lk.TorchRunner(model, graphs=graphs, kv_cache_dtype=kept)
    )
    handles = []
    for i in range(3):
        params = lk.SamplingParams(max_tokens=3 + i, seed=i, temperature=0.8 * (i % 2), ignore_eos=True, n=1 + (i == 2))
        handles.append(eng.submit([rng.randrange(VOCAB) for _ in range(rng.choice([3, 17, 20]))], params))
        eng.step()
    eng.run()
    eng.check()
    assert not graphs or eng.runner.graphs._made
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)]


def main(kind: str, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(config(kind), load_format="dummy", seed=1, dtype="float32")
    steps.LEAST_TOKENS = 16  # padding takes the interpreter's time
    invariant = load_model(config(kind), load_format="dummy", seed=1, dtype="float32", deterministic=True)
    found = {"reference": serve(model, False, seed, 0)}
    expected = serve(model, False, seed, 0, "int8")
    mend_interpreter()
    with ExitStack() as stack:
        for op in list(OPS.values()):
            if op.has("triton"):
                op.variant(OTHER)(op.variants["triton"].function)
                stack.enter_context(op.use(OTHER))
        found["eager"] = serve(model, False, seed, 0)
        found["graphs"] = serve(model, True, seed, 1)
        found["deterministic"] = serve(invariant, True, seed, 1)
        assert serve(model, "all", seed, 1, "int8") == expected, "all steps captured, keys and values in int8"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
