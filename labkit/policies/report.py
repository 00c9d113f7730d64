"""What `check` found: data that prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labkit.core.shown import Shown


class Problem(NamedTuple):
    """One thing that a policy broke. `kind` is "raises", "wrong type", "writes", "starves", "stalls", "idle",
    "unordered", "stale keys", "endless", "slow", "never returns" or "breaks the engine"; `during` is the part of the
    check in which it happened first."""

    kind: str
    decision: str
    what: str
    during: str

    def __str__(self) -> str:
        return f"{self.kind:<11} {self.decision:<11} {self.what} [{self.during}]"


@dataclass(frozen=True)
class Report(Shown):
    """`ok` if nothing broke; else `problems`. `costs` are the policies' calls and times on this machine's processor."""

    policies: str
    problems: tuple[Problem, ...]
    parts: tuple[str, ...]  # of the check that were run to their end
    num_steps: int
    costs: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def kinds(self) -> set[str]:
        return {problem.kind for problem in self.problems}

    def __repr__(self) -> str:
        num = len(self.problems)
        found = "nothing broke" if self.ok else f"{num} problem{'s' * (num != 1)}"
        head = f"Report({self.policies}: {found} in {self.num_steps:,} steps of {', '.join(self.parts) or 'nothing'})"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems), *(f"  {cost}" for cost in self.costs)])

    def rows(self) -> Sequence[Problem]:
        return self.problems
