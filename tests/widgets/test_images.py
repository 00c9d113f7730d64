"""Spans of a prompt, such as images, in the log and in the views that are made of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labkit as lk
from labkit.core.events.log import EventLog
from labkit.core.events.types import Cleared
from labkit.widgets.timeline import segments

IMAGE = lk.Span(5, 8, bytes.fromhex("ab12cd34ef56") + b"rest", pixels={"x": np.zeros(250, np.float32)}, atomic=False)


def small(**options: Any) -> lk.Engine:
    sched = lk.Scheduler(lk.BlockManager(64, 4), max_num_seqs=4, **{"max_num_batched_tokens": 64} | options)
    return lk.Engine(scheduler=sched, runner=lk.FakeRunner(), clock=lk.VirtualClock())


def ask(eng: lk.Engine, span: lk.Span = IMAGE, num: int = 4, **more: Any) -> Any:
    return eng.submit([7] * 20, lk.SamplingParams(max_tokens=num), spans=[span], **more)


def test_the_log_says_where_an_image_lies_and_holds_no_pixels(tmp_path: Path) -> None:
    eng = small()
    handle = eng.submit([7] * 20, lk.SamplingParams(max_tokens=2, n=2), spans=[IMAGE, lk.Span(14, 2, b"z")])
    eng.run()
    kinds = [type(event).__name__ for event in eng.log if not isinstance(event, Cleared)]
    assert kinds[:4] == ["Submitted", "Spanned", "Spanned", "Submitted"], "once for all samples"
    frame = eng.log.frame("Spanned")
    assert frame[["request", "kind", "start", "length", "digest"]].to_numpy().tolist() == [
        ["r1", "image", 5, 8, "ab12cd34ef56"],
        ["r1", "span", 14, 2, "7a"],
    ]
    eng.log.save(tmp_path / "log.jsonl")
    assert list(EventLog.load(tmp_path / "log.jsonl")) == list(eng.log)
    file = io.StringIO()
    eng.log.perfetto(file)
    note = next(one for one in json.loads(file.getvalue())["traceEvents"] if one["ph"] == "n")
    assert (note["name"], note["args"]) == ("image ab12cd34ef56", {"start": 5, "length": 8})
    assert [span.kind for span in handle.spans] == ["image", "span"]


def test_the_timeline_names_images_where_a_request_waits_and_computes_its_prompt() -> None:
    eng = small(max_num_batched_tokens=8)
    ask(eng, id="first")
    ask(eng, id="later", arrival=0.0)
    eng.run()
    said = {(s.request, s.kind): s.why for s in segments(eng.log)}
    assert said["first", "prefill"] == "20 prompt tokens, 0 from the cache, image ab12cd34ef56 at 5-12"
    assert said["later", "queued"].startswith("image ab12cd34ef56 at 5-12; held by")


def test_the_block_view_marks_blocks_of_images_while_they_are_used_and_while_they_are_cached() -> None:
    eng = small()
    handle = ask(eng)
    eng.step()
    table, mark = eng.blocks.tables.row_blocks(handle.row), "with positions of an image"
    of_image = {table[i] for i in (1, 2, 3)}  # tokens 5..12

    def marked() -> set[int]:
        html = eng.blocks._repr_html_()
        titles = [part.split("</title>")[0] for part in html.split("<title>")[1:] if mark in part.split("</title>")[0]]
        return {int(title.split(":")[0].removeprefix("block ")) for title in titles}

    assert marked() == of_image
    eng.run()
    assert not eng.blocks.num_used and marked() == of_image
    for i in range(8):  # until nothing of it is left
        eng.generate([100 + i] * 60, lk.SamplingParams(max_tokens=40))
    assert not marked()


def test_a_request_shows_its_spans_and_lets_go_of_pixels_at_its_end() -> None:
    eng = small()
    handle = ask(eng)
    assert "image ab12cd34ef56<br><span class=q>tokens 5\u201312" in handle._repr_html_()
    eng.run()
    assert "image ab12cd34ef56" in handle._repr_html_()
    assert handle.spans[0].num_bytes == 0 and IMAGE.num_bytes == 1000


@pytest.mark.parametrize("is_running", [False, True])
def test_a_budget_below_an_image_that_one_step_computes_is_refused(is_running: bool) -> None:
    eng = small()
    handle = ask(eng, lk.Span(5, 8, b"x", bidirectional=True))
    if is_running:
        eng.step()
    with pytest.raises(ValueError, match=r"budget=7 .*'r1' has an image of 8 tokens.* use budget=8 or more"):
        eng.control(budget=7, rows=2)
    assert eng.scheduler.max_num_batched_tokens == 64 and not eng.log.events("Control")
    eng.control(budget=8)
    eng.run()
    assert handle.finish_reason == "length"
    eng.control(budget=7)


def test_images_of_live_requests_are_bounded_in_bytes() -> None:
    eng = small(max_image_bytes=2500)
    ask(eng), ask(eng), ask(eng)  # the same arrays
    other = lk.Span(5, 8, b"other", pixels={"x": np.zeros(250, np.float32)})
    ask(eng, other)
    third = lk.Span(5, 8, b"third", pixels={"x": np.zeros(250, np.float32)})
    with pytest.raises(lk.RejectedError, match=r"3,000 bytes .* at most 2,500 .*max_waiting_image_gb"):
        ask(eng, third)
    eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=1))  # text goes on
    eng.run()
    assert ask(eng, third).wait().finish_reason == "length", "ended requests hold none"
