"""The Python of the README and of docs/ runs as printed, top to bottom on each page, and prints what it says."""

import contextlib
import io
import linecache
import re
import shlex
from pathlib import Path

import labkit_kernels
import pytest

import labkit as lk
from labkit import cli
from labkit.core.events.types import EVENTS, NAMES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OTHERS = ["kernels/README.md", "CHANGELOG.md", "LOG.md"]
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def variants_removed():
    yield
    for op in labkit_kernels.OPS.values():
        for name in ("mine", "triton_mine"):
            op.variants.pop(name, None)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_top_to_bottom_and_print_what_their_comments_say(
    page: str, tmp_path: Path, monkeypatch, variants_removed
):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    try:
        for i, block in enumerate(blocks(page, "python")):
            name, printed = f"<{page} {i}>", io.StringIO()
            linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)  # as in a notebook's cell
            with contextlib.redirect_stdout(printed):
                exec(compile(block, name, "exec"), space)
            for claim in re.findall(r"#> (.*)", block):
                assert claim.strip() in printed.getvalue(), f"{page} promises {claim!r}, got:\n{printed.getvalue()}"
    finally:
        for left in space.values():  # a page may leave an engine running
            if isinstance(left, lk.Engine):
                left.close()


def test_the_readme_and_the_pages_about_code_have_python():
    for page in ("README.md", "docs/engine.md", "docs/kernels.md", "docs/notebooks.md", "docs/quantization.md"):
        assert blocks(page, "python"), page


@every_page
def test_make_targets_and_commands_that_a_page_names_exist(page: str):
    makefile = (ROOT / "Makefile").read_text()
    text, shell = (ROOT / page).read_text(), "\n".join(blocks(page, "bash"))
    for target in {*re.findall(r"`make ([a-z]+)", text), *re.findall(r"^make ([a-z]+)", shell, re.MULTILINE)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for line in labkit_commands(shell):
        cli.parse(cli.split(line)[0])


def labkit_commands(shell: str) -> list[list[str]]:
    """The arguments of every call of labkit, also of those in a container."""
    found = re.findall(r"(?:^|docker run .* )labkit( .*)$", shell, re.MULTILINE)
    return [words for line in found if (words := shlex.split(line, comments=True))]


def test_the_commands_in_the_dockerfile_exist():
    text = (ROOT / "deploy/Dockerfile").read_text()
    found = labkit_commands(text)
    assert [words[0] for words in found] == ["serve", "doctor", "lab"]
    for line in found:
        cli.parse(cli.split(line)[0])


def test_an_argument_for_jupyterlab_says_where_it_goes(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["lab", "--ip", "0.0.0.0"])
    assert "JupyterLab's arguments go after --" in capsys.readouterr().err


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_files_that_a_page_links_or_names_exist(page: str):
    text = (ROOT / page).read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    folders = "labkit|kernels|tests|tools|notebooks|docs|deploy"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_page_of_words_lists_every_event_with_its_fields():
    lines = re.findall(r"^\| (`.*?`) \|.*\|(.*)\|$", (ROOT / "docs/words.md").read_text(), re.MULTILINE)
    listed = {name: fields for names, fields in lines for name in re.findall(r"`(\w+)`", names)}
    assert listed.keys() == EVENTS.keys()
    for name, fields in listed.items():
        assert [f.strip() for f in fields.split(",") if f.strip()] == NAMES[name][2:], name


def test_the_readme_links_every_page():
    for page in PAGES[1:]:
        assert f"]({page})" in (ROOT / "README.md").read_text(), page
