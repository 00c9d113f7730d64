"""The README's Python runs as printed, block after block, and prints what it says it prints."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_blocks_run_top_to_bottom_and_print_what_their_comments_say(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 3
    space: dict = {}
    for block in blocks("python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), space)
        for claim in re.findall(r"#> (.*)", block):
            assert claim.strip() in printed.getvalue(), f"README promises {claim!r}, got:\n{printed.getvalue()}"


def test_make_targets_and_commands_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for words in set(re.findall(r"^labkit ([a-z ]+)", "\n".join(blocks("bash")), re.MULTILINE)):
        done = subprocess.run(
            [sys.executable, "-m", "labkit.cli", *words.split(), "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, words


def test_files_that_the_readme_links_exist():
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT):
        assert (ROOT / link).exists(), link
