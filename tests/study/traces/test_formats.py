"""Trace files: what each format means, and what becomes of lines that are wrong."""

import io
import json
from array import array

import pytest

import labkit as lk
from labkit.study.traces.readers import json_array


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "trace.jsonl"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def mooncake(time=0, prompt=600, output=9, hashes=(0, 1)):
    return json.dumps({"timestamp": time, "input_length": prompt, "output_length": output, "hash_ids": list(hashes)})


def test_mooncake(write):
    trace = lk.study.read_trace(write(mooncake() + "\n" + mooncake(1500, 512, 3, [0]) + "\n\n"))
    assert trace.block_size == 512
    first, second = trace
    assert (first.arrival, first.num_prompt, first.num_output, first.hashes) == (0.0, 600, 9, array("q", [0, 1]))
    assert second.arrival == 1.5
    assert list(trace) == [first, second], "a second pass reads the same"


def test_azure_times_are_seconds_after_the_first(write):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = lk.study.read_trace(write(text, "azure.csv"))
    assert (first.arrival, first.num_prompt, first.num_output) == (0.0, 374, 44)
    assert second.arrival == pytest.approx(4.314579)


BAD = {
    "not JSON": "{",
    "not an object": "[1, 2]",
    "missing field": '{"timestamp": 5, "input_length": 3, "hash_ids": []}',
    "malformed field": mooncake(5).replace("600", '"600"'),
    "hashes disagree with length": mooncake(5, 600, 9, [1]),
    "repeated hash": mooncake(5, 600, 9, [1, 1]),
    "negative time": mooncake(-5),
    "time goes backwards": mooncake(1),
    "no prompt": mooncake(5, 0, 9, []),
    "impossible length": mooncake(5, 600, -1),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_ends_the_pass_or_is_counted(write, reason):
    lines = [mooncake(), mooncake(2), BAD[reason], mooncake(6)]
    path = write("\n".join(lines))
    with pytest.raises(ValueError, match=f"trace.jsonl, line 3: {reason}"):
        list(lk.study.read_trace(path, "mooncake"))
    trace = lk.study.read_trace(path, "mooncake", errors="skip")
    assert [request.arrival for request in trace] == [0.0, 0.002, 0.006]
    assert trace.excluded.counts == {reason: 1}
    assert "1 excluded" in repr(trace) and "line 3" in repr(trace)
    study = lk.study.prefix(trace, [4])
    assert reason in repr(study) and study.rows[0]["requests"] == 3 and study.rows[0]["excluded"] == 1


def test_an_empty_trace_is_an_error(write):
    with pytest.raises(ValueError, match=r"trace.jsonl has no requests"):
        list(lk.study.read_trace(write(""), "mooncake"))
    with pytest.raises(ValueError, match=r"has no requests .*1 excluded"):
        list(lk.study.read_trace(write("{\n"), "mooncake", errors="skip"))
    with pytest.raises(ValueError, match="first line is empty"):
        lk.study.read_trace(write(""))


def test_an_unknown_format_names_the_known_ones(write):
    with pytest.raises(ValueError, match=r"cannot tell its format .* mooncake"):
        lk.study.read_trace(write("a,b,c\n1,2,3\n"))
    with pytest.raises(ValueError, match="did you mean 'mooncake'"):
        lk.study.read_trace(write(mooncake()), "moncake")
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        lk.study.read_trace(write(mooncake()), errors="ignore")


def test_a_summary_counts_what_is_there(write):
    lines = [mooncake(1000 * i, 600, 9, [0, i + 1]) for i in range(5)]
    found = lk.study.describe(lk.study.read_trace(write("\n".join(lines)))).row()
    assert (found["requests"], found["seconds"], found["requests_per_s"], found["burstiness"]) == (5, 4.0, 1.0, 0.0)
    assert (found["prompt_mean"], found["output_most"], found["blocks"]) == (600.0, 9, 10)


def test_bailian_turns_belong_to_the_session_of_their_first_request(write):
    def line(chat, parent, time, hashes, kind="text"):
        row = {"chat_id": chat, "parent_chat_id": parent, "timestamp": time, "input_length": 16 * len(hashes),
               "output_length": 5, "type": kind, "turn": 1, "hash_ids": hashes}  # fmt: skip
        return json.dumps(row)

    lines = [
        line(1, -1, 0.5, [1, 2]),
        line(2, 1, 1.5, [1, 2, 3]),
        line(3, 2, 2.5, [1]),
        line(4, 99, 3.0, [7], "search"),
    ]
    trace = lk.study.read_trace(write("\n".join(lines)))
    assert trace.block_size == 16
    assert [(r.id, r.session, r.parent, r.kind) for r in trace] == [
        ("1", "1", None, "text"), ("2", "1", "1", "text"), ("3", "1", "2", "text"), ("4", "99", "99", "search")
    ]  # fmt: skip


def test_burstgpt(write):
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,1.5,ChatGPT,472,18,490,Conversation log\n45,,2,GPT-4,1087,0,1087,API log\n45,,2,GPT-4,0,0,0,API log\n"
    )
    trace = lk.study.read_trace(write(text, "burst.csv"), errors="skip")
    first, second = trace
    assert (first.arrival, first.num_prompt, first.num_output, first.session) == (5.0, 472, 18, "s1")
    assert (second.session, second.kind) == (None, "API log")
    assert trace.excluded.counts == {"no prompt": 1}


def test_sharegpt_turns_are_requests_whose_prompts_grow(write):
    talks = [
        {"id": "a", "conversations": [{"from": "human", "value": "x" * 20}, {"from": "gpt", "value": "y" * 10},
                                      {"from": "human", "value": "z" * 6}, {"from": "gpt", "value": "w" * 4}]},
        {"id": "b", "conversations": []},
        {"id": "c", "conversations": [{"from": "human", "value": "x" * 20}, {"from": "gpt", "value": "v" * 3}]},
    ]  # fmt: skip
    path = write(json.dumps(talks, indent=1), "talks.json")
    trace = lk.study.read_trace(path, tokenizer=lk.ByteTokenizer(), block_size=8, errors="skip")
    found = list(trace)
    assert [(r.num_prompt, r.num_output, r.session, r.parent) for r in found] == [
        (20, 10, "a", None), (36, 4, "a", "a:1"), (20, 3, "c", None)
    ]  # fmt: skip
    assert found[1].hashes[:2] == found[0].hashes[:2] and found[2].hashes == found[0].hashes
    assert trace.excluded.counts == {"no conversation": 1}
    with pytest.raises(ValueError, match="give tokenizer="):
        lk.study.read_trace(path)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_json_array_is_read_in_pieces(chunk):
    entries = [{"a": [1, 2, "],["]}, 12345, "x]", [], [[3]], None]
    for text in (json.dumps(entries), json.dumps(entries, indent=2) + "\n"):
        assert list(json_array(io.StringIO(text), chunk)) == entries
    assert list(json_array(io.StringIO("[]"), chunk)) == []
    assert "does not end" in str(list(json_array(io.StringIO("[1, 2"), chunk))[-1])
    assert "not a JSON array" in str(list(json_array(io.StringIO("{}"), chunk))[-1])


FULL = [
    lk.study.TraceRequest(
        0.25, 40, 8, array("q", [1, 2, -(2**62)]), array("i", range(40)), "a", "s", "t", None, None, "k"
    ),
    lk.study.TraceRequest(1.0, 20, 8, array("q", [1, 4]), None, "b", "s", None, "a", 0.5, None),
    lk.study.TraceRequest(1.0, 16, 0, array("q", [5])),
]


@pytest.mark.parametrize("format", ["labkit", "columns"])
def test_what_is_written_is_read_again(tmp_path, format):
    path = tmp_path / "saved"
    written = lk.study.write_trace(lk.study.Trace.of(FULL, block_size=16), path, format)
    assert written.requests == 3 and not written.left_out
    trace = lk.study.read_trace(path)
    assert trace.block_size == 16 and list(trace) == FULL
    (read,), (expected,) = trace.columns(), lk.study.Trace.of(FULL, block_size=16).columns()
    for name in ("arrival", "num_prompt", "num_output", "indptr", "hashes", "session"):
        assert (getattr(read, name) == getattr(expected, name)).all(), name
    assert read.tenant == expected.tenant


def test_fields_that_a_format_cannot_hold_are_counted(tmp_path):
    written = lk.study.write_trace(lk.study.Trace.of(FULL, block_size=16), tmp_path / "m.jsonl", "mooncake")
    assert written.left_out == {"tokens": 1, "id": 2, "session": 2, "tenant": 1, "kind": 1, "parent": 1, "think": 1}
    assert "left out: tokens of 1" in repr(written)
    again = list(lk.study.read_trace(tmp_path / "m.jsonl", block_size=16))
    assert [request.hashes for request in again] == [request.hashes for request in FULL]


def test_a_damaged_file_of_columns_is_noticed(tmp_path):
    path = tmp_path / "saved"
    lk.study.write_trace(lk.study.Trace.of(FULL, block_size=16), path, "columns")
    data = bytearray(path.read_bytes())
    for broken in (data[:-1], data[:-5] + b"xxxxx", data + b"more\n"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="saved is damaged or cut off"):
            list(lk.study.read_trace(path))
    path.write_bytes(data.split(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match="no requests"):
        lk.study.prefix(lk.study.read_trace(path), [4])


def test_tokens_are_hashed_where_hashes_are_missing(write):
    header = '{"labkit_trace": 1, "block_size": 4}'
    lines = [json.dumps({"arrival": 0, "prompt": 6, "output": 1, "tokens": [1, 2, 3, 4, last, 6]}) for last in (5, 9)]
    one, other = lk.study.read_trace(write("\n".join([header, *lines])))
    assert len(one.hashes) == 2 and one.hashes[0] == other.hashes[0] and one.hashes[1] != other.hashes[1]


def engine(num_blocks=64, **options):
    scheduler = lk.Scheduler(lk.BlockManager(num_blocks=num_blocks), **options)
    return lk.Engine(scheduler=scheduler, runner=lk.SimRunner(), clock=lk.VirtualClock())


def test_a_recorded_run_replays_to_the_hits_of_the_engine():
    eng = engine(400, max_num_seqs=1)
    workload = lk.workloads.shared_prefixes(60, prefixes=3, prefix=64, rate=4, output=(1, 4), seed=3)
    with lk.study.record(eng) as recording:
        for ask in workload.asks:
            eng.submit(ask.prompt, lk.SamplingParams(max_tokens=ask.num_output, ignore_eos=True), arrival=ask.arrival)
        eng.run()
    assert len(recording) == 60 and recording.num_missed == 0
    trace = recording.trace()
    for request, ask in zip(trace, workload.asks, strict=True):
        assert (tuple(request.tokens), request.num_output) == (ask.prompt, ask.num_output)
        assert request.arrival == pytest.approx(ask.arrival, abs=1e-6)
    (row,) = lk.study.prefix(trace, [400]).rows
    assert row["hit_tokens"] == eng.blocks.num_hit_tokens > 0
    assert row["tokens"] == eng.blocks.num_queried_tokens


def test_a_saved_event_log_is_a_trace_of_lengths(tmp_path):
    eng = engine(8)
    for i, length in enumerate((20, 30, 40)):
        eng.submit(range(length), lk.SamplingParams(max_tokens=3 + i, ignore_eos=True), arrival=float(i), id=f"r{i}")
    with pytest.raises(lk.RejectedError):
        eng.submit(range(2000), lk.SamplingParams(max_tokens=3), id="long")
    eng.run()
    eng.log.save(str(tmp_path / "run.jsonl"))
    trace = lk.study.read_trace(tmp_path / "run.jsonl", errors="skip")
    assert [(r.id, r.arrival, r.num_prompt, r.num_output) for r in trace] == [
        ("r0", 0.0, 20, 3), ("r1", 1.0, 30, 4), ("r2", 2.0, 40, 5)
    ]  # fmt: skip
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if '"Finished"' in line and '"r2"' in line)
    (tmp_path / "run.jsonl").write_text("\n".join(lines[:cut]))
    assert len(list(trace)) == 2 and trace.excluded.counts["never ended"] == 1


def test_a_saved_event_log_shares_what_was_shared(tmp_path):
    def served(**options):
        sched = lk.Scheduler(lk.BlockManager(300, **options), max_num_seqs=8, log=lk.EventLog(keep=None))
        eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(), clock=lk.VirtualClock())
        asks = lk.workloads.shared_prefixes(30, prefixes=3, prefix=70, rate=30).asks
        with lk.study.record(eng) as recording:
            for i, ask in enumerate(asks):
                params = lk.SamplingParams(max_tokens=ask.num_output, ignore_eos=True)
                eng.submit(ask.prompt, params, arrival=ask.arrival, salt=[None, "other"][i % 2])
            eng.run()
        eng.log.save(tmp_path / "log.jsonl")
        return recording.trace(), lk.study.read_trace(tmp_path / "log.jsonl")

    recorded, loaded = served()
    rates = [
        [row["token_hit_rate"] for row in lk.study.prefix(trace, [40, 100, 300]).rows] for trace in (recorded, loaded)
    ]
    assert rates[0] == rates[1] and rates[0][-1] > 0.4
    assert [(r.id, r.num_prompt, r.num_output) for r in loaded] == [
        (r.id, r.num_prompt, r.num_output) for r in recorded
    ]
    with pytest.raises(ValueError, match="says itself how many tokens a block has"):
        lk.study.read_trace(tmp_path / "log.jsonl", block_size=8)
    _, without = served(prefix_caching=False)
    assert without.block_size is None and len(list(without)) == 30
    with pytest.raises(ValueError, match="event logs of engines with the prefix cache on"):
        lk.study.prefix(without, [40])
