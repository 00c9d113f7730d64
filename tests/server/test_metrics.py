"""/metrics: each name against what a run must give, and a real Prometheus that scrapes a live server."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labkit as lk
from labkit.server.arguments import read
from labkit.server.counting import Counts, Histogram, one_two_five
from labkit.server.metrics import _images
from tests.harness import engine, params, run

NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:iteration_tokens_total",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
    "vllm:gpu_cache_usage_perc",
    "vllm:time_per_output_token_seconds",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
]


def get(url: str, path: str = "/metrics", **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=20) as answer:
        return answer.read().decode()


def post(url: str, path: str, body: dict) -> dict:
    asked = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """name -> values of further labels -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            more = tuple(v for k, v in sorted(labels.items()) if k not in ("model_name", "engine"))
            found.setdefault(name, {})[more] = value
    return found


@pytest.fixture(scope="module")
def server():
    with lk.serve(lk.Engine(num_blocks=256, max_num_seqs=16), served_model_name="tiny") as server:
        yield server
    assert server.engine.close().ok


def test_each_name_holds_what_the_run_gives(server):
    prompt = list(range(10, 60))
    for _ in range(2):
        body = {"prompt": prompt, "max_tokens": 7, "n": 3, "temperature": 1.0, "ignore_eos": True}
        post(server.url, "/v1/completions", body)
    text = get(server.url)
    found = samples(text)
    names = {name.removesuffix("_bucket") for name in found}
    assert set(NAMES) <= names, set(NAMES) - names
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in text
    size = server.engine.blocks.block_size
    one = {name: values[()] for name, values in found.items() if () in values}
    assert one["vllm:prompt_tokens_total"] == 2 * 50
    assert one["vllm:prompt_tokens_cached_total"] == one["vllm:prefix_cache_hits_total"] == 50 // size * size
    assert one["vllm:prefix_cache_queries_total"] == one["vllm:gpu_prefix_cache_queries_total"] == 100
    assert one["vllm:generation_tokens_total"] == 2 * 3 * 7
    assert found["vllm:request_success_total"] == {("length",): 6, ("stop",): 0, ("abort",): 0, ("error",): 0}
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time",
                 "request_inference_time", "request_time_per_output_token", "time_to_first_token"):  # fmt: skip
        assert one[f"vllm:{name}_seconds_count"] == 6, name
    assert one["vllm:inter_token_latency_seconds_count"] == 6 * 6
    for name in ("request_params_n", "request_prompt_tokens", "request_params_max_tokens"):
        assert one[f"vllm:{name}_count"] == 2, name
    assert (one["vllm:request_params_n_sum"], one["vllm:request_params_max_tokens_sum"]) == (6, 14)
    assert found["vllm:request_params_n_bucket"][("2.0",)] == 0 and found["vllm:request_params_n_bucket"][("5.0",)] == 2
    assert (one["vllm:request_prompt_tokens_sum"], one["vllm:request_generation_tokens_sum"]) == (100, 42)
    assert one["vllm:request_max_num_generation_tokens_sum"] == 14
    parts = one["vllm:request_queue_time_seconds_sum"] + one["vllm:request_inference_time_seconds_sum"]
    assert parts == pytest.approx(one["vllm:e2e_request_latency_seconds_sum"])
    assert one["vllm:iteration_tokens_total_sum"] == pytest.approx(100 - 50 // size * size + 6 * 6)
    assert one["vllm:kv_cache_usage_perc"] == one["vllm:gpu_cache_usage_perc"] == 0
    assert f'num_gpu_blocks="{server.engine.blocks.num_blocks}"' in text and f'block_size="{size}"' in text
    assert found["http_requests_total"][("/v1/completions", "POST", "2xx")] == 2
    assert one["process_resident_memory_bytes"] > 2**20


def test_a_server_with_drafts_gives_the_same_text_and_counts_what_was_accepted(server):
    body = {"prompt": "x = 1\n" * 12, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    plain = post(server.url, "/v1/completions", body)
    given = read(["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "adaptive": false}'], {})
    eng = lk.Engine(num_blocks=64, **given.engine)
    with lk.serve(eng) as drafting:
        answer = post(drafting.url, "/v1/completions", body)
        found = samples(get(drafting.url))
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 40
    drafts, drafted, accepted = (
        found[f"vllm:spec_decode_num_{name}_total"][()] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    events = eng.log.events("Drafted")
    assert (drafts, drafted) == (len(events), sum(event.num_drafts for event in events))
    assert 0 < accepted <= drafted <= 3 * drafts
    places = found["vllm:spec_decode_num_accepted_tokens_per_pos_total"]
    assert sum(places.values()) == accepted
    assert places[("0",)] == sum(event.num_accepted > 0 for event in events) >= places[("2",)] > 0
    assert eng.close().ok


def test_unknown_paths_do_not_make_series_and_names_keep_their_colon(server):
    for path in ("/secret-1", "/secret-2"):
        with pytest.raises(urllib.error.HTTPError):
            get(server.url, path)
    text = get(server.url)
    assert "secret" not in text and samples(text)["http_requests_total"][("none", "GET", "4xx")] == 2
    asked = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"  # as Prometheus asks
    assert "\nvllm:num_requests_running{" in get(server.url, Accept=asked)


def test_preemption_aborts_and_rewinding_count_once():
    eng = engine(blocks=8, max_num_seqs=4, preemption="recompute", max_waiting=8)
    counts = Counts(eng)
    handles = [eng.submit(list(range(i, i + 8)), params(12)) for i in range(3)]
    for _ in range(4):
        eng.step()
    eng.abort(handles[2])
    run(eng)
    preempted = sum(handle.num_preemptions for handle in handles)
    assert preempted and counts.totals["preemptions"] == preempted
    assert counts.totals["prompt_tokens"] == 24  # not again after a preemption
    assert counts.totals["generation_tokens"] == sum(handle.num_output for handle in handles)
    assert counts.reasons == {"length": 2, "abort": 1, "stop": 0, "error": 0}
    done = [handle for handle in handles if handle.finish_reason == "length"]
    assert len(counts.histograms["e2e"]) == len(done) == 2
    gaps = sum(handle.num_output - 1 for handle in handles)
    assert len(counts.histograms["inter_token"]) == gaps
    whole = sum((handle.finished_at - handle.first_token_at) / 1e9 for handle in done)
    assert counts.histograms["inter_token"].sum >= whole  # the time without a row counts too
    assert counts.histograms["decode"].sum == pytest.approx(whole)
    assert not counts.lives and not counts._families and not counts._owner
    with pytest.raises(lk.RejectedError):
        eng.submit([1] * 200, params(8))
    assert counts.totals["rejected"] == 1 and not counts.lives
    before = eng.snapshot()
    eng.submit([1, 2, 3], params(4))
    run(eng)
    eng.restore(before)
    eng.submit([1, 2, 3], params(4))
    run(eng)
    assert counts.reasons["length"] == 4 and not counts.lives
    counts.stop()
    eng.submit([1, 2, 3], params(4))
    run(eng)
    assert counts.reasons["length"] == 4


def test_the_gap_of_a_preemption_is_one_gap_between_tokens():
    eng = engine(blocks=7, max_num_seqs=4, preemption="recompute", prefix_caching=False)
    counts = Counts(eng)
    handles = [eng.submit(list(range(8)), params(12)), eng.submit(list(range(9, 17)), params(12))]
    run(eng)
    assert sum(handle.num_preemptions for handle in handles)
    whole = sum(handle.finished_at - handle.first_token_at for handle in handles) / 1e9
    assert counts.histograms["inter_token"].sum == pytest.approx(whole)
    assert counts.totals["prefix_queries"] == 0  # there is no cache to ask


def test_loaded_tokens_are_hits_of_the_external_cache_and_not_of_the_prefix_cache():
    bm = lk.BlockManager(8, 4, num_host_blocks=16, kv_offloading=True)
    sched = lk.Scheduler(bm, kv_loading="load", watermark=0.0)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=1, vocab_size=50), clock=lk.VirtualClock())
    counts = Counts(eng)
    prompts = [list(range(i, i + 21)) for i in (1, 20, 3)]  # five full blocks each, of a pool of eight
    cached = [eng.generate(prompt, params(2)).num_cached for prompt in [*prompts, *prompts, prompts[-1]]]
    stats, totals = bm.stats(), counts.totals
    assert cached[3:] == [20] * 4 and stats.num_host_hit_tokens and stats.num_hit_tokens
    assert totals["prefix_queries"] == 7 * 21 and totals["prefix_hits"] == stats.num_hit_tokens
    assert totals["external_hits"] == stats.num_host_hit_tokens == sum(cached) - stats.num_hit_tokens
    assert totals["external_queries"] == 7 * 21 - stats.num_hit_tokens
    assert totals["prompt_tokens_cached"] == sum(cached)
    without = Counts(engine())
    assert without.totals["external_queries"] == without.totals["external_hits"] == 0


def test_a_log_that_keeps_little_and_drafts_are_counted_whole():
    log = lk.EventLog(keep=10)
    eng = engine(draft=lambda ids: [1, 2], log=log, max_num_seqs=2)
    counts = Counts(eng)
    for i in range(6):
        eng.submit([i, i + 1, i + 2], params(9))
    run(eng)
    assert log.num_trimmed and counts.reasons["length"] == 6
    assert 0 < counts.totals["drafts"] <= counts.totals["draft_tokens"] <= 2 * counts.totals["drafts"]
    assert counts.totals["generation_tokens"] == 54
    assert len(counts.histograms["inter_token"]) == 48 - counts.totals["accepted_tokens"]


def test_histograms_count_as_prometheus_does():
    found, rng = Histogram((1, 2, 5)), np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0, 8, 100), [1, 2, 5]])
    found.add_all(values[:50])
    for value in values[50:].tolist():
        found.add(value)
    assert found.counts.cumsum().tolist() == [int((values <= edge).sum()) for edge in (1, 2, 5, np.inf)]
    assert found.sum == pytest.approx(values.sum())
    assert one_two_five(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert one_two_five(30) == (1, 2, 5, 10, 20)


@pytest.mark.alone
def test_counting_costs_little_a_step():
    """256 rows decode on a fake model: the counts' own share of a step, measured around them."""
    eng = engine(blocks=4096, size=16, max_num_seqs=256, max_num_batched_tokens=4096)
    counts = Counts(eng)
    spent = [0.0]

    def timed(function):
        def call(given):
            begin = time.perf_counter()
            function(given)
            spent[0] += time.perf_counter() - begin

        return call

    counts.stop()
    eng.log.subscribe(timed(counts._on_batches))
    eng.listen(timed(counts._on_outputs))
    for i in range(256):
        eng.submit([i % 50] * 8, params(220))
    for _ in range(10):
        eng.step()
    best = float("inf")
    for _ in range(10):
        spent[0] = 0.0
        for _ in range(20):
            eng.step()
        best = min(best, spent[0] / 20)
    print(f"counting 256 rows: {best * 1e6:.0f} us a step")
    assert best < 200e-6


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus: apt-get install prometheus")
def test_a_real_prometheus_reads_the_series_of_a_live_server(server, tmp_path):
    port, target = free_port(), server.url.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n  - job_name: labkit\n    scrape_interval: 200ms\n"
        f"    scrape_timeout: 200ms\n    static_configs: [{{targets: ['{target}']}}]\n"
    )
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}/api/v1/query?"

    def query(text: str) -> float | None:
        try:
            answer = json.loads(get(url + urllib.parse.urlencode({"query": text}), ""))
        except OSError:
            return None
        result = answer["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def until(text: str, wanted) -> None:
        end = time.perf_counter() + 15
        while (value := query(text)) is None or not wanted(value):
            assert time.perf_counter() < end, (text, value, get(url.replace("query?", "targets"), "")[:1500])
            time.sleep(0.1)

    try:
        until("vllm:generation_tokens_total", lambda value: value >= 0)
        before = query("vllm:generation_tokens_total")
        post(server.url, "/v1/completions", {"prompt": "def f(", "max_tokens": 11, "ignore_eos": True})
        until("vllm:generation_tokens_total", lambda value: value == before + 11)
        until('vllm:request_success_total{finished_reason="length",model_name="tiny"}', lambda value: value >= 1)
        until("histogram_quantile(0.5, vllm:time_to_first_token_seconds_bucket)", lambda value: 0 < value < 60)
        until("vllm:cache_config_info", lambda value: value == 1)
        until("scrape_samples_scraped", lambda value: value > 100)
    finally:
        process.terminate()
        assert process.wait(20) is not None


def test_images_and_their_features_are_counted_where_a_model_sees():
    images = SimpleNamespace(num_processed=2, num_found=3)
    features = SimpleNamespace(num_encoded=2, num_hits=1, encoded_bytes=512)
    sees = SimpleNamespace(engine=SimpleNamespace(images=images, runner=SimpleNamespace(features=features)))
    reads = SimpleNamespace(engine=SimpleNamespace(images=None, runner=SimpleNamespace()))
    found = [sample for family in _images([(("a", "0"), sees), (("b", "0"), reads)]) for sample in family.samples]
    assert {one.labels["model_name"] for one in found} == {"a"}
    assert {one.name: one.value for one in found if one.name.endswith("_total")} == {
        "vllm:mm_cache_queries_total": 5, "vllm:mm_cache_hits_total": 3, "labkit:encoder_cache_queries_total": 3,
        "labkit:encoder_cache_hits_total": 1, "labkit:images_encoded_total": 2,
        "labkit:image_feature_bytes_total": 512,
    }  # fmt: skip
    assert not list(_images([(("b", "0"), reads)]))
