"""`labkit lab`: copies the notebooks to a folder and opens JupyterLab there. Never overwrites an edited copy."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = "labkit-notebooks"
PAPERS = "papers"  # a folder of notebooks in the folder of notebooks
RECORD = ".labkit.json"  # in the copy: what each file was when it was copied


@dataclass(frozen=True)
class Copied:
    """What was done with one notebook."""

    name: str
    what: str  # "new", "same", "updated", "kept", "renewed"
    note: str = ""

    def __repr__(self) -> str:
        return f"{self.what:8}{self.name}{f': {self.note}' if self.note else ''}"


def notebooks_home() -> Path:
    """The folder of labkit's own notebooks: beside the package in a checkout, inside it when installed.

    >>> sorted(path.name for path in notebooks_home().glob("02*.ipynb"))
    ['02_block_tables.ipynb']
    """
    package = Path(__file__).parents[1]
    for home in (package / "notebooks", package.parent / "notebooks"):
        if any(home.glob("*.ipynb")):
            return home
    raise FileNotFoundError(
        f"no notebooks came with this labkit: neither {package / 'notebooks'} nor a checkout has any"
    )


def copy_notebooks(folder: str | Path = FOLDER, *, reset: bool = False, home: Path | None = None) -> list[Copied]:
    """Copy the notebooks to `folder`. An edited copy is kept; with `reset` it is renamed and a fresh one is made."""
    home, folder = home or notebooks_home(), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder")
    if folder.resolve() == home.resolve():
        raise ValueError(f"{folder} holds the notebooks themselves: choose another folder for the copy")
    folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder)
    done = []
    for source in sorted([*home.glob("*.ipynb"), *home.glob(f"{PAPERS}/*.ipynb")]):
        name = source.relative_to(home).as_posix()
        copied = _copy(name, source, folder / name, record.get(name), reset)
        if copied.what != "kept":
            record[name] = _digest(source)
        done.append(copied)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return done


def _copy(name: str, source: Path, target: Path, copied: str | None, reset: bool) -> Copied:
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        return Copied(name, "new")
    there, shipped = _digest(target), _digest(source)
    if there == shipped:
        return Copied(name, "same")
    if there == copied:
        shutil.copyfile(source, target)
        return Copied(name, "updated", "it was not edited, and a newer one came with labkit")
    if reset:
        aside = _aside(target)
        target.rename(aside)
        shutil.copyfile(source, target)
        return Copied(name, "renewed", f"your edited copy is now {aside.name}")
    newer = copied is not None and copied != shipped
    return Copied(name, "kept", "edited" + ("; labkit has a newer one, --reset replaces yours" if newer else ""))


def _aside(target: Path) -> Path:
    """A file name that is not taken."""
    number = 1
    while (aside := target.with_name(f"{target.stem}-edited-{number}.ipynb")).exists():
        number += 1
    return aside


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(folder: Path) -> dict[str, str]:
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}  # then every file that differs counts as edited
    return record if isinstance(record, dict) else {}


def command(folder: Path, *, browser: bool = True, port: int | None = None, words: Sequence[str] = ()) -> list[str]:
    """The command that starts JupyterLab."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise RuntimeError("JupyterLab is not installed: pip install 'labkit[lab]'")
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"--port is a number up to 65535, got {port}")
    options = [] if browser else ["--no-browser"]
    options += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # as in most containers
    options += [] if port is None else [f"--ServerApp.port={port}"]
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve()}", *options, *words]


def trust(notebook: Path) -> None:
    """Sign a notebook that ships with labkit: JupyterLab hides pictures in an unsigned notebook until it is run."""
    import sqlite3

    import nbformat
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        notary.sign(nbformat.read(notebook, as_version=4))
        notary.store.close()
    except (OSError, sqlite3.Error) as error:
        print(f"{notebook.name} could not be signed, so its pictures appear only after you run it: {error}")


def lab(
    folder: str | Path = FOLDER,
    *,
    reset: bool = False,
    browser: bool = True,
    port: int | None = None,
    words: Sequence[str] = (),
) -> int:
    """Copy, report, and run JupyterLab until it exits; returns its exit code."""
    start = command(Path(folder), browser=browser, port=port, words=words)  # report what is missing before copying
    for copied in copy_notebooks(folder, reset=reset):
        if copied.what != "kept":
            trust(Path(folder) / copied.name)
        if copied.what != "same":
            print(repr(copied))
    print(f"notebooks: {Path(folder).resolve()}", flush=True)
    try:
        return subprocess.run(start, check=False).returncode
    except KeyboardInterrupt:
        return 0
