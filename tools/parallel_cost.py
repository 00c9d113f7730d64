"""What several processes cost and bring: the executor's overhead, two ranks beside one process, exchanges among ranks.

    python tools/parallel_cost.py overhead    # one rank in a process of its own, against none
    python tools/parallel_cost.py ranks       # two ranks, two stages and one process with two threads, 0.5B shape
    python tools/parallel_cost.py stages      # how even two stages are in time: equal layers beside those dealt
    python tools/parallel_cost.py exchange    # all-reduce through shared memory and Gloo
    python tools/parallel_cost.py study       # steps of ranks beside what the cost model predicts, embedded model
    python tools/parallel_cost.py memory      # a model twice as large as a rank may hold: refused by one, served by two

Turns alternate, and of each the fastest counts. Needs a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import labkit as lk
from labkit.core.events.types import Step

SHAPE = {  # of Qwen2.5-0.5B
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def shape(layers: int = 24) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{**SHAPE, "num_hidden_layers": layers})


def decode(engine: lk.Engine, rows: int, steps: int, prompt: int = 16) -> tuple[float, float]:
    """Seconds of a decode step with so many rows, and of them those outside the runner that computes it: the lower
    quartile, and the median."""
    params = lk.SamplingParams(max_tokens=steps + 4, temperature=0, ignore_eos=True)
    vocab = engine.runner.vocab_size
    handles = [engine.submit([(7 * i + j) % vocab for j in range(prompt)], params) for i in range(rows)]
    while any(not handle.num_output for handle in handles):
        engine.step()
    times, outside = [], []
    while not all(handle.ended for handle in handles):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
        outside.append(times[-1] - engine.log.events(Step)[-1].duration / 1e9)
    times.sort()
    return times[len(times) // 4], median(outside)


def overhead(args: argparse.Namespace) -> None:
    """The embedded model with 64 rows, 200 steps in turn. What a step takes outside its runner's forward does not
    depend on how fast the machine multiplies: scheduling, and with another process plan and result on their way."""
    options = {"num_blocks": 1024, "prefix_caching": False, "num_threads": 1, "dtype": "float32"}
    one = lk.Engine(**options, graphs=False)
    other = lk.Engine(**options, graphs=False, distributed_executor_backend="mp", max_in_flight=0)
    found: dict[str, list[tuple[float, float]]] = {"one": [], "other": []}
    for _ in range(args.rounds):
        found["one"].append(decode(one, 64, 200))
        found["other"].append(decode(other, 64, 200))
    for what, which in (("a step", 0), ("of it outside the forward", 1)):
        one_ms, other_ms = ([1e3 * pair[which] for pair in found[name]] for name in ("one", "other"))
        pairs = [b - a for a, b in zip(one_ms, other_ms, strict=True)]
        print(
            f"64 rows, {what}: in this process {median(one_ms):.3f} ms, in another {median(other_ms):.3f} ms, more by "
            f"{median(pairs):.3f} ms in the median pair of {[round(pair, 3) for pair in sorted(pairs)]}"
        )
    one.close(), other.close()


def ranks(args: argparse.Namespace) -> None:
    """Output tokens a second, and prompts, of the 0.5B shape in bfloat16 with random weights."""
    options = {"load_format": "dummy", "dtype": args.dtype, "num_blocks": 512, "prefix_caching": False}
    cases = {
        "one process, two threads": {"num_threads": 2},
        "two shards": {"tensor_parallel_size": 2, "num_threads": 1},
        "two stages": {"pipeline_parallel_size": 2, "num_threads": 1},
    }
    for rows in args.rows:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, case in cases.items():
                engine = lk.Engine(shape(args.layers), **options, **case)
                found[name].append(throughput(engine, rows))
                if case.get("num_threads") == 1:
                    print(engine.balance())
                engine.close()
        base = [max(each) for each in zip(*found["one process, two threads"], strict=True)]
        for name, each in found.items():
            out, prefill = (max(values) for values in zip(*each, strict=True))
            print(
                f"{rows} rows, {name}: {out:.1f} output tok/s ({out / base[0]:.2f}x), prefill {prefill:.0f} tok/s "
                f"({prefill / base[1]:.2f}x)"
            )


def throughput(engine: lk.Engine, rows: int, prompt: int = 128, tokens: int = 24) -> tuple[float, float]:
    params = lk.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.generate([[1, 2, 3]] * 2, lk.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    handles = [engine.submit([(7 * i + j) % 1000 for j in range(prompt)], params) for i in range(rows)]
    begin = time.perf_counter()
    while any(not handle.num_output for handle in handles):
        engine.step()
    first, given = time.perf_counter(), sum(handle.num_output for handle in handles)
    engine.run()
    end = time.perf_counter()
    return (rows * tokens - given) / (end - first), rows * prompt / (first - begin)


def stages(args: argparse.Namespace) -> None:
    """Busy wall time and processor time of two stages of the 0.5B shape, in turn. Processor time includes a little
    waiting; wall time depends on what else the machine does."""
    options = {
        "load_format": "dummy", "dtype": args.dtype, "num_blocks": 512, "prefix_caching": False, "num_threads": 1,
        "pipeline_parallel_size": 2,
    }  # fmt: skip
    half = f"{args.layers // 2},{args.layers - args.layers // 2}"
    engines = {
        "equal": lk.Engine(shape(args.layers), pp_layer_partition=half, **options),
        "dealt": lk.Engine(shape(args.layers), **options),
    }
    spent: dict[tuple[Any, str], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for case in ((24, 16, 48), (8, 128, 24)):
            for name, engine in engines.items():
                before = _seconds(engine)
                throughput(engine, *case)
                more = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, _seconds(engine), strict=True)]
                known = spent.get((case, name), [(0.0, 0.0)] * 2)
                spent[case, name] = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(known, more, strict=True)]
    for ((rows, prompt, tokens), name), each in spent.items():
        balance = engines[name].balance()
        layers = ",".join(str(rank.layers) for rank in balance.ranks)
        busy, processor = (max(times) / (sum(times) / 2) - 1 for times in zip(*each, strict=True))
        print(
            f"{rows} rows, {prompt} tokens in and {tokens} out, layers {layers} ({name}): busy time within {busy:.1%} "
            f"of the mean, processor time within {processor:.1%}, memory within {balance.memory_spread:.1%}"
        )
    for engine in engines.values():
        engine.close()


def _seconds(engine: lk.Engine) -> list[tuple[float, float]]:
    """Of each rank: busy, and of a processor."""
    found = []
    for rank in engine.balance().ranks:
        fields = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()
        found.append((rank.busy, sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")))
    return found


def exchange(args: argparse.Namespace) -> None:
    """Microseconds of an all-reduce between two ranks, the lower quartile of many."""
    for backend in ("shared", "gloo"):
        with lk.Workers(tensor_parallel_size=2, backend=backend, num_threads=1) as workers:
            for dtype in ("bfloat16", "float32"):
                for tokens in (1, 64, 2048):
                    seconds = max(workers.call("exchange", rows=tokens, width=896, dtype=dtype, repeats=200))
                    print(f"{backend:7} {dtype:9} [{tokens}, 896]: {1e6 * seconds:.0f} us")


def study(args: argparse.Namespace) -> None:
    """One table: one process, two shards and two stages, measured and predicted."""
    options = {"num_blocks": 1024, "num_threads": 1, "dtype": "float32"}
    engines = {
        "one process": lk.Engine(graphs=False, **options),
        "two shards": lk.Engine(tensor_parallel_size=2, **options),
        "two stages": lk.Engine(pipeline_parallel_size=2, **options),
    }
    print(lk.study.ranks(engines, rows=(1, 16, 64), repeats=args.rounds))
    for name, engine in engines.items():
        if name != "one process":
            print(engine.balance())
        engine.close()


def memory(args: argparse.Namespace) -> None:
    """The 0.5B shape with room for a little more than half of its weights in each process."""
    options = {"load_format": "dummy", "dtype": args.dtype, "num_threads": 1, "max_num_seqs": 4, "max_model_len": 256}
    one = lk.Engine(shape(args.layers), num_blocks=8, **options)
    (weights, _), *_ = one.runner.held(16)
    one.close()
    limit = 0.53 * weights / 2**30
    print(f"weights of {weights / 2**20:.0f} MiB, {1024 * limit:.0f} MiB for each process")
    try:
        lk.Engine(shape(args.layers), memory_size=limit, **options)
        raise SystemExit("one process was not refused")
    except ValueError as error:
        print("one process:", error)
    with lk.Engine(shape(args.layers), memory_size=limit, tensor_parallel_size=2, **options) as engine:
        params = lk.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        answers = engine.generate([[1, 2, 3], [4, 5, 6]], params)
        print("two ranks:", [len(answer.output_ids) for answer in answers], "tokens,", engine.blocks)
        print(engine.balance())


DOES = {
    "overhead": overhead, "ranks": ranks, "stages": stages, "exchange": exchange, "study": study, "memory": memory,
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(DOES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 48])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    DOES[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
