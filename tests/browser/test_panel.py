"""The kernel lab's panel in a real browser: a click runs in the background, and results replace earlier ones."""

import nbformat
import pytest

from tests.browser import lab
from tests.browser.test_notebooks import fine

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        lab.CHROMIUM is None or not lab.has_playwright(),
        reason="needs Debian's chromium (apt-get install chromium) and playwright",
    ),
]

CELL = """
import labkit as lk
from labkit_kernels import silu_mul

@silu_mul.variant("wrong")
def wrong(x):
    return x.chunk(2, -1)[0]

panel = lk.kernel_lab("silu_mul").panel()
panel.choose(shapes=["1x14336", "64x14336"], dtypes=["bfloat16"])
"""
MARKS = (
    "figure => { const plot = document.querySelector(figure); return plot && plot._fullData ?"
    " plot._fullData.filter(x => x.mode === 'markers').map(x => x.name) : [] }"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panel")
    (folder / "notebooks").mkdir()
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(book, folder / "notebooks" / "panel.ipynb")
    with lab.jupyter(folder) as address, lab.browser(address, folder) as found:
        yield found


def test_a_click_runs_beside_the_notebook_and_shows_what_is_wrong(page):
    page.open("panel.ipynb")
    page.run_all()
    page.wait_until_ran(120)
    page.page.wait_for_selector(lab.FIGURE, timeout=60_000)
    results = page.page.locator(".labkit-kernel-results").first
    assert "nothing was run yet" in results.inner_text()
    page.click("kernel-run")
    page.wait_for(lambda: "checking and timing" in page.page.locator(".labkit-kernel-status").first.inner_text())
    assert page.time_cell("1 + 1") < 2.0  # the kernel answers while the run works
    page.wait_for(lambda: "FAILED" in results.inner_text(), 60)
    page.wait_for(lambda: "reference" in page.page.evaluate(MARKS, lab.FIGURE), 60)
    assert "wrong" not in page.page.evaluate(MARKS, lab.FIGURE)  # what is wrong has no time
    page.picture("panel")
    page.time_cell("panel.wait(60); panel.choose(variants=['reference']).run()")
    page.wait_for(lambda: "FAILED" not in results.inner_text() and "64x14336" in results.inner_text())
    page.wait_for(lambda: page.page.evaluate(MARKS, lab.FIGURE) == ["reference"])
    assert page.page.locator(lab.FIGURE).count() == 1
    fine(page)
