"""The figures of a run beside those that are aimed at. Knows where parts put their figures, and measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Parts = dict[str, dict[str, Any]]


class Line(NamedTuple):
    what: str
    unit: str
    aim: float
    at_least: bool  # the aim is a lower bound
    figure: Callable[[Parts], float]


def _of(part: str, name: str, scale: float = 1.0) -> Callable[[Parts], float]:
    return lambda parts: scale * parts[part][name]


def _best(part: str, *starts: str) -> Callable[[Parts], float]:
    """The largest figure of those that begin with the first and end with the last word."""
    first, last = starts[0], starts[-1]

    def largest(parts: Parts) -> float:
        found = [v for k, v in parts[part].items() if k.startswith(first) and k.endswith(last) and type(v) is float]
        return max(value for value in found if value)

    return largest


def _kernels(*names: str) -> Callable[[Parts], float]:
    """Microseconds a step of the kernels whose names begin so."""

    def spent(parts: Parts) -> float:
        found = [one["ms"] for one in parts["decode step"]["kernels"] if one["kernel"].startswith(names)]
        return 1e3 * sum(found) if found else float("nan")

    return spent


def _ratio(part: str, of: str, name: str) -> Callable[[Parts], float]:
    return lambda parts: parts[part][name] / parts[of][name]


def _own(heads: str) -> Callable[[Parts], float]:
    return _best("prefill attention", f"{heads} blocks of", "TFLOP/s")


RATE = "output_tokens_per_second"
LINES = (
    Line("Qwen3-0.6B, workload N", "tok/s", 22_000, True, _of("qwen3-0.6b", RATE)),
    Line("Llama-3.1-8B, 256 x 1024/1024", "of the limit", 0.82, True, _of("llama-3.1-8b", "of_limit_ideal")),
    Line("Qwen2.5-0.5B, workload N", "tok/s", 78_000, True, _of("qwen2.5-0.5b", RATE)),
    Line("the same, every step captured", "tok/s", 78_000, True, _of("qwen2.5-0.5b all steps", RATE)),
    Line(
        "at temperature 0.6, of greedy", "", 0.97, True,
        lambda parts: parts["qwen2.5-0.5b"][f"temperature 0.6: {RATE}"] / parts["qwen2.5-0.5b"][RATE],
    ),
    Line("Qwen3-0.6B, 500 x 512/128 at once", "requests/s", 120, True, _of("all at once", "requests_per_second")),
    Line("the same, a token", "ms", 5.45, False, _of("all at once", "tpot_ms_p50")),
    Line("decode step, 256 rows: wall", "ms", 1.5, False, _of("decode step", "wall_ms")),
    Line("decode step, 256 rows: gap", "ms", 0.1, False, _of("decode step", "idle_ms")),
    Line("decode step, 256 rows: host", "ms", 0.3, False, _of("decode step", "host_cpu_ms")),
    Line("a step that is not captured, of one that is", "", 1.3, False, _of("eager step", "ratio")),
    Line("a step with prefills, of one that is captured", "", 1.3, False, _of("mixed step", "ratio")),
    Line("eager launch of rms_norm", "us", 12, False, _of("launches", "rms_norm_us")),
    Line("eager launch of attention", "us", 12, False, _of("launches", "paged_attention_us")),
    Line("prefill attention 8k, heads 16/8", "TFLOP/s", 430, True, _own("qwen3")),
    Line("prefill attention 8k, heads 32/8", "TFLOP/s", 450, True, _own("llama-8b")),
    Line("prefill attention 8k, heads 14/2", "TFLOP/s", 300, True, _own("qwen2.5")),
    Line(
        "decode attention, Llama, 256x1024", "of bandwidth", 0.95, True,
        _best("decode attention", "llama-8b 256x1024", "of bandwidth"),
    ),
    Line(
        "decode attention, 14/2 heads of 64, 256x1024", "of bandwidth", 0.8, True,
        _best("decode attention", "qwen2.5 256x1024", "of bandwidth"),
    ),
    Line(
        "decode attention, 14/2 heads of 64, 16x8192", "of bandwidth", 0.75, True,
        _best("decode attention", "qwen2.5 16x8192", "of bandwidth"),
    ),
    Line("head of a greedy step", "us", 160, False, _of("head", "greedy_us")),
    Line("norms, rope and gate of a step", "us", 110, False, _kernels("_rms_norm", "_rope_kv", "_gated")),
    Line("deterministic mode, of the fast one", "", 0.8, True, _ratio("deterministic", "fast", RATE)),
)  # fmt: skip


def rows(parts: Parts) -> list[dict[str, Any]]:
    """One row a line: the figure, or why there is none."""
    found = []
    for line in LINES:
        row: dict[str, Any] = {"what": line.what, "unit": line.unit, "aim": line.aim, "at_least": line.at_least}
        try:
            figure = line.figure(parts)
        except (KeyError, ValueError, ZeroDivisionError):  # the part did not run, or failed
            figure = float("nan")
        found.append(row | {"figure": None if figure != figure else figure})
    return found


def text(table: list[dict[str, Any]]) -> str:
    out = [f"{'':52} {'measured':>12} {'aim':>12}"]
    for row in table:
        figure = "unmeasured" if row["figure"] is None else _number(row["figure"])
        sign = ">=" if row["at_least"] else "<="
        met = row["figure"] is not None and (row["figure"] >= row["aim"]) == row["at_least"]
        said = f"{sign} {_number(row['aim'])}"
        out.append(f"{row['what']:52} {figure:>12} {said:>12} {row['unit']:12} {'met' if met else ''}".rstrip())
    return "\n".join(out)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
