"""Makes pandas DataFrames. pandas is imported when the first table is asked for, and the error names the extra to
install."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """A DataFrame of rows; an ImportError that names the extra where there is no pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("frame() needs pandas: pip install 'labkit[lab]'") from error
    return pandas.DataFrame(list(rows), columns=list(columns))
