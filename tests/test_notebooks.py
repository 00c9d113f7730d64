"""The committed notebooks: run in order, small, without widget state or errors, with two exercises at the end."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAPERS = sorted((ROOT / "notebooks" / "papers").glob("*.ipynb"))


def load(path):
    return {**json.loads(path.read_text()), "path": path}


@pytest.fixture(params=LESSONS + PAPERS, ids=lambda path: path.stem)
def notebook(request):
    return load(request.param)


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return load(request.param)


@pytest.fixture(params=PAPERS, ids=lambda path: path.stem)
def paper(request):
    return load(request.param)


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_is_one_for_each_lesson():
    numbers = [int(path.name[:2]) for path in LESSONS]
    assert numbers == sorted(set(numbers)) and numbers[:15] == list(range(1, 16))


def test_it_was_run_from_top_to_bottom(notebook):
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


def test_it_is_small_and_carries_no_widget(notebook):
    text = notebook["path"].read_text()
    assert len(text) <= 200_000, f"{len(text):,} bytes: give a picture fewer points"
    assert "widgets" not in notebook["metadata"]
    assert "application/vnd.jupyter.widget-view+json" not in text


def test_nothing_in_it_failed_or_names_a_machine(notebook):
    for cell in code(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", cell["source"]
            assert output.get("name") != "stderr", output
    assert not re.search(r"/home/|/root/|/work/|/tmp/", notebook["path"].read_text())


def test_it_asserts_what_it_teaches_and_ends_in_two_exercises(lesson):
    text = ["".join(cell["source"]) for cell in lesson["cells"]]
    assert sum("assert " in source for source in text) >= 4
    exercises = next(i for i, source in enumerate(text) if "## Exercise" in source)
    rest = text[exercises:]
    assert sum("assert " in source for source in rest) >= 2
    assert re.search(r"\*\*1[.*]|Exercise 1|1\.", "\n".join(rest)) and re.search(
        r"\*\*2[.*]|Exercise 2|2\.", "\n".join(rest)
    )


def test_cells_are_short(notebook):
    for cell in code(notebook):
        assert "".join(cell["source"]).count("\n") < 30, "longer code belongs to labkit"


def test_a_paper_has_a_figure_an_exercise_and_at_the_end_its_numbers_beside_ours(paper):
    text = ["".join(cell["source"]) for cell in paper["cells"]]
    exercise = next(i for i, source in enumerate(text) if "## Exercise" in source)
    assert sum("assert " in source for source in text[:exercise]) >= 1, "it asserts its result"
    assert sum("assert " in source for source in text[exercise:]) >= 1, "it checks the exercise"
    shown = [output.get("data", {}) for cell in code(paper) for output in cell["outputs"]]
    assert any("application/vnd.plotly.v1+json" in data and "<svg" in "".join(data["text/html"]) for data in shown)
    table = "".join(shown[-1]["text/markdown"])
    assert "| paper | here | why they differ |" in table and table.count("\n| ") >= 3
