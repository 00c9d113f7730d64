"""labkit lab: notebooks are found and copied, and an edited copy is never overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from labkit.cli import main
from labkit.notebook import jupyter as lab

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("01_one.ipynb", "02_two.ipynb"):
        (folder / name).write_text(json.dumps({"cells": [], "name": name}))
    return folder


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy"


def what(copied):
    return {one.name[:2]: one.what for one in copied}


def test_a_checkout_s_notebooks_are_found():
    assert lab.notebooks_home() == ROOT / "notebooks"


def test_an_installed_wheel_s_notebooks_are_found(tmp_path):
    build = pytest.importorskip(
        "hatchling.build", reason="building the wheel needs hatchling: pip install 'labkit[dev]'"
    )
    script = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    assert build is not None
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / made.stdout.strip().splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    shipped = {path.name for path in (tmp_path / "site/labkit/notebooks").rglob("*.ipynb")}
    assert shipped == {path.name for path in (ROOT / "notebooks").rglob("*.ipynb")} and "orca.ipynb" in shipped
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]\n"
        "import labkit.notebook.jupyter; print(labkit.notebook.jupyter.notebooks_home())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "site/labkit/notebooks")


def test_the_wheel_is_told_to_take_them():
    import tomllib

    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert hatch["wheel"]["force-include"] == {"notebooks": "labkit/notebooks"}
    assert "notebooks" in hatch["sdist"]["include"]
    assert "labkit lab" in (ROOT / "Makefile").read_text()


def test_without_notebooks_it_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "labkit" / "notebook" / "jupyter.py"))
    with pytest.raises(FileNotFoundError, match="no notebooks came with this labkit"):
        lab.notebooks_home()


def test_the_first_time_copies_and_the_second_changes_nothing(home, copy):
    assert what(lab.copy_notebooks(copy, home=home)) == {"01": "new", "02": "new"}
    assert what(lab.copy_notebooks(copy, home=home)) == {"01": "same", "02": "same"}
    assert (copy / "01_one.ipynb").read_bytes() == (home / "01_one.ipynb").read_bytes()


def test_an_edited_copy_is_kept_and_an_untouched_one_is_updated(home, copy):
    lab.copy_notebooks(copy, home=home)
    (copy / "01_one.ipynb").write_text("mine")
    for name in ("01_one.ipynb", "02_two.ipynb"):
        (home / name).write_text("newer")
    copied = lab.copy_notebooks(copy, home=home)
    assert what(copied) == {"01": "kept", "02": "updated"}
    assert (copy / "01_one.ipynb").read_text() == "mine" and (copy / "02_two.ipynb").read_text() == "newer"
    assert "--reset replaces yours" in repr(copied[0])
    assert what(lab.copy_notebooks(copy, home=home)) == {"01": "kept", "02": "same"}, "and so the next time"


def test_notebooks_about_papers_keep_their_folder(home, copy):
    (home / "papers").mkdir()
    (home / "papers/orca.ipynb").write_text("{}")
    assert [repr(one) for one in lab.copy_notebooks(copy, home=home)][2] == "new     papers/orca.ipynb"
    (copy / "papers/orca.ipynb").write_text("mine")
    assert lab.copy_notebooks(copy, home=home)[2].what == "kept"
    assert lab.copy_notebooks(copy, home=home, reset=True)[2].what == "renewed"
    assert (copy / "papers/orca-edited-1.ipynb").read_text() == "mine"


def test_reset_renews_and_puts_the_edited_one_aside(home, copy):
    lab.copy_notebooks(copy, home=home)
    for text in ("mine", "mine again"):
        (copy / "01_one.ipynb").write_text(text)
        assert what(lab.copy_notebooks(copy, home=home, reset=True)) == {"01": "renewed", "02": "same"}
    assert (copy / "01_one-edited-1.ipynb").read_text() == "mine"
    assert (copy / "01_one-edited-2.ipynb").read_text() == "mine again"
    assert (copy / "01_one.ipynb").read_bytes() == (home / "01_one.ipynb").read_bytes()


def test_a_lost_record_never_costs_an_edited_copy(home, copy):
    lab.copy_notebooks(copy, home=home)
    (copy / "01_one.ipynb").write_text("mine")
    (copy / lab.RECORD).write_text("no json")
    (home / "02_two.ipynb").write_text("newer")
    assert what(lab.copy_notebooks(copy, home=home)) == {"01": "kept", "02": "kept"}


def test_folders_that_cannot_be_are_refused(home, copy):
    copy.write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        lab.copy_notebooks(copy, home=home)
    with pytest.raises(ValueError, match="the notebooks themselves"):
        lab.copy_notebooks(home, home=home)


def test_jupyterlab_is_started_with_what_was_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, check: (started.append(words), subprocess.CompletedProcess(words, 3))[1]
    )
    folder = tmp_path / "mine"
    assert main(["lab", str(folder), "--no-browser", "--port", "9999", "--", "--ip=0.0.0.0", "--debug"]) == 3
    words = started[0]
    assert words[:3] == [sys.executable, "-m", "jupyterlab"] and f"--ServerApp.root_dir={folder.resolve()}" in words
    assert [word for word in words if word != "--allow-root"][-4:] == [
        "--no-browser",
        "--ServerApp.port=9999",
        "--ip=0.0.0.0",
        "--debug",
    ]
    told = capsys.readouterr().out
    assert "02_block_tables.ipynb" in told and str(folder.resolve()) in told
    assert (folder / "02_block_tables.ipynb").exists()
    with pytest.raises(SystemExit):
        main(["lab", "--prot", "3"])


def test_copies_are_signed_so_that_their_pictures_show_and_edited_ones_are_not(monkeypatch, tmp_path):
    import nbformat
    from nbformat.sign import NotebookNotary

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setattr(subprocess, "run", lambda words, check: subprocess.CompletedProcess(words, 0))
    folder = tmp_path / "mine"
    lab.lab(folder)
    path = folder / "02_block_tables.ipynb"
    assert NotebookNotary().check_signature(nbformat.read(path, as_version=4))
    edited = nbformat.read(path, as_version=4)
    edited.cells[1].source = "1 + 1"
    nbformat.write(edited, path)
    lab.lab(folder)
    assert not NotebookNotary().check_signature(nbformat.read(path, as_version=4))


def test_the_server_really_starts_and_lists_the_copies(tmp_path):
    dirs = {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR")}
    words = [sys.executable, "-m", "labkit.cli", "lab", str(tmp_path / "mine"), "--no-browser", "--port", "0"]
    words += ["--", "--allow-root", "--IdentityProvider.token=secret"]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(words, env={**os.environ, **dirs}, stdout=said, stderr=said, start_new_session=True)
    try:
        address = _address(tmp_path / "JUPYTER_RUNTIME_DIR", process)
        with urllib.request.urlopen(f"{address}api/contents?token=secret", timeout=30) as answer:
            listed = {entry["name"] for entry in json.load(answer)["content"]}
        assert listed == {"papers", *(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "new     02_block_tables.ipynb" in (tmp_path / "said").read_text()


def _address(runtime: Path, process: subprocess.Popen) -> str:
    for _ in range(600):
        assert process.poll() is None, "it ended by itself"
        for path in runtime.glob("jpserver-*.json"):
            if path.read_text().endswith("}"):
                return json.loads(path.read_text())["url"]
        time.sleep(0.1)
    raise AssertionError("no server within a minute")


def test_without_jupyterlab_nothing_is_copied_and_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lab", str(tmp_path / "mine")]) == 2
    assert "pip install 'labkit[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_port_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--port"):
        lab.command(tmp_path, port=70_000)
