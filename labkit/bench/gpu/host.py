"""Times the host's work of a step with a stub in place of the device: captured steps are not run.

    python -m labkit.bench.gpu --part host --device cpu

Processor time of the engine's thread, so it can be measured without a GPU, and little depends on what else runs. Calls
of the CUDA driver (a copy, a replay, two events) are missing: about 20 us a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import labkit.runner.graphs as decode_graphs
import labkit.runner.steps as all_steps
from labkit.bench.gpu.where import Where, make_config
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine

ROUNDS = 5


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Within the block a captured step does nothing: every row's token is 0."""

    def captured(*_: Any) -> tuple[Callable[[], None], Any, int]:
        return lambda: None, None, 0

    kept = decode_graphs.capture, all_steps.capture
    decode_graphs.capture = all_steps.capture = captured
    try:
        yield
    finally:
        decode_graphs.capture, all_steps.capture = kept


def host(where: Where) -> dict[str, Any]:
    """Microseconds of processor time a step: 256 rows that decode, and 128 beside two prompts of 512 a step."""
    rows, context, steps = (256, 500, 40) if not where.quick else (6, 20, 4)
    out: dict[str, Any] = {"rows": rows}
    with nothing_runs():
        for name, graphs in (("decode graphs", True), ("all steps", "all")):
            for what, asked in (("greedy", {"temperature": 0.0}), ("at 0.6", {"temperature": 0.6})):
                eng = _filled(rows, context, graphs, (ROUNDS + 2) * steps, **asked)
                out[f"{name}: {what}: us"] = _least(eng, steps)
                launch = _launching(eng, steps)
                out[f"{name}: {what}: launch us"] = launch
                eng.close()
        eng = _filled(rows // 2, context, "all", 9 * steps, spare=rows // 2)
        for i in range(9 * steps):
            eng.submit([3 + i % 90] * (512 if not where.quick else 8), SamplingParams(max_tokens=8, ignore_eos=True))
        out["all steps: mixed: us"] = _least(eng, steps)
        eng.close()
    return out


def _filled(
    rows: int, context: int, graphs: bool | str, steps: int, spare: int = 0, temperature: float = 0.0
) -> Engine:
    block = 32
    width = -(-(context + steps + 64) // block)
    eng = Engine(
        make_config("quick") if context + steps + 64 <= 512 else _longer(), load_format="dummy", device="cpu",
        dtype="float32", max_num_seqs=rows + spare, block_size=block, num_blocks=(rows + 40 * bool(spare)) * width,
        prefix_caching=False, max_num_batched_tokens=rows + 1024, graphs=graphs, max_in_flight=1,
    )  # fmt: skip
    params = SamplingParams(temperature=temperature, max_tokens=steps + 40, ignore_eos=True)
    for i in range(rows):
        eng.submit([10 + (i * 7 + j) % 400 for j in range(context - i % 32)], params)
    while eng.scheduler.num_running < rows or eng.scheduler.prefilling:
        eng.step()
    return eng


def _longer() -> Any:
    config = make_config("quick")
    config.max_position_embeddings = 4096
    return config


def _least(eng: Engine, steps: int) -> float:
    """Processor time of a step in the engine's own thread; the least of several rounds."""

    def timed() -> list[float]:
        found = []
        for _ in range(ROUNDS):
            begin = time.thread_time()
            for _ in range(steps):
                eng._step()
            found.append((time.thread_time() - begin) / steps)
        return found

    each = timed() if eng.worker is None else eng.worker.call(timed)
    return min(each) * 1e6


def _launching(eng: Engine, steps: int) -> float:
    """The runner's part of it."""
    spent, launch = [], eng.runner.launch

    def timed(plan: Any) -> Any:
        begin = time.thread_time()
        pending = launch(plan)
        spent.append(time.thread_time() - begin)
        return pending

    eng.runner.launch = timed  # type: ignore[method-assign]
    try:
        _least(eng, max(1, steps // ROUNDS))
    finally:
        del eng.runner.launch
    return sorted(spent)[len(spent) // 4] * 1e6
