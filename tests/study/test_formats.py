"""Trace files: what each format means, and what becomes of lines that are wrong."""

import json
from array import array

import pytest

import labkit as lk


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
