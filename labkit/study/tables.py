"""Imports pandas, or raises an error that names the extra to install."""

from __future__ import annotations

from typing import Any


def pandas() -> Any:
    """The module, imported where a table is asked for."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas: pip install 'labkit[study]'") from error
    return pandas
