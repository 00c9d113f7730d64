"""How many guesses pay: from the measured acceptance of each row and the measured seconds of steps.

A step of B rows that verifies x guesses takes T(B, x) seconds and gives B tokens and one for each accepted guess. The
length that gives the most tokens a second is chosen in every step. T is measured, as an average for each (B, x) that
occurred, and interpolated between them; what a row accepts is taken as a chance for each guess, estimated from the
row's own guesses and, at first, from those of all rows. Guesses that cost more than they bring are not made. Then one
step in sixteen tries again, later one in 512, because text and load change: sooner with half as many rows, or with
other texts (unless a draft model would have to compute them first).

It knows no clock: seconds are those of results, or of a timer that it is given.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.tables import Ints

MARGIN = 1.02  # guesses must promise this much
COSTLY_MARGIN = 1.1  # guesses of a model: what it takes is uncertain, and so is what it brings
TRUST = 8.0  # a row's estimate starts as if it had this many guesses of the average row
MEMORY = 64.0  # guesses that a row's estimate remembers
FIRST_WAIT, LONGEST_WAIT = 16, 512  # steps without guesses before the next try
LEAST = 3  # steps with guesses say what guesses cost
FEW = 16  # times as soon, with half as many rows
TRIAL, RETRIAL = 8, 3  # steps with guesses at least, at first and later, before they are given up
PLAIN_EVERY = 64  # of steps with guesses, one is made without, so that both are measured
MOST_AT_ONCE = 32  # guesses for one row, of a draft that sets no bound


class StepTimes:
    """Average seconds of steps with the same number of rows, by the number of guesses."""

    def __init__(self) -> None:
        self.places: list[int] = []  # numbers of guesses, ascending
        self.means: dict[int, tuple[float, int]] = {}  # -> seconds, steps

    @property
    def num_drafted(self) -> int:
        return sum(num for guesses, (_, num) in self.means.items() if guesses)

    def add(self, guesses: int, seconds: float) -> None:
        mean, num = self.means.get(guesses, (0.0, 0))
        if not num:
            insort(self.places, guesses)
        elif num >= 4 and mean:
            seconds = min(seconds, 1.5 * mean)  # a step that was disturbed says little
            all_faster = (max(seconds, 0.5 * mean) / mean) ** 0.0625
            for place in self.places:  # a busier machine, or longer texts, slow down all steps
                other, count = self.means[place]
                self.means[place] = other * all_faster, count
            mean *= all_faster
        self.means[guesses] = mean + (seconds - mean) / min(num + 1, 16), num + 1

    def at(self, guesses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolated; beyond the largest number tried, along the line from no guesses to it."""
        known = [self.means[place][0] for place in self.places]
        given = np.interp(guesses, self.places, known)
        last = self.places[-1]
        if last:
            slope = max(0.0, known[-1] - known[0]) / max(1, last - self.places[0])
            given = given + slope * np.maximum(0.0, guesses - last)
        return given


class DraftLengths:
    """Chooses how many guesses of each row a step verifies."""

    def __init__(self, num_rows: int, most: int, costly: bool = False) -> None:
        """With `costly` guesses, other texts are no reason to try: a draft model would compute their prompts first."""
        self.most, self.costly = most, costly
        self.serial = np.full(num_rows, -1, np.int64)
        self.right = np.zeros(num_rows)
        self.tried = np.zeros(num_rows)
        self.all_right, self.all_tried = 2.0, 3.0  # optimistic, and soon forgotten
        self.times: dict[int, StepTimes] = {}
        self.timer: Callable[[], float] | None = None  # of an engine on a wall clock
        self._begin: float | None = None
        self._asked = False  # in this step
        self._declined = False  # in this step: there were guesses, and none seemed to pay
        self._forced = False  # the first try after a pause is made also if it seems not to pay
        self._is_first = False  # for a row of this step: it costs more than later ones
        self._num_asked = 0  # since guesses were last given up
        self._trial = TRIAL
        self._wait = FIRST_WAIT
        self._idle = 0  # steps left until the next try
        self._given_up_at = 0  # rows
        self._tokens = self._seconds = 0.0  # of the latest steps that asked, in units of a plain step

    def __repr__(self) -> str:
        found = f"{self.acceptance:.0%} accepted"
        return f"{found}, waiting {self._idle} steps" if self._idle else found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_begin": None}

    @property
    def acceptance(self) -> float:
        """The chance that a guess is right, given that those before it are: over all rows, the latest weigh most."""
        return self.all_right / self.all_tried

    # -- what a step does ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._asked = self._is_first = self._declined = False
        if self.timer is not None:
            self._begin = self.timer()

    def meet(self, rows: Ints, serials: Ints) -> None:
        """Forget what was known of rows that have another request now."""
        new = rows[self.serial[rows] != serials]
        if len(new):
            self.right[new] = self.tried[new] = 0.0
            if 2 * len(new) >= len(rows):
                self._idle = min(self._idle, FIRST_WAIT)  # other texts
        self.serial[rows] = serials

    @property
    def rests(self) -> bool:
        return self._idle > 0

    def wants(self, num_rows: int) -> bool:
        """Whether this step asks for guesses at all."""
        if self._idle > 0:
            self._idle = max(0, self._idle - (FEW if 2 * num_rows <= self._given_up_at else 1))
            self._forced = self._idle == 0
            return False
        times = self._base(num_rows)
        if times is None or times.places[0]:
            return False  # what a plain step takes comes first
        self._num_asked += 1
        if self._num_asked % PLAIN_EVERY == 0:
            return False
        self._asked = True
        return True

    def each(self, num_rows: int, rows: Ints, given: Ints) -> Ints:
        """How many of the `given` guesses of each row are verified: the likeliest, until the next one does not pay."""
        given = np.minimum(given, MOST_AT_ONCE)
        chance = self._chances(rows)
        depth = np.arange(1, int(given.max()) + 1)
        reach = chance[:, None] ** depth  # [rows, guesses]: that all of them up to this one are right
        reach[depth > given[:, None]] = -1.0
        flat = reach.ravel()
        order = np.argsort(-flat, kind="stable")[: int(given.sum())]
        best = self._best(num_rows, np.cumsum(flat[order]), np.arange(1, len(order) + 1))
        return np.bincount(order[:best] // len(depth), minlength=len(rows))

    def uniform(self, num_rows: int, rows: Ints, most: Ints) -> Ints:
        """The same number for all rows, at most `most` of each: for a draft whose time grows with the longest guess."""
        most = np.minimum(most, MOST_AT_ONCE)
        self._is_first = bool((self.tried[rows] == 0).any())
        depth = np.arange(1, int(most.max()) + 1)
        within = depth <= most[:, None]
        gain = np.cumsum((self._chances(rows)[:, None] ** depth * within).sum(0))
        best = self._best(num_rows, gain, np.cumsum(within.sum(0)))
        return np.minimum(most, best)

    def _best(self, num_rows: int, gain: NDArray[np.float64], guesses: Ints) -> int:
        """Which of these numbers of guesses gives the most tokens a second; 0: none is better than no guesses."""
        times = self._base(num_rows)
        if times is None or times.num_drafted < LEAST:
            near = range(num_rows // 2, 2 * num_rows + 1)
            measured = [b for b, found in self.times.items() if found.num_drafted >= LEAST and b in near]
            if not measured:
                return len(gain)  # nothing is known of what guesses cost: measure it
            times = self.times[min(measured, key=lambda b: abs(b - num_rows))]
        seconds = times.at(np.concatenate(([0.0], guesses)))
        rate = np.concatenate(([0.0], gain)) / num_rows + 1.0
        if self._forced:
            rate[0], seconds = 0.0, seconds[0] + (seconds - seconds[0]) / 2  # what was measured may be out of date
            self._forced = False
        rate[0] *= COSTLY_MARGIN if self.costly else MARGIN
        best = int(np.argmax(rate / np.maximum(seconds, 1e-12)))
        self._declined = not best
        return best

    def _chances(self, rows: Ints) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (self.right[rows] + TRUST * self.acceptance) / (self.tried[rows] + TRUST)
        return np.minimum(found, 0.99)

    def _base(self, num_rows: int) -> StepTimes | None:
        return self.times.get(_bucket(num_rows))

    # -- what became of it ---------------------------------------------------------------------------------------

    def learn(self, rows: Ints, drafts: Ints, num_right: Ints) -> None:
        """Of each row: how many guesses were verified, and how many stood."""
        tried = num_right + (num_right < drafts)
        self.right[rows] += num_right
        self.tried[rows] += tried
        fade = np.minimum(1.0, MEMORY / np.maximum(self.tried[rows], 1.0))
        self.right[rows] *= fade
        self.tried[rows] *= fade
        self.all_right += float(num_right.sum())
        self.all_tried += float(tried.sum())
        if (fade_all := 4 * MEMORY / self.all_tried) < 1:
            self.all_right, self.all_tried = self.all_right * fade_all, self.all_tried * fade_all

    def end(self, num_rows: int, drafts: int, tokens: int, seconds: float, pure: bool) -> None:
        """A step of `num_rows` decode rows is over; `pure`: it did nothing else."""
        if self.timer is not None and self._begin is not None:
            seconds = self.timer() - self._begin
        if not pure or not num_rows:
            return
        if self._is_first and drafts:
            return  # the draft's model computed a prompt
        if drafts or not self._asked:
            self.times.setdefault(_bucket(num_rows), StepTimes()).add(_round(drafts), seconds)
        times = self._base(num_rows)
        if not self._asked or times is None or times.places[0]:  # plain steps come first
            return
        plain = times.means[0][0]
        self._tokens = 0.95 * self._tokens + tokens / num_rows
        self._seconds = 0.95 * self._seconds + min(seconds / plain if plain else 1.0, 8.0)
        if self._declined or (self._num_asked >= self._trial and self._tokens < self._seconds):
            self._give_up(num_rows)
        elif self._num_asked > 2 * TRIAL:
            self._wait = FIRST_WAIT

    def _give_up(self, num_rows: int) -> None:
        self._given_up_at = num_rows
        self._idle, self._trial = self._wait, RETRIAL
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._num_asked, self._tokens, self._seconds = 0, 0.0, 0.0


def _bucket(num_rows: int) -> int:
    """Numbers of rows whose steps take about the same time."""
    return num_rows if num_rows <= 8 else _STEPS[bisect_left(_STEPS, num_rows)]


def _round(guesses: int) -> int:
    return guesses if guesses <= 16 else _STEPS[bisect_left(_STEPS, guesses)]


_STEPS = sorted({*range(1, 17), *(round(16 * 1.19**i) for i in range(1, 64))})
