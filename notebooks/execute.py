"""Runs notebooks from top to bottom and saves their outputs, without widgets: python notebooks/execute.py [NAME ...].

A name is how a file begins: 04, papers/orca.

An error stops it, and the file is left unchanged.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"  # needs the kernel that made it; the text beside it does not


def execute(path: Path) -> int:
    """Bytes of the notebook with its new outputs."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book, timeout=180, store_widget_state=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET, None)
    nbformat.write(book, path)
    return path.stat().st_size


def main(names: list[str]) -> None:
    every = {
        path.relative_to(HERE).as_posix(): path
        for path in sorted([*HERE.glob("*.ipynb"), *HERE.glob("papers/*.ipynb")])
    }
    paths = [path for name, path in every.items() if not names or name.startswith(tuple(names))]
    if not paths:
        raise SystemExit(f"no notebook's name begins with {' or '.join(names)}")
    root = HERE.parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    for path in paths:
        print(f"{path.relative_to(HERE)}: {execute(path):,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
