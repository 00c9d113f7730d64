"""Gives core objects an HTML view in notebooks. The drawing function is registered from outside, so the core has no
HTML code. A repr never raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Drawer = Callable[[object], "str | None"]

_drawers: list[Drawer] = []  # at most one; empty if no drawer is registered


def draw_with(drawer: Drawer) -> None:
    """Register `drawer(thing)`, which returns the HTML of an object, or None if it has no view of it."""
    _drawers[:] = [drawer]


def html_of(thing: object) -> str | None:
    """The HTML view, if there is one. Raises what the drawer raises."""
    return _drawers[0](thing) if _drawers else None


def mimebundle(thing: object) -> dict[str, str]:
    """What a notebook shows: the repr and the HTML view. If the drawer fails, the repr and the error."""
    try:
        plain = repr(thing)
    except Exception as error:  # a notebook drops an object whose view raises
        return {"text/plain": f"<{type(thing).__name__}: its repr failed: {type(error).__name__}: {error}>"}
    try:
        html = html_of(thing)
    except Exception as error:  # a notebook drops an object whose view raises
        return {"text/plain": f"{plain}\n(no picture: {type(error).__name__}: {error})"}
    return {"text/plain": plain} if html is None else {"text/plain": plain, "text/html": html}


class Shown:
    """Base class for objects with an HTML view in a notebook.

    >>> class Point(Shown):
    ...     def __repr__(self): return "Point(1, 2)"
    >>> Point()._repr_mimebundle_()
    {'text/plain': 'Point(1, 2)'}
    """

    __slots__ = ()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)

    def _repr_html_(self) -> str | None:
        return mimebundle(self).get("text/html")
