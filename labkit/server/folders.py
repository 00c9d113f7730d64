"""Paths that clients name: only what lies below a folder of the operator's. Links are followed first."""

from __future__ import annotations

from pathlib import Path

from labkit.server.errors import ApiError


def below(root: str, given: str, *, param: str, what: str) -> Path:
    """The file or folder `given`, if it is there and lies below `root`; else a 404 that tells nothing of the disk."""
    folder = Path(root).resolve()
    try:
        path = (folder / given).resolve()
        is_there = path != folder and path.is_relative_to(folder) and path.exists()
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        raise ApiError(f"there is no such {what}", status=404, param=param)
    return path
