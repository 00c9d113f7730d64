"""Checks names and values of options; an unknown name raises an error with the closest valid one."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

MOST_SECONDS = 9e9  # about 285 years, so that nanoseconds fit in 64 bits

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)


def closest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the closest valid name, then all valid names."""
    names = list(valid)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Valid: {', '.join(names)}"


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or a ValueError with the closest valid name."""
    if not isinstance(name, str) or name not in table:
        if not isinstance(name, str):
            raise ValueError(f"{kind} must be one of {', '.join(table)}, got {name!r}")
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, table)}")
    return table[name]


def check_names(owner: str, given: Iterable[str], valid: Iterable[str]) -> None:
    names = list(valid)
    for name in given:
        if name not in names:
            raise TypeError(f"{owner} has no option {name!r}; {closest(name, names)}")


def named_options(cls: C) -> C:
    """Class decorator: an unknown keyword of the constructor raises an error with the closest valid one."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    valid = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: object, *args: object, **options: object) -> None:
        check_names(cls.__name__, options, valid)
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def named_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for methods: an unknown keyword raises an error with the closest valid one."""
    valid = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        check_names(function.__qualname__, options, valid)
        return function(*args, **options)

    return checked


def whole(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """`value` as an int within bounds, or an error that names it. bool is not accepted."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    number: int = value.__index__()
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def duration(name: str, value: object) -> float:
    """`value` as seconds that integer nanoseconds can hold."""
    return real(name, value, least=0.0, most=MOST_SECONDS)


def flag(name: str, value: object) -> bool:
    """`value` if it is True or False; strings such as "off" are not accepted."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def text(name: str, value: object, *, may_be_empty: bool = False) -> str:
    """`value` as a string that can be encoded; half of a surrogate pair cannot."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"{name} must be a {'' if may_be_empty else 'non-empty '}string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got {value!r}: {error.reason}") from None
    return value


def real(name: str, value: object, *, least: float, most: float = float("inf"), open_left: bool = False) -> float:
    """`value` as a finite float in [least, most], or (least, most] when `open_left`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    inside = least < number <= most if open_left else least <= number <= most
    if not inside or number == float("inf"):
        bracket = "(" if open_left else "["
        raise ValueError(f"{name} must lie in {bracket}{least:g}, {most:g}], got {number:g}")
    return number
