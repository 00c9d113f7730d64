"""A study's pictures and its file."""

import json

import pytest

import labkit as lk
from labkit.study.study import Run


@pytest.fixture(scope="module")
def study():
    workload = lk.workloads.shared_prefixes(30, prefixes=4, prefix=64, question=(8, 24), output=(4, 16), rate=20)
    grid = {"num_blocks": [32, 48, 96], "eviction": ["lru", lambda block: -block.depth], "order": ["fcfs"]}
    return lk.Experiment(workload, grid, rows=8, repeats=2).run(progress=False)


def test_a_saved_study_comes_back_as_it_was(study, tmp_path):
    study.save(tmp_path / "study.json")
    other = lk.Study.load(tmp_path / "study.json")
    assert repr(other) == repr(study) and other.frame().equals(study.frame())
    assert other.requests().equals(study.requests())
    assert other._repr_html_() == study._repr_html_()
    assert "<lambda>" in (tmp_path / "study.json").read_text(), "functions are kept by name"


@pytest.mark.parametrize(
    ("text", "said"),
    [("no", "is not JSON"), ("{}", "is not a study"), ('{"labkit_study": 1}', "missing"), ("[1]", "is not a study")],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=f"study.json.* {said}"):
        lk.Study.load(tmp_path / "study.json")


def test_a_plot_has_a_trace_for_every_other_setting_and_the_mean_of_seeds(study):
    figure = study.plot("num_blocks", "hit_rate")
    assert [trace.name for trace in figure.data] == ["lru, fcfs", "<lambda>, fcfs"]
    rows = study.frame().query("num_blocks == 32 and eviction == 'lru'").hit_rate
    assert list(figure.data[0].x) == [32, 48, 96] and figure.data[0].y[0] == pytest.approx(rows.mean())
    assert figure.data[0].error_y.array[0] == pytest.approx(rows.max() - rows.mean())
    assert [trace.type for trace in study.plot("eviction", "ttft_p50", by="num_blocks").data] == ["bar"] * 3
    assert study.plot("eviction", "ttft_p50", by="num_blocks").layout.yaxis.title.text == "ttft_p50 [s]"
    over_time = study.plot("time", "used_blocks")
    assert len(over_time.data) == len(study) and max(over_time.data[0].y) <= 32
    assert sum(trace.showlegend for trace in over_time.data) == 6, "seeds of a setting share a colour and a name"
    assert over_time.data[0].line.color == over_time.data[1].line.color != over_time.data[2].line.color


def test_a_plot_of_what_is_not_there_is_answered_with_the_closest(study):
    with pytest.raises(ValueError, match="did you mean 'num_blocks'"):
        study.plot("num_block")
    with pytest.raises(ValueError, match="did you mean 'hit_rate'"):
        study.plot("num_blocks", "hitrate")
    with pytest.raises(ValueError, match="no curve 'ttft_p50'"):
        study.plot("time", "ttft_p50")
    with pytest.raises(ValueError, match="eviction varies as well"):
        study.plot("num_blocks", by="order")
    with pytest.raises(TypeError, match="no option 'evict'"):
        study.plot("num_blocks", by="evict")


def test_the_picture_has_bars_for_what_differs_and_escapes_names(study):
    html = study._repr_html_()
    assert "&lt;lambda&gt;" in html and "<lambda>" not in html
    assert "hit_rate" in html and html.count("<svg") >= 2 and "<script" not in html and "http" not in html
    runs = [Run({"eviction": "<b>"}, 0, "Error: <i>"), Run({"eviction": "lru"}, 0, None, {"hit_rate": 0.5})]
    made = lk.Study(runs, names=["eviction"], workload="<u>", runner="x", num_planned=2)
    for tag in ("<b>", "<i>", "<u>"):
        assert tag not in made._repr_html_()
    assert made.frame().error.tolist()[0] == "Error: <i>"


def test_numbers_that_are_none_are_saved_as_null(tmp_path):
    run = Run({"rows": 1}, 0, None, {"own": float("nan")})
    lk.Study([run], names=["rows"], workload="w", runner="x", num_planned=1).save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["runs"][0]["metrics"]["own"] is None
    assert "none" in lk.Study.load(tmp_path / "s.json")._repr_html_()


def test_without_pandas_or_plotly_the_extra_is_named(study, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'labkit\[study\]'"):
        study.frame()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install 'labkit\[lab\]'"):
        study.plot("num_blocks")
