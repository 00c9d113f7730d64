"""A dashboard over a server: vLLM's recorded metrics, a live labkit by metrics and by events, servers that go away."""

import http.server
import json
import math
import threading
import time
import urllib.request

import numpy as np
import pytest

import labkit as lk
from labkit.widgets import panels
from labkit.widgets.polled import PolledFeed
from labkit.widgets.scrape import poll_of, quantile, samples, since
from tests.server.talk import until
from tests.widgets.vllm_metrics import FIRST, SECOND, answer

SECOND_NS = 1_000_000_000


def feed_of(*texts: str, seconds: float = 2.0) -> PolledFeed:
    feed = PolledFeed()
    for i, text in enumerate(texts):
        feed.inbox.append(poll_of(text, round(i * seconds * SECOND_NS)))
    feed.catch_up()
    return feed


def test_vllms_metrics_become_the_figures_of_a_dashboard():
    feed = feed_of(FIRST, SECOND)
    shown = panels.figures(feed)
    assert shown["tokens/s"] == "200" and shown["KV in use"] == "50%" and shown["cache hits"] == "80%"
    assert (shown["running"], shown["waiting"], shown["preempted"], shown["finished"]) == ("5", "0", "1", "5")
    last = feed.latest()
    assert (last["used_blocks"], last["free_blocks"]) == (1000, 1000)
    assert (last["decode_tokens"], last["prefill_tokens"]) == (4, 1) and feed.block_size == 16
    pace = feed.window().pace
    assert pace.ttft[-1].tolist() == pytest.approx([0.1 + 0.15 * 5 / 10, 0.1 + 0.15 * 9 / 10])
    assert pace.itl[-1].tolist() == pytest.approx([0.02 + 0.02 * 0.5, 0.02 + 0.02 * 0.9])
    assert np.isnan(pace.ttft[0]).all()  # one poll says nothing of a time between
    assert feed.latest(1)["running"] == 3 and feed.first == 1


def test_a_server_that_drafts_shows_how_many_tokens_are_drafted_and_accepted():
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")

    def drafts(text, *values):
        return text + "".join(f"{name} {value}\n" for name, value in zip(names, values, strict=True))

    shown = panels.figures(feed_of(drafts(FIRST, 100, 60), drafts(SECOND, 500, 360)))
    assert (shown["drafted/s"], shown["accepted/s"], shown["accepted"]) == ("200", "150", "75%")
    assert "accepted" not in panels.figures(feed_of(FIRST, SECOND))


def test_a_server_that_was_started_again_counts_from_zero():
    fresh = answer(generated=60, prompt=100, hits=0, steps=30, ttft={0.02: 2}, itl={0.01: 20})
    feed = feed_of(SECOND, fresh)
    assert panels.figures(feed)["tokens/s"] == "30"
    assert feed.window().pace.ttft[-1, 0] == pytest.approx(0.015)


def test_older_names_other_separators_and_one_of_two_models():
    old = FIRST.replace("kv_cache_usage", "gpu_cache_usage").replace("inter_token_latency", "time_per_output_token")
    assert poll_of(old.replace("vllm:", "vllm_"), 0) == poll_of(FIRST, 0)
    both = FIRST + SECOND.replace("meta-llama/Llama-3.1-8B-Instruct", "other").replace('engine="0"', 'engine="1"')
    assert poll_of(both, 0).counters["generation"] == 2400 and poll_of(both, 0).gauges["usage"] == 0.375
    assert poll_of(both, 0, "other").counters["generation"] == 1400
    assert poll_of(both, 0).models == ("meta-llama/Llama-3.1-8B-Instruct", "other")


def test_text_that_is_no_metrics_is_refused_and_labels_are_unescaped():
    with pytest.raises(ValueError, match="not Prometheus"):
        samples("<html>hello</html>")
    assert samples('a{x="q\\"u\\\\o\\nte",y="2"} 3\nb 1e3 1700000000\n') == {
        "a": [({"x": 'q"u\\o\nte', "y": "2"}, 3.0)],
        "b": [({}, 1000.0)],
    }


def test_quantiles_are_those_of_prometheus():
    buckets = ((1.0, 2.0), (2.0, 6.0), (math.inf, 8.0))
    assert quantile(buckets, 0.25) == 1.0 and quantile(buckets, 0.5) == 1.5
    assert quantile(buckets, 0.99) == 2.0  # above the last edge nobody knows
    assert math.isnan(quantile((), 0.5)) and math.isnan(quantile(((1.0, 0.0),), 0.5))
    assert since(buckets, ((1.0, 1.0), (2.0, 1.0), (math.inf, 1.0))) == ((1.0, 1.0), (2.0, 5.0), (math.inf, 7.0))


def test_many_polls_are_drawn_as_few_points_whose_tokens_are_all_there():
    feed = PolledFeed(keep=500)
    for i in range(800):
        text = answer(generated=10 * i, prompt=0, hits=0, steps=i, ttft={}, itl={})
        feed.inbox.append(poll_of(text, i * SECOND_NS))
    feed.catch_up()
    window = feed.window(points=50, steps=400)
    assert len(window) == 50 and window.pace.tokens.sum() == 4000 and window.pace.seconds.sum() == 400
    assert feed.first == 301 and feed.window(310).time[-1] == 309


class Answers(http.server.BaseHTTPRequestHandler):
    texts = (FIRST, SECOND)
    num = 0

    def do_GET(self):
        found = self.path == "/metrics"
        text = self.texts[min(type(self).num, 1)].encode() if found else b"{}"
        type(self).num += found
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *given):
        pass


def test_watching_a_server_that_speaks_vllms_metrics_and_then_goes_away():
    pytest.importorskip("anywidget", reason="the dashboard needs labkit[lab]")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Recorded", (Answers,), {}))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        live = lk.watch(f"http://127.0.0.1:{served.server_port}/v1", every=0.05)
        assert not live.has_events
        until(lambda: live.draw() and live.feed.num_steps >= 3)
        traces = {trace.meta: trace for trace in live._figure.data}
        assert traces["used"].y[-1] == 1000 and traces["running"].y[-1] == 5
        assert "50%" in live._widgets["strip"].value and "Llama-3.1-8B" in live._widgets["machine"].value
        with pytest.raises(RuntimeError, match="--enable-admin"):
            live.why("r1")
        assert live.frame()["running"].iloc[-1] == 5 and "KV blocks" in live.snapshot()
    finally:
        served.shutdown()
        served.server_close()
        thread.join()
    until(lambda: "no answer" in live.source.html())
    live.close()
    assert "closed" in repr(live) and not live.source.thread.is_alive()


def test_what_cannot_be_watched_says_so():
    with pytest.raises(ValueError, match="a server's address"):
        lk.watch("127.0.0.1:8000")
    with pytest.raises(OSError):
        lk.watch("http://127.0.0.1:9")


def post(url: str, body: dict) -> dict:
    asked = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as found:
        return json.load(found)


def test_watching_a_live_labkit_by_metrics_and_by_events():
    pytest.importorskip("anywidget", reason="the dashboard needs labkit[lab]")
    engine = lk.Engine(num_blocks=128, max_num_seqs=8)
    with lk.serve(engine, admin_key="root") as server:
        body = {"prompt": "def add(first, second):\n" * 8, "max_tokens": 24, "ignore_eos": True}
        with lk.watch(server.url, every=0.05) as polled, lk.watch(server.url, admin_key="root") as followed:
            assert followed.has_events and not polled.has_events
            with pytest.raises(RuntimeError, match="no events"):
                lk.watch(server.url, events=True)
            id = post(server.url, body)["id"]
            until(lambda: followed.feed.catch_up() + 1 and followed.feed.counts["Finished"] == 1)
            assert followed.why(id).status == "finished" and followed.feed.block_size == engine.blocks.block_size
            assert any(segment.request == id for segment in followed.feed.segments())
            busy = engine.submit("def f(", lk.SamplingParams(max_tokens=1500, ignore_eos=True))
            until(lambda: followed.feed.catch_up() + 1 and followed.feed.table()[0].any())
            followed.draw()
            assert {trace.meta: trace for trace in followed._figure.data}["tables"].z.any()
            until(lambda: polled.draw() and polled.feed.latest()["running"] == 1)
            engine.abort(busy)
            until(lambda: polled.draw() and polled.feed.latest()["Finished"] == 2)  # one of them aborted
            before = engine.snapshot()
            post(server.url, body)
            engine.restore(before)
            again = post(server.url, body)["id"]
            until(lambda: followed.feed.catch_up() + 1 and any(again == s.request for s in followed.feed.segments()))
        begin = time.perf_counter()
    assert time.perf_counter() - begin < 5  # the stream of events does not hold up the end
    assert engine.close().ok
