"""Plans and results: plain columns, and all that passes between scheduler and runner.

A plan is immutable and self-contained: it can be sent to another process, saved, or given to a simulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.prefix import Span
from labkit.core.blocks.states import StateMoves
from labkit.core.blocks.stubs import NO_MOVES, Arrival, DiskMoves
from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.captures import CapturedStep
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.shown import mimebundle
from labkit.core.smaller import Compaction

Pairs = NDArray[np.int64]

NO_INTS: Ints = np.zeros(0, np.int64)
NO_PAIRS: Pairs = np.zeros((0, 2), np.int64)
NO_STATES = StateMoves()
NO_INTS.flags.writeable = False
NO_PAIRS.flags.writeable = False


class Join(NamedTuple):
    """A request gets a row. `tokens` are all its token ids; those already in the cache are not computed again."""

    row: int
    request: str
    tokens: Tokens
    num_prompt: int
    params: SamplingParams
    sample: int
    adapter: str | None
    spans: tuple[Span, ...]
    slot: int | None = None  # where its adapter is, see `Plan.adapters`

    def __repr__(self) -> str:
        return f"Join({self.request!r} takes row {self.row} with {len(self.tokens)} tokens)"


class TableChanges(NamedTuple):
    """Sets entry `index` of `row`'s table in attention group `group` to `block`."""

    group: Ints
    row: Ints
    index: Ints  # type: ignore[assignment]
    block: Ints

    def __repr__(self) -> str:
        return f"TableChanges({len(self.block)} blocks in {len(np.unique(self.row))} rows)"


NO_CHANGES = TableChanges(NO_INTS, NO_INTS, NO_INTS, NO_INTS)


class Plan(NamedTuple):
    """One step. Applied in this order: reset, leaves, load adapters, joins, table changes, drop from and write to disk,
    swap out, compact, copy, read from disk, write arrivals, swap in, compute.

    Entry i computes tokens `start[i] .. start[i] + count[i]` of `rows[i]`; the first `num_decode` entries are decode
    rows, one token each and `drafts[i]` draft tokens after it. Entry i's ids are `tokens[indptr[i]:indptr[i + 1]]`. For
    entries in `feed` the id is the row's latest sample, which only the runner has yet. Sample j is drawn from the
    logits of flat query position `sample_query[j]` for row `sample_row[j]`; one position may serve several rows. With
    drafts, a token is also drawn after each draft (`draws`); those that follow accepted drafts count (`verify`).
    """

    step: int
    now: int
    rows: Ints
    start: Ints
    count: Ints  # type: ignore[assignment]
    num_decode: int
    tokens: Tokens
    indptr: Ints
    feed: Ints
    sample_query: Ints
    sample_row: Ints
    table_changes: TableChanges = NO_CHANGES
    joins: tuple[Join, ...] = ()
    leaves: tuple[int, ...] = ()
    swap_out: Pairs = NO_PAIRS  # device block -> host block
    copies: Pairs = NO_PAIRS  # block -> block
    swap_in: Pairs = NO_PAIRS  # host block -> device block
    reset: bool = False  # a step failed: forget every row
    budget: int = 0  # the most tokens the step could have had; 0: unknown
    drafts: Ints = NO_INTS  # by decode row: how many draft tokens follow its own; empty: none (always so with `feed`)
    disk: DiskMoves = NO_MOVES
    adapters: tuple[tuple[int, str], ...] = ()  # (slot, adapter): load it, in place of the one that is there
    fill_drafts: bool = False  # the runner makes the drafts: their ids in `tokens` only keep the place
    widths: tuple[
        int, ...
    ] = ()  # of trees it makes: how many candidates for each token to come; empty: it makes chains
    compactions: tuple[Compaction, ...] = ()
    states: StateMoves = NO_STATES
    parents: Ints = NO_INTS  # of trees: the draft of its row that each one continues, -1: the row's own token
    arrivals: tuple[Arrival, ...] = ()  # blocks of other engines, into host memory

    @property
    def num_tokens(self) -> int:
        return int(self.count.sum())

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.num_decode - self.num_drafts

    @property
    def num_drafts(self) -> int:
        return int(self.drafts.sum())

    def draws(self) -> tuple[Ints, Ints]:
        """All draws: for each the index of its sample, and the flat query position whose logits it is drawn from."""
        samples = np.arange(len(self.sample_row))
        if not len(self.drafts):
            return samples, self.sample_query
        counts = np.ones(len(samples), np.int64)
        counts[: self.num_decode] += self.drafts
        sample = np.repeat(samples, counts)
        nth = np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample]
        return sample, self.sample_query[sample] + nth

    def filled(self, guesses: Tokens, parents: Ints = NO_INTS) -> Plan:
        """This plan with the drafts that the runner made, in the order of their places."""
        tokens = self.tokens.copy()
        tokens[self.draft_places()] = guesses
        return self._replace(tokens=tokens, fill_drafts=False, parents=parents)

    def trees(self) -> list[tuple[int, Ints]]:
        """Of each entry whose drafts are a tree: (entry, parents). A draft comes after the one that it continues."""
        if not len(self.parents):
            return []
        ends = np.cumsum(self.drafts)
        return [(i, self.parents[ends[i] - self.drafts[i] : ends[i]]) for i in self.drafts.nonzero()[0].tolist()]

    def offsets(self) -> Ints:
        """How far each of the step's tokens is behind its entry's first one."""
        begin = np.cumsum(self.count) - self.count
        found = np.arange(self.num_tokens) - np.repeat(begin, self.count)
        for entry, parents in self.trees():
            own = found[begin[entry] : begin[entry] + self.count[entry]]
            for i, parent in enumerate(parents.tolist()):
                own[i + 1] = own[parent + 1] + 1
        return found

    def draft_places(self) -> Ints:
        """Where in `tokens` the drafts are."""
        row = np.repeat(np.arange(self.num_decode), self.drafts)
        nth = np.arange(len(row)) - (np.cumsum(self.drafts) - self.drafts)[row]
        return self.indptr[:-1][row] + 1 + nth

    def verify(self, drawn: Tokens) -> tuple[NDArray[np.bool_], Ints | None]:
        """Which of the drawn tokens stand, one for each of `draws`: those before which every guess was right. And where
        each sample's begin among them, as a `Result` wants it: None if there is one token a sample."""
        if not len(self.drafts):
            return np.ones(len(drawn), bool), None
        sample, query = self.draws()
        if len(self.parents):
            stands = self._walk(drawn, np.searchsorted(sample, np.arange(len(self.sample_row))))
        else:
            stands = self._stand(drawn, sample, query)
        indptr = np.zeros(len(self.sample_row) + 1, np.int64)
        np.cumsum(np.bincount(sample[stands], minlength=len(self.sample_row)), out=indptr[1:])
        return stands, indptr

    def _stand(self, drawn: Tokens, sample: Ints, query: Ints) -> NDArray[np.bool_]:
        guessed = sample[1:] == sample[:-1]  # another draw of the same sample follows: on the guess that came next
        wrong = np.zeros(len(drawn), np.int64)  # guesses, up to and with the one before this draw
        wrong[1:] = np.cumsum(guessed & (drawn[:-1] != self.tokens[np.where(guessed, query[:-1] + 1, 0)]))
        first = np.searchsorted(sample, sample)
        stands: NDArray[np.bool_] = wrong == wrong[first]
        return stands

    def _walk(self, drawn: Tokens, first: Ints) -> NDArray[np.bool_]:
        """From each row's own token to the draft that is what was drawn there, as long as there is one."""
        stands = np.ones(len(drawn), bool)
        for entry, parents in self.trees():
            begin, token, at = int(first[entry]), int(self.indptr[entry]) + 1, -1
            for i, parent in enumerate(parents.tolist()):
                right = parent == at and self.tokens[token + i] == drawn[begin + 1 + at]
                stands[begin + 1 + i] = right
                at = i if right else at
        return stands

    def __repr__(self) -> str:
        prefills = len(self.rows) - self.num_decode
        drafts = f" with {self.num_drafts} drafts" if len(self.drafts) else ""
        parts = [f"{self.num_decode} decode rows{drafts}", f"{prefills} prefills of {self.num_prefill_tokens} tokens"]
        also = {
            name: len(getattr(self, name))
            for name in ("joins", "leaves", "swap_out", "compactions", "copies", "swap_in")
        }
        parts += [f"{number} {name.replace('_', ' ')}" for name, number in also.items() if number]
        parts += [f"{len(self.adapters)} adapters to load"] * bool(self.adapters)
        parts += [f"{len(self.disk.writes)} to disk"] * bool(self.disk.writes)
        parts += [f"{len(self.disk.reads)} from disk"] * bool(self.disk.reads)
        parts += [f"{len(self.arrivals)} from other engines"] * bool(self.arrivals)
        return f"Plan({self.step}: {', '.join(parts)})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)

    def _repr_html_(self) -> str | None:
        return mimebundle(self).get("text/html")


class TokenLogprobs(NamedTuple):
    """A token's log-probability and rank (1 is the likeliest), and the likeliest tokens with theirs."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


class Extras(NamedTuple):
    """What a request asked for besides tokens."""

    logprobs: tuple[TokenLogprobs, ...] = ()  # of the step's tokens, in order
    prompt_logprobs: dict[int, TokenLogprobs] | None = None  # by position in the prompt


class Result(NamedTuple):
    """The tokens of each sample of the plan, the step's seconds, and an error text for each row that failed on its own.
    `extras` and `edited` (the number of edits made, times tokens) are by request id; the core passes them and what was
    `captured` on unread.

    Sample j's tokens are `tokens[indptr[j]:indptr[j + 1]]`: one, and one more for each accepted draft; none for a row
    that failed. Without `indptr` every sample has one token. `read` names the disk reads of this or earlier plans that
    are done by now, and whether the file was good; a plan without rows waits for all of them. `once`: the step did work
    that later ones are spared, so its seconds say little about theirs.
    """

    tokens: Tokens
    seconds: float = 0.0
    errors: dict[int, str] | None = None
    extras: dict[str, Extras] | None = None
    indptr: Ints | None = None
    read: dict[bytes, bool] | None = None
    once: bool = False
    captured: CapturedStep | None = None
    edited: dict[str, int] | None = None
    pooled: dict[str, Any] | None = None  # by request id: what its states were pooled to, an array

    @property
    def num_samples(self) -> int:
        return len(self.tokens) if self.indptr is None else len(self.indptr) - 1

    def counts(self) -> Ints:
        """How many tokens each sample has."""
        return np.ones(len(self.tokens), np.int64) if self.indptr is None else np.diff(self.indptr)

    def __repr__(self) -> str:
        tokens = f"{len(self.tokens)} tokens" if hasattr(self.tokens, "__len__") else repr(self.tokens)
        failed = f", {len(self.errors)} rows failed" if self.errors else ""
        return f"Result({tokens}, {self.seconds} s{failed})"


class Failure(NamedTuple):
    """The whole step failed. Its requests go back to the queue and keep their tokens. `memory_is_lost`: so is
    everything that was ever computed."""

    error: BaseException
    seconds: float = 0.0
    memory_is_lost: bool = False


class Outputs(NamedTuple):
    """What a step produced: one token for each of `rows` (a row with accepted drafts appears once for each of its
    tokens, in order), and the requests that finished."""

    step: int
    now: int
    rows: Ints
    serials: Ints
    tokens: Tokens
    ended: tuple[Request, ...] = ()

    def __repr__(self) -> str:
        return f"Outputs({self.step}: {len(self.tokens)} tokens, {len(self.ended)} ended)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)

    def _repr_html_(self) -> str | None:
        return mimebundle(self).get("text/html")
