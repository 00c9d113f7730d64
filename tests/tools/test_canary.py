"""The canary names the package that caused a failure."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = str(Path(__file__).parents[2] / "tools")

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.models.test_transformers" name="test_gptj">
<failure message="AttributeError: embed_positions">
labkit/models/adapters.py:63: in gptj
    sin, cos = self.embed_positions[position_ids]
/v/lib/python3.11/site-packages/torch/nn/modules/module.py:1970: in __getattr__
    raise AttributeError
/v/lib/python3.11/site-packages/transformers/models/gptj/modeling_gptj.py:140: AttributeError</failure></testcase>
<testcase classname="tests.widgets" name="test_figure"><error message="plotly moved FigureWidget">x</error></testcase>
<testcase classname="tests.core" name="test_ours"><failure message="assert 1 == 2">tests/core.py:3</failure></testcase>
<testcase classname="tests.core" name="test_fine"/>
</testsuite></testsuites>"""


@pytest.fixture
def canary(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    for name in ("canary", "lock"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("canary")


def test_failures_are_grouped_by_the_package_that_moved(canary, tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(JUNIT)
    lock = canary.locked(
        "transformers==5.20.0\nnumpy==2.4.6 ; python_version < '3.12'\nnumpy==2.5.5 ; x\nplotly==7.1.0\ntorch==2.13.0\n"
    )
    changed = canary.moved(lock, {"transformers": "5.24.0", "numpy": "2.5.5", "plotly": "7.2.0", "torch": "2.13.0+cpu"})
    assert changed == {"plotly": "7.1.0 -> 7.2.0", "transformers": "5.20.0 -> 5.24.0"}
    said = canary.summary(canary.failures(report), changed, {"transformers": ["transformers"], "torch": ["torch"]})
    assert "3 tests failed" in said
    assert "transformers 5.20.0 -> 5.24.0: 1 failed\n    tests.models.test_transformers::test_gptj" in said
    assert "plotly 7.1.0 -> 7.2.0: 1 failed\n    tests.widgets::test_figure" in said
    assert "labkit itself: 1 failed\n    tests.core::test_ours" in said


def test_the_lock_has_everything_that_pyproject_asks_for_within_its_ranges(canary):
    from packaging.requirements import Requirement
    from packaging.version import Version

    lock = canary.locked(canary.FILE.read_text())
    for line in [*canary.requirements(), "torch>=2.11,<2.14"]:
        asked = Requirement(line)
        versions = lock[canary.plain(asked.name)]
        assert versions, f"{asked.name} is not in constraints.txt: make lock"
        assert all(Version(version) in asked.specifier for version in versions), (
            f"{line}: constraints.txt has {versions}"
        )
