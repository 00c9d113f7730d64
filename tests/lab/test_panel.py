"""The panel by its methods and by clicks: the same results, one figure, nothing blocked."""

import threading

import pytest

import labkit as lk

from .conftest import fine_rms_norm, wrong_rms_norm

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def panel(variant):
    variant("silu_mul", "fine", lambda x: lk.kernel_lab("silu_mul").op.reference(x))
    variant("silu_mul", "wrong", lambda x: x.chunk(2, -1)[0])
    return lk.kernel_lab("silu_mul").panel()


def test_what_is_chosen_is_run_and_a_wrong_variant_is_shown_and_not_timed(panel):
    panel.choose(shapes="1x14336", dtypes=["float32"], variants=["reference", "fine", "wrong"])
    assert repr(panel) == "Panel(silu_mul: 1 shapes, 1 dtypes, 3 variants; idle)"
    figure = panel.figure
    panel.run()
    assert "FAILED" in panel.results.value and "worst at" in panel.results.value
    assert {trace.name for trace in figure.data if trace.mode == "markers"} == {"reference", "fine"}
    assert panel.lab.latest["bench"]._repr_html_() == panel.results.value
    panel.choose(variants=["reference"]).run()
    assert panel.figure is figure and panel.lab.panel() is panel  # made once, filled again
    assert {trace.name for trace in figure.data if trace.mode == "markers"} == {"reference"}
    assert "FAILED" not in panel.results.value and panel.num_runs == 2


def test_a_click_runs_in_another_thread_and_a_second_one_meanwhile_does_nothing(panel, variant):
    go_on, seen = threading.Event(), []

    def slow(x):
        seen.append(threading.current_thread())
        assert go_on.wait(20)
        return panel.lab.op.reference(x)

    variant("silu_mul", "slow", slow)
    panel.choose(shapes=["1x14336"], dtypes=["float32"], variants=["slow"])
    panel.button.click()
    panel.button.click()
    assert panel.is_running and "running" in repr(panel) and panel.button.disabled
    with pytest.raises(TimeoutError):
        panel.wait(0.01)
    go_on.set()
    panel.wait(30)
    assert panel.num_runs == 1 and not panel.button.disabled
    assert threading.main_thread() not in seen and len(set(seen)) == 1


def test_another_op_offers_its_own_shapes_and_variants(panel, variant):
    variant("rms_norm", "fine", fine_rms_norm)
    panel.choose(op="rms_norm")
    assert panel.lab.op.name == "rms_norm" and "4096x4096" in panel.shapes.options
    assert "fine" in panel.variants.value
    variant("rms_norm", "wrong", wrong_rms_norm)  # made while the panel stands
    panel.choose(shapes=["1x4096"], dtypes=["float32"], variants=["wrong"]).run()
    assert "FAILED" in panel.results.value and not [t for t in panel.figure.data if t.mode == "markers"]


def test_an_error_is_shown_raised_by_wait_and_gone_with_the_next_run(panel):
    panel.choose(shapes=["1x14336"], dtypes=["float32"], variants=[])
    with pytest.raises(ValueError, match="choose variants first"):
        panel.run()
    assert "choose variants first" in panel.status.value
    panel.choose(variants=["reference"]).run()
    assert panel.status.value == "" and panel.error is None
    with pytest.raises(ValueError, match="dtypes has no 'bf16': float32, bfloat16, float16"):
        panel.choose(dtypes=["bf16"])
    with pytest.raises(ValueError, match="no op 'silu'"):
        panel.choose(op="silu")


def test_without_a_browser_the_results_are_still_there(panel):
    panel.choose(shapes=["1x14336"], dtypes=["float32"], variants=["reference"]).run()
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == repr(panel) and "bench of silu_mul" in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
