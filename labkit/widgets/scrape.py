"""Reads Prometheus' text format, as vLLM and labkit write it at /metrics, into the figures that a dashboard shows.

Knows names and histograms; knows nothing of HTTP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$")
_LABEL = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_ESCAPED = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
MOST_BYTES = 16 * 2**20

Labels = dict[str, str]
Buckets = tuple[tuple[float, float], ...]  # (at most, how many), in order

GAUGES = {
    "usage": ("vllm_kv_cache_usage_perc", "vllm_gpu_cache_usage_perc"),
    "running": ("vllm_num_requests_running",),
    "waiting": ("vllm_num_requests_waiting",),
    "swapped": ("vllm_num_requests_swapped",),
}
COUNTERS = {
    "prompt": ("vllm_prompt_tokens_total",),
    "generation": ("vllm_generation_tokens_total",),
    "cached": ("vllm_prompt_tokens_cached_total", "vllm_prefix_cache_hits_total", "vllm_gpu_prefix_cache_hits_total"),
    "preempted": ("vllm_num_preemptions_total",),
    "finished": ("vllm_request_success_total",),
    "steps": ("vllm_iteration_tokens_total_count",),
    "drafted": ("vllm_spec_decode_num_draft_tokens_total",),
    "accepted": ("vllm_spec_decode_num_accepted_tokens_total",),
}
HISTOGRAMS = {
    "ttft": ("vllm_time_to_first_token_seconds",),
    "itl": ("vllm_inter_token_latency_seconds", "vllm_time_per_output_token_seconds"),
}


def samples(text: str) -> dict[str, list[tuple[Labels, float]]]:
    """name -> (labels, value). A name's `:` is written `_`, as some exporters do. Lines that are no samples are an
    error."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for line in text.split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            raise ValueError(f"this is not Prometheus' text format: {line[:80]!r}")
        name, labels, value = match.groups()
        parsed = {key: _plain(text) for key, text in _LABEL.findall(labels)} if labels else {}
        found.setdefault(name.replace(":", "_"), []).append((parsed, float(value)))
    return found


def _plain(text: str) -> str:
    return re.sub(r'\\[\\"n]', lambda match: _ESCAPED[match[0]], text) if "\\" in text else text


@dataclass(frozen=True)
class Poll:
    """What one answer said. A figure that the server does not give is missing."""

    now: int  # ns
    gauges: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Buckets] = field(default_factory=dict)
    num_blocks: int | None = None
    block_size: int | None = None
    models: tuple[str, ...] = ()


def poll_of(text: str, now: int, model: str | None = None) -> Poll:
    """The figures of all engines together, or of one model's."""
    found = samples(text)
    if model is not None:
        found = {
            name: [(labels, value) for labels, value in each if labels.get("model_name", model) == model]
            for name, each in found.items()
        }
    config = [labels for labels, _ in found.get("vllm_cache_config_info", ())]
    blocks = [int(labels["num_gpu_blocks"]) for labels in config if labels.get("num_gpu_blocks", "").isdigit()]
    sizes = [int(labels["block_size"]) for labels in config if labels.get("block_size", "").isdigit()]
    gauges = _sums(found, GAUGES)
    if "usage" in gauges:  # of several engines, the mean
        gauges["usage"] /= max(1, len(_first(found, GAUGES["usage"])))
    histograms = {name: _buckets(found, names) for name, names in HISTOGRAMS.items()}
    names = {labels["model_name"] for each in found.values() for labels, _ in each if "model_name" in labels}
    return Poll(
        now, gauges, _sums(found, COUNTERS), {name: each for name, each in histograms.items() if each},
        sum(blocks) or None, sizes[0] if sizes else None, tuple(sorted(names)),
    )  # fmt: skip


Samples = Mapping[str, Sequence[tuple[Labels, float]]]


def _first(found: Samples, names: Sequence[str]) -> Sequence[tuple[Labels, float]]:
    """The samples under the first of these names that the server uses."""
    return next((found[name] for name in names if found.get(name)), ())


def _sums(found: Samples, wanted: Mapping[str, Sequence[str]]) -> dict[str, float]:
    sums = {}
    for figure, names in wanted.items():
        if values := [value for _, value in _first(found, names) if math.isfinite(value)]:
            sums[figure] = sum(values)
    return sums


def _buckets(found: Samples, names: Sequence[str]) -> Buckets:
    sums: dict[float, float] = {}
    for labels, value in _first(found, [f"{name}_bucket" for name in names]):
        edge = float(labels.get("le", "nan"))
        if not math.isnan(edge):
            sums[edge] = sums.get(edge, 0.0) + value
    return tuple(sorted(sums.items()))


def since(now: Buckets, before: Buckets) -> Buckets:
    """What came between two polls. A server that was started again counts from zero."""
    old = dict(before)
    fresh = tuple((edge, value - old.get(edge, 0.0)) for edge, value in now)
    return fresh if all(value >= 0 for _, value in fresh) else now


def quantile(buckets: Buckets, q: float) -> float:
    """As Prometheus' histogram_quantile: linear inside a bucket; nan without values."""
    if not buckets or buckets[-1][1] <= 0:
        return math.nan
    rank, low, below = q * buckets[-1][1], 0.0, 0.0
    for edge, count in buckets:
        if count >= rank and count > below:
            return low if math.isinf(edge) else low + (edge - low) * (rank - below) / (count - below)
        low, below = (low if math.isinf(edge) else edge), count
    return low
