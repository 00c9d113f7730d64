"""What preemptions cost: tokens recomputed, blocks moved, seconds lost, and which request needed the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.core import frames
from labkit.core.events.types import Batch
from labkit.core.shown import Shown
from labkit.widgets.gantt import gantt, keys
from labkit.widgets.style import plural, seconds, short, table, view
from labkit.widgets.timeline import Segment, id_of, log_of, segments

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Loss:
    """One preemption and its cost. Times are ns; `resumed` and `again` are None until the request is back."""

    request: str
    step: int
    at: int
    how: str
    needed_by: str | None  # None: a step failed
    num_tokens: int  # computed tokens that were given up or moved
    num_moved: int  # blocks moved to host memory and back
    num_recomputed: int | None  # tokens computed a second time
    resumed: int | None  # when it had a row again
    again: int | None  # when it had a new token, or ended

    @property
    def whom(self) -> str:
        """Which request needed the room, in words."""
        if self.needed_by is None:
            return "a step that failed"
        return "itself" if self.needed_by == self.request else repr(self.needed_by)

    @property
    def seconds_waiting(self) -> float | None:
        return None if self.resumed is None else (self.resumed - self.at) / 1e9

    @property
    def seconds_lost(self) -> float | None:
        """From losing the row to being where it was before."""
        return None if self.again is None else (self.again - self.at) / 1e9

    def __repr__(self) -> str:
        what = (
            plural(self.num_moved, "block") + " moved" if self.how == "swap" else f"{self.num_tokens} tokens given up"
        )
        if self.num_recomputed:
            what += f", {plural(self.num_recomputed, 'token')} computed again"
        lost = "not back yet" if self.seconds_lost is None else f"{seconds(self.seconds_lost)} lost"
        return f"step {self.step}: {self.request!r} by {self.how} for {self.whom}; {what}, {lost}"


@dataclass(frozen=True)
class PreemptionStory(Shown):
    """What preemptions cost; see `preemption`."""

    request: str | None
    losses: tuple[Loss, ...]
    timeline: tuple[Segment, ...]

    @property
    def seconds_lost(self) -> float:
        return sum(loss.seconds_lost or 0.0 for loss in self.losses)

    @property
    def num_recomputed(self) -> int:
        return sum(loss.num_recomputed or 0 for loss in self.losses)

    def frame(self) -> pandas.DataFrame:
        """One row per preemption: which request, when, how, for which request, and its cost."""
        return frames.table(
            [
                (loss.request, loss.step, loss.at / 1e9, loss.how, loss.needed_by, loss.num_tokens, loss.num_moved,
                 loss.num_recomputed, loss.seconds_waiting, loss.seconds_lost)
                for loss in self.losses
            ],
            columns=["request", "step", "time", "how", "needed_by", "tokens", "blocks_moved", "recomputed",
                     "seconds_waiting", "seconds_lost"],
        )  # fmt: skip

    def __repr__(self) -> str:
        who = "all requests" if self.request is None else self.request
        if not self.losses:
            return f"{who}: never preempted"
        head = (
            f"{who}: preempted {len(self.losses)}x, {seconds(self.seconds_lost)} lost, "
            f"{plural(self.num_recomputed, 'token')} computed again"
        )
        more = [f"  and {len(self.losses) - 20} more"] if len(self.losses) > 20 else []
        return "\n".join([head, *(f"  {loss!r}" for loss in self.losses[:20]), *more])


def preemption(log: Any, request: Any = None) -> PreemptionStory:
    """What preemptions cost one request, or all requests: tokens recomputed or blocks moved, the seconds until the
    request was where it had been, and which request needed the room.

    >>> lk.explain.preemption(engine, "r5")
    r5: preempted 1x, 16 ms lost, 126 tokens computed again
      step 50: 'r5' by recompute for 'r1'; 126 tokens given up, 126 tokens computed again, 16 ms lost
    """
    log = log_of(log)
    id = None if request is None else id_of(request)
    if id is not None:
        log.why(id)  # raises if the log does not know it
    losses = _losses(log.batches(), id)
    names = {loss.request for loss in losses} | {loss.needed_by for loss in losses if loss.needed_by}
    return PreemptionStory(id, tuple(losses), tuple(segments(log, names)))


def _losses(batches: Sequence[Batch], only: str | None) -> list[Loss]:
    found: list[dict[str, Any]] = []
    current: dict[str, dict[str, Any]] = {}  # request -> its latest loss, until it has caught up
    for batch in batches:
        for kind, *columns in batch.events:
            if kind == "Preempted" and only in (None, columns[0]):
                name, how, needed_by, num_tokens = columns
                loss = {
                    "request": name, "step": batch.step, "at": batch.now, "how": how, "needed_by": needed_by or None,
                    "num_tokens": num_tokens, "num_moved": 0, "num_recomputed": None, "resumed": None, "again": None,
                }  # fmt: skip
                found.append(loss)
                current[name] = loss
                continue
            if not columns or columns[0] not in current:
                continue
            loss = current[columns[0]]
            if kind in ("SwappedOut", "SwappedIn"):
                loss["num_moved"] += columns[1]
            elif kind == "Resumed":
                loss["resumed"] = batch.now
                loss["num_recomputed"] = max(loss["num_tokens"] - columns[2], 0)
            elif kind in ("Finished", "Aborted") or (
                kind == "Scheduled" and loss["resumed"] is not None and batch.row is not None
            ):
                loss["again"] = batch.now
                del current[columns[0]]
    return [Loss(**loss) for loss in found]


def preemption_view(story: PreemptionStory) -> str:
    """Timelines of the requests that were preempted and of those that needed the room, and the total cost."""
    who = "everyone" if story.request is None else repr(story.request)
    if not story.losses:
        return view(f"Preemptions of {who}"[:90], "<p>None.</p>")
    about = (
        f"{len(story.losses)}\u00d7, {seconds(story.seconds_lost)} lost, "
        f"{plural(story.num_recomputed, 'token')} computed again"
    )
    losers = list(dict.fromkeys(loss.request for loss in story.losses))
    winners = [loss.needed_by for loss in story.losses if loss.needed_by]
    names = list(dict.fromkeys([*losers, *winners]))[:40]
    lines = [
        [
            short(loss.request, 30),
            str(loss.step),
            short(loss.how, 20),
            short(loss.whom if loss.needed_by in (None, loss.request) else loss.needed_by, 30),
            f"{loss.num_tokens:,}",
            f"{loss.num_moved:,}",
            "" if loss.num_recomputed is None else f"{loss.num_recomputed:,}",
            "" if loss.seconds_waiting is None else seconds(loss.seconds_waiting),
            "not back yet" if loss.seconds_lost is None else seconds(loss.seconds_lost),
        ]
        for loss in story.losses[:40]
    ]
    head = ["request", "step", "how", "for", "tokens", "blocks moved", "computed again", "without a row", "lost in all"]
    rest = f'<p class="q">and {len(story.losses) - 40:,} more</p>' if len(story.losses) > 40 else ""
    shown = [segment for segment in story.timeline if segment.request in set(names)]
    return view(
        f"Preemptions of {who}"[:90], keys(shown), gantt(shown, names), table(head, lines, "lrll"), rest, about=about
    )
