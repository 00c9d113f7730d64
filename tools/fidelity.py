"""How well a simulator, calibrated to one workload on the embedded model, predicts others: python tools/fidelity.py

Time is the processor time of this process, so that other work on the machine counts little (--wall: real time, on a
machine that is otherwise idle). Each round makes an engine, calibrates to one workload, then serves the others; the
table has the median error of the rounds, and how far the real figures of the rounds are apart.
"""

import argparse
import statistics

import torch

import labkit as lk
from labkit.clock import ProcessClock
from labkit.engine.build import build
from labkit.study.serving import serve

SETTINGS = {"num_blocks": 800, "max_num_seqs": 32, "max_num_batched_tokens": 512}
NAMES = ("output_tokens_per_s", "ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90", "e2e_p50", "hit_rate", "preemptions")


def fitted(seed: int) -> lk.Workload:
    chats = lk.workloads.chats(24, rate=8, think=0.3, output=(16, 64), seed=seed)
    return lk.workloads.mixed(chats, lk.workloads.poisson(80, rate=15, output=(16, 96), seed=seed))


def held_out() -> dict[str, lk.Workload]:
    chats = lk.workloads.chats(20, rate=8, think=0.3, output=(16, 64))
    return {
        "chats and requests": lk.workloads.mixed(chats, lk.workloads.poisson(40, rate=12, output=(16, 64))),
        "requests, 25 a second": lk.workloads.poisson(150, rate=25, prompt=(16, 200), output=(16, 64), seed=3),
        "shared prefixes": lk.workloads.shared_prefixes(100, prefixes=4, prefix=256, rate=20, seed=2),
    }


def engine(wall: bool) -> lk.Engine:
    parts = build(None, **SETTINGS)
    torch.set_num_threads(1)
    clock = lk.WallClock() if wall else ProcessClock()
    return lk.Engine(scheduler=parts.scheduler, runner=parts.runner, tokenizer=parts.tokenizer, clock=clock)


def one_round(seed: int, wall: bool) -> tuple[object, dict[str, tuple[dict, dict]]]:
    """The calibration, and for each held-out workload its real and its simulated figures."""
    eng = engine(wall)
    eng.generate([[1, 2, 3]] * 4, lk.SamplingParams(max_tokens=8, ignore_eos=True))  # first steps are slow
    serve(fitted(seed), eng)
    found = lk.calibrate(eng.log)
    figures = {}
    for name, workload in held_out().items():
        eng.blocks.reset()
        real = serve(workload, eng).metrics
        figures[name] = real, lk.study.simulate(workload, cost=found.runner.cost, **SETTINGS).metrics
    eng.close()
    return found, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    args = parser.parse_args()
    rounds = [one_round(seed, args.wall) for seed in range(args.rounds)]
    print(rounds[0][0].report())
    print(f"\n{'median error (spread of the real figure)':42}" + "".join(f"{name:>22}" for name in held_out()))
    for metric in NAMES:
        cells = []
        for name in held_out():
            pairs = [figures[name] for _, figures in rounds]
            real = [one[metric] for one, _ in pairs]
            if not any(real):
                cells.append("none" if not any(other[metric] for _, other in pairs) else "0, not simulated so")
                continue
            errors = [other[metric] / one[metric] - 1 for one, other in pairs if one[metric]]
            spread = (max(real) - min(real)) / statistics.median(real)
            cells.append(f"{statistics.median(errors):+.1%} ({spread:.1%})")
        print(f"{metric:42}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
