"""Who guesses next tokens, and how many guesses a step verifies. Knows rows, token ids and the seconds of steps; a
draft itself is an object from outside, see `labkit.sampling.drafts`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.scheduling.lengths import DraftLengths
from labkit.core.scheduling.policy import name_of

NO_GUESS: Tokens = np.zeros(0, np.int32)
MOST_FAILURES = 10  # one after the other, then the draft is off
UNBOUNDED = 2**31


class Asked(NamedTuple):
    """The rows that want guesses. Row `rows[i]` holds request number `serials[i]`, whose tokens so far are
    `tokens[rows[i], :lengths[i]]`; of more than `most[i]` guesses only the first are used. `tokens` is the scheduler's
    own array: read it, do not keep it."""

    rows: Ints
    serials: Ints
    lengths: Ints
    most: Ints
    tokens: Tokens  # [all rows, width]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def of(self, i: int) -> Tokens:
        """The token ids of the i-th row, as a view."""
        found: Tokens = self.tokens[self.rows[i], : self.lengths[i]]
        return found


class Draft(Protocol):
    """Guesses the next tokens of all rows of a step in one call.

    `num_tokens` is the most that it guesses for a row; None: as many as it likes. With `adaptive`, the scheduler
    verifies only as many guesses as pay, and none where they cost more time than they save. With `by_runner` the runner
    makes the guesses, with a model of its own: then `propose` is not called.

    `propose` returns one guess for each row asked: a sequence of token ids, possibly empty, or None, or the exception
    that it raised for this row alone.
    """

    num_tokens: int | None
    adaptive: bool
    by_runner: bool

    def propose(self, asked: Asked) -> Sequence[Any]: ...


DraftChoice: TypeAlias = "Draft | Callable[[Any], Any]"


class FunctionDraft:
    """A function of one request's token ids (a numpy array) to guesses of its next ones. All of them are verified,
    unless it is `adaptive`.

    >>> FunctionDraft(lambda ids: ids[-3:])
    FunctionDraft(<lambda>)
    """

    by_runner = False

    def __init__(self, function: Callable[[Any], Any], num_tokens: int | None = None, adaptive: bool = False) -> None:
        self.function, self.num_tokens, self.adaptive = function, num_tokens, adaptive

    def __repr__(self) -> str:
        return f"FunctionDraft({name_of(self.function)})"

    @property
    def name(self) -> str:
        return name_of(self.function)

    def propose(self, asked: Asked) -> list[Any]:
        found: list[Any] = []
        for i in range(asked.num_rows):
            try:
                found.append(self.function(asked.of(i).copy()))
            except Exception as error:  # it is the user's, and fails for this request alone
                found.append(error)
        return found


def draft_of(draft: Any) -> Draft | None:
    """A draft object, or a function made into one."""
    if draft is None or hasattr(draft, "propose"):
        return draft  # type: ignore[no-any-return]
    if not callable(draft):
        raise ValueError(f"draft must be a function of token ids or an object with propose(asked), got {draft!r}")
    return FunctionDraft(draft)


class Drafting:
    """Asks a draft, checks what it says, and learns from what became of it.

    A draft that raises or returns nonsense costs a warning, and the request goes on without. After ten failures in a
    row it is turned off, which is a `Control` event.
    """

    def __init__(self, draft: Draft, num_rows: int, log: Callable[[tuple[Any, ...]], None]) -> None:
        self.draft, self.log = draft, log
        self.lengths = DraftLengths(num_rows, getattr(draft, "num_tokens", None) or UNBOUNDED, draft.by_runner)
        self.num_failures = 0
        self.is_off = False

    def __repr__(self) -> str:
        return f"Drafting({self.draft!r}, {'off' if self.is_off else self.lengths!r})"

    def rests(self, rows: Ints, serials: Ints) -> bool:
        """Whether guesses do not pay at present, in a step with these decode rows. `serials` are those of all rows."""
        if not self.lengths.rests:
            return False
        if not self.lengths.costly:
            self.lengths.meet(rows, serials[rows])
        return not self.lengths.wants(len(rows))

    def guess(self, asked: Asked, num_decode: int, vocab_size: int | None, name: Callable[[int], str]) -> list[Tokens]:
        """Guesses for each row asked, in a step of `num_decode` rows. With a draft `by_runner` only their number
        matters."""
        adaptive = self.draft.adaptive
        lengths = self.lengths
        if adaptive:
            lengths.meet(asked.rows, asked.serials)
            if not lengths.wants(num_decode):
                return []
        most = np.minimum(asked.most, lengths.most)
        if self.draft.by_runner:
            if adaptive:
                most = lengths.uniform(num_decode, asked.rows, most)
            return [np.zeros(n, np.int32) for n in most.tolist()]
        found = self._ask(asked._replace(most=most), vocab_size, name)
        if adaptive and any(map(len, found)):
            counts = lengths.each(num_decode, asked.rows, np.array([len(guess) for guess in found]))
            found = [guess[:n] for guess, n in zip(found, counts.tolist(), strict=True)]
        return found

    def _ask(self, asked: Asked, vocab_size: int | None, name: Callable[[int], str]) -> list[Tokens]:
        try:
            given = self.draft.propose(asked)
            if len(given) != asked.num_rows:
                raise ValueError(f"propose was asked for {asked.num_rows} rows and returned {len(given)} guesses")
        except Exception as error:  # anything: it may be the user's
            self._failed(error, "this step")
            return []
        found = []
        for i, guess in enumerate(given):
            try:
                if isinstance(guess, Exception):
                    raise guess
                found.append(_checked(guess, int(asked.most[i]), vocab_size))
                self.num_failures = 0
            except Exception as error:  # a user's guess may be anything
                found.append(NO_GUESS)
                self._failed(error, repr(name(int(asked.rows[i]))))
        return found

    def _failed(self, error: Exception, what: str) -> None:
        called = getattr(self.draft, "name", None) or type(self.draft).__name__
        self.num_failures += 1
        if self.num_failures >= MOST_FAILURES and not self.is_off:
            self.is_off = True
            self.log(("Control", "draft", f"off: {self.num_failures} failures in a row, the last was {error!r}"))
            what += f"; after {self.num_failures} failures in a row it is off"
        warnings.warn(f"draft {called} failed for {what}: {error!r}", stacklevel=2)


def _checked(given: Any, most: int, vocab_size: int | None) -> Tokens:
    """What was given as token ids, up to the first that the vocabulary does not have."""
    guess = NO_GUESS if given is None else np.asarray(given)
    if not guess.size:
        return NO_GUESS
    if guess.ndim != 1 or guess.dtype.kind not in "iu":
        raise ValueError(f"a draft is a sequence of token ids, got {guess!r}")
    guess = guess[:most]
    bad = (guess < 0) | (guess >= (vocab_size or UNBOUNDED))
    return guess[: bad.argmax() if bad.any() else None].astype(np.int32)
