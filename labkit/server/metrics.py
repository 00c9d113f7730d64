"""GET /metrics: the counts of `counting.py` in Prometheus' text format, under vLLM's names and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from labkit.server.counting import Calls, Counts, Histogram
from labkit.server.errors import REFUSALS
from labkit.server.routes import Route
from labkit.server.service import Service

LABELS = ("model_name", "engine")
KIND = "text/plain; version=0.0.4; charset=utf-8"  # prometheus-client writes OpenMetrics with _ for the : in names


class Gauge(NamedTuple):
    name: str
    help: str
    read: Callable[[Counts], float]


def _usage(counts: Counts) -> float:
    """The share of blocks that requests hold; cached blocks that nobody holds are free to take."""
    blocks = counts.engine.blocks
    return 1.0 - (len(blocks.pool.free) + len(blocks.eviction)) / blocks.num_blocks


GAUGES = (
    Gauge("vllm:num_requests_running", "Requests in the running batch.", lambda c: c.engine.scheduler.num_running),
    Gauge(
        "vllm:num_requests_waiting",
        "Requests that wait to be processed.",
        lambda c: c.engine.scheduler.num_waiting + c.engine.scheduler.num_swapped + len(c.engine.arriving),
    ),
    Gauge("vllm:num_requests_swapped", "Requests whose blocks are in host memory.",
          lambda c: c.engine.scheduler.num_swapped),
    Gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 means all.", _usage),
    Gauge("vllm:gpu_cache_usage_perc", "The older name of vllm:kv_cache_usage_perc.", _usage),
)  # fmt: skip
COUNTERS = {  # name without _total -> (a total of Counts, help)
    "vllm:num_preemptions": ("preemptions", "Preemptions of running requests."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that got their first token."),
    "vllm:prompt_tokens_cached": ("prompt_tokens_cached", "Prompt tokens that came from the prefix cache."),
    "vllm:generation_tokens": ("generation_tokens", "Generated tokens."),
    "vllm:prefix_cache_queries": ("prefix_queries", "Tokens that were looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Tokens that were found in the prefix cache, on the device."),
    "vllm:external_prefix_cache_queries": ("external_queries", "The others, looked up in host memory and on disk."),
    "vllm:external_prefix_cache_hits": ("external_hits", "Tokens that were loaded from host memory or disk."),
    "vllm:gpu_prefix_cache_queries": ("prefix_queries", "The older name of vllm:prefix_cache_queries."),
    "vllm:gpu_prefix_cache_hits": ("prefix_hits", "The older name of vllm:prefix_cache_hits."),
    "vllm:spec_decode_num_drafts": ("drafts", "Drafts of speculative decoding."),
    "vllm:spec_decode_num_draft_tokens": ("draft_tokens", "Tokens of drafts."),
    "vllm:spec_decode_num_accepted_tokens": ("accepted_tokens", "Tokens of drafts that were accepted."),
    "labkit:steps": ("steps", "Steps of the engine."),
    "labkit:failed_steps": ("failed_steps", "Steps that failed and were rolled back."),
    "labkit:requests_rejected": ("rejected", "Requests that the engine rejected."),
    "labkit:kv_blocks_exported": ("exported_blocks", "Blocks that went to other engines."),
    "labkit:kv_bytes_exported": ("exported_bytes", "Their bytes."),
    "labkit:kv_blocks_imported": ("imported_blocks", "Blocks that came from other engines."),
    "labkit:kv_bytes_imported": ("imported_bytes", "Their bytes."),
    "labkit:kv_transfers_failed": ("failed_transfers", "Prompts computed, at least in part, as blocks did not come."),
}
OF_IMAGES: tuple[tuple[str, str, Callable[[Any, Any], float]], ...] = (  # of the processor, and of what the tower made
    ("vllm:mm_cache_queries", "Images that were looked up among processed ones.",
     lambda images, _: images.num_processed + images.num_found),
    ("vllm:mm_cache_hits", "Images that had been processed before.", lambda images, _: images.num_found),
    ("labkit:encoder_cache_queries", "Image features that a step needed and looked up.",
     lambda _, features: features.num_encoded + features.num_hits),
    ("labkit:encoder_cache_hits", "Image features that were there.", lambda _, features: features.num_hits),
    ("labkit:images_encoded", "Images that the vision tower computed.", lambda _, features: features.num_encoded),
    ("labkit:image_feature_bytes", "Bytes of features that it made.", lambda _, features: features.encoded_bytes),
)  # fmt: skip
HISTOGRAMS = {  # name -> (a histogram of Counts, help)
    "vllm:iteration_tokens_total": ("step_tokens", "Tokens computed in a step."),
    "vllm:time_to_first_token_seconds": ("time_to_first_token", "Seconds from arrival to the first token."),
    "vllm:inter_token_latency_seconds": ("inter_token", "Seconds between two tokens of a request."),
    "vllm:time_per_output_token_seconds": ("inter_token", "The older name of vllm:inter_token_latency_seconds."),
    "vllm:request_time_per_output_token_seconds": ("per_output_token", "A request's mean seconds between two tokens."),
    "vllm:e2e_request_latency_seconds": ("e2e", "Seconds from arrival to the last token."),
    "vllm:request_queue_time_seconds": ("queue", "Seconds from arrival to the first step."),
    "vllm:request_inference_time_seconds": ("inference", "Seconds from the first step to the last token."),
    "vllm:request_prefill_time_seconds": ("prefill", "Seconds from the first step to the first token."),
    "vllm:request_decode_time_seconds": ("decode", "Seconds from the first token to the last."),
    "vllm:request_prompt_tokens": ("prompt_tokens", "Tokens of a prompt."),
    "vllm:request_generation_tokens": ("generation_tokens", "Tokens of an answer."),
    "vllm:request_max_num_generation_tokens": ("max_generation_tokens", "Tokens of a request's longest answer."),
    "vllm:request_params_n": ("params_n", "The parameter n."),
    "vllm:request_params_max_tokens": ("params_max_tokens", "The parameter max_tokens."),
}


REPLICA_GAUGES: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("labkit:replica_up", "1 if the replica serves.", lambda one: float(one.state == "ready")),
    ("labkit:replica_requests_running", "Requests in its running batch.", lambda one: _seen(one, "running")),
    ("labkit:replica_requests_waiting", "Requests that wait there.", lambda one: _seen(one, "waiting")),
    ("labkit:replica_kv_cache_usage_perc", "Share of its KV blocks in use; 1 means all.", lambda one: one.seen.usage),
)
REPLICA_COUNTERS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("labkit:replica_requests", "Requests that were sent to it.", lambda one: one.num_requests),
    ("labkit:replica_generation_tokens", "Tokens that it generated.", lambda one: one.num_output),
    ("labkit:replica_prefix_cache_queries", "Prompt tokens that were looked up there.", lambda one: one.num_queried),
    ("labkit:replica_prefix_cache_hits", "Prompt tokens that were found there.", lambda one: one.num_cached),
    ("labkit:replica_starts", "How often it was started.", lambda one: one.num_starts),
)


def _seen(link: Any, name: str) -> float:
    return float(getattr(link.seen, name)) if link.state == "ready" else 0.0


class Served(Collector):
    """All metrics of a service, made when they are asked for."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        found = [
            ((each.name, str(i)), each.counts)
            for service in self.service.services
            for i, each in enumerate(service.counted)
        ]
        if found:
            for gauge in GAUGES:
                family = GaugeMetricFamily(gauge.name, gauge.help, labels=LABELS)
                for labels, counts in found:
                    family.add_metric(labels, gauge.read(counts))
                yield family
            yield from _counters(found)
            yield from _images(found)
            yield from _histograms(found)
            yield from _replicas(found)
            yield _info("vllm:cache_config_info", "The KV cache.", found, _cache_config)
            yield _info("vllm:lora_requests_info", "Adapters of live requests.", found, _adapters)
        yield from _calls(self.service.calls, [each.name for each in self.service.services])


Found = list[tuple[tuple[str, str], Counts]]  # (values of LABELS, counts)


def _counters(found: Found) -> Iterator[CounterMetricFamily]:
    for name, (total, help) in COUNTERS.items():
        family = CounterMetricFamily(name, help, labels=LABELS)
        for labels, counts in found:
            family.add_metric(labels, counts.totals[total])
        yield family
    family = CounterMetricFamily(
        "vllm:request_success", "Requests that have ended.", labels=[*LABELS, "finished_reason"]
    )
    for labels, counts in found:
        for reason, number in list(counts.reasons.items()):
            family.add_metric([*labels, reason], number)
    yield family
    yield _by_position(found)


def _images(found: Found) -> Iterator[CounterMetricFamily]:
    """Of models that see, in one process."""
    for name, help, read in OF_IMAGES:
        family = CounterMetricFamily(name, help, labels=LABELS)
        for labels, counts in found:
            images, features = counts.engine.images, getattr(counts.engine.runner, "features", None)
            if images is not None and features is not None:
                family.add_metric(labels, read(images, features))
        if family.samples:
            yield family


def _replicas(found: Found) -> Iterator[Any]:
    """By replica, where there are several behind a router; the other figures are sums."""
    links = [((*labels, str(one.index)), one) for labels, c in found for one in getattr(c.engine, "replicas", ())]
    for name, help, read in REPLICA_GAUGES if links else ():
        family: Any = GaugeMetricFamily(name, help, labels=[*LABELS, "replica"])
        for labels, link in links:
            family.add_metric(labels, read(link))
        yield family
    for name, help, read in REPLICA_COUNTERS if links else ():
        family = CounterMetricFamily(name, help, labels=[*LABELS, "replica"])
        for labels, link in links:
            family.add_metric(labels, read(link))
        yield family


def _by_position(found: Found) -> CounterMetricFamily:
    """Accepted tokens by their place in a draft; places that no draft has reached are left out."""
    name, help = "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted tokens of drafts, by their place in it."
    family = CounterMetricFamily(name, help, labels=[*LABELS, "position"])
    for labels, counts in found:
        with counts.lock:
            drafts = dict(counts.drafts)
        for place in range(max(drafts, default=0)):
            family.add_metric([*labels, str(place)], sum(n for num, n in drafts.items() if num > place))
    return family


def _histograms(found: Found) -> Iterator[HistogramMetricFamily]:
    copies = []
    for labels, counts in found:
        with counts.lock:  # counts and sum of the same step
            copies.append((labels, {name: each.copy() for name, each in counts.histograms.items()}))
    for name, (source, help) in HISTOGRAMS.items():
        family = HistogramMetricFamily(name, help, labels=LABELS)
        for labels, each in copies:
            family.add_metric(labels, _buckets(each[source]), each[source].sum)
        yield family


def _buckets(found: Histogram) -> list[tuple[str, float]]:
    edges = [str(float(edge)) for edge in found.edges]
    return list(zip([*edges, "+Inf"], found.counts.cumsum().tolist(), strict=True))


def _info(name: str, help: str, found: Found, read: Callable[[Counts], dict[str, str]]) -> GaugeMetricFamily:
    family: GaugeMetricFamily | None = None
    for labels, counts in found:
        more = read(counts)
        if family is None:
            family = GaugeMetricFamily(name, help, labels=[*LABELS, *more])
        family.add_metric([*labels, *more.values()], 1.0)
    assert family is not None
    return family


def _cache_config(counts: Counts) -> dict[str, str]:
    blocks, runner = counts.engine.blocks, counts.engine.runner
    return {
        "block_size": str(blocks.block_size),
        "num_gpu_blocks": str(blocks.num_blocks),
        "num_cpu_blocks": str(blocks.host.num_blocks),
        "enable_prefix_caching": str(blocks.prefix_caching),
        "cache_dtype": str(getattr(runner, "kv_dtype", "auto")).removeprefix("torch."),
    }


def _adapters(counts: Counts) -> dict[str, str]:
    slots = counts.engine.scheduler.slots
    with counts.lock:
        live = [(life.request, life.admitted) for life in counts.lives.values()]
    running = {r.adapter for r, admitted in live if r is not None and r.adapter and admitted is not None}
    waiting = {r.adapter for r, admitted in live if r is not None and r.adapter and admitted is None}
    return {
        "max_lora": str(0 if slots is None else slots.num_slots),
        "running_lora_adapters": ",".join(sorted(running)),
        "waiting_lora_adapters": ",".join(sorted(waiting)),
    }


def _calls(calls: Calls, models: Iterable[str]) -> Iterator[Any]:
    refused = CounterMetricFamily(
        "labkit:requests_refused", "Requests that the server answered 503, as it could take none.",
        labels=["model_name", "reason"],
    )  # fmt: skip
    none = dict.fromkeys(((model, reason) for model in models if model for reason in REFUSALS), 0)  # series begin at 0
    for labels, number in {**none, **calls.refused}.items():
        refused.add_metric(labels, number)
    total = CounterMetricFamily("http_requests", "HTTP requests.", labels=["method", "handler", "status"])
    for (method, route, status), number in list(calls.counts.items()):
        total.add_metric([method, route, status], number)
    seconds = HistogramMetricFamily(
        "http_request_duration_seconds", "Seconds from a request's first byte to its answer's last.",
        labels=["method", "handler"],
    )  # fmt: skip
    for labels, found in list(calls.seconds.items()):
        seconds.add_metric(labels, _buckets(found), found.sum)
    yield from (refused, total, seconds)


def registry_of(service: Service) -> CollectorRegistry:
    """What /metrics shows: the service, and the process as prometheus-client sees it."""
    registry = CollectorRegistry()
    registry.register(Served(service))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


async def metrics(service: Service, request: Request) -> Response:
    if service.registry is None:
        service.registry = registry_of(service)
    return Response(generate_latest(service.registry), headers={"Content-Type": KIND})


ROUTES = [Route("GET", "/metrics", metrics, None, "Metrics in Prometheus' text format, under vLLM's names")]
