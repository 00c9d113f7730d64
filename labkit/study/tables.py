"""Imports pandas, or raises an error that names the extra to install."""

from __future__ import annotations

from typing import Any


def pandas() -> Any:
    """The pandas module, imported when a table is needed."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas: pip install 'labkit[study]'") from error
    return pandas
