"""A request: one prompt and its continuation, as token ids with status and times."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from labkit.core.blocks.prefix import Span
from labkit.core.blocks.sessions import Hint
from labkit.core.blocks.tables import BlockTables, Tokens
from labkit.core.params import SamplingParams
from labkit.core.shown import Shown
from labkit.core.smaller import foresee

NO_TOKENS = np.zeros(0, np.int32)


class Status(StrEnum):
    ARRIVING = "arriving"  # submitted with a later arrival time
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"
    REWOUND = "rewound"  # submitted after the snapshot that was restored


ENDED = frozenset((Status.FINISHED, Status.ABORTED, Status.REJECTED, Status.REWOUND))


class Request(Shown):
    """Valid from submission on: `status`, `output_ids`, `finish_reason`.

    While it runs, its tokens are in its row of the block tables; before and after, they are here. A waiting request
    costs 4 bytes a prompt token and about 1 kB. Once its prefix was looked up, it costs 5 bytes a token more; only the
    head of the queue is looked up, or every request if the order asks for cached tokens.
    """

    __slots__ = (
        "adapter",
        "adapter_key",
        "admitted_at",
        "arrival",
        "cached_tokens",
        "error",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "foreseen",
        "hashes",
        "hint",
        "host_blocks",
        "id",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "output",
        "params",
        "parent",
        "parent_session",
        "priority",
        "prompt",
        "row",
        "salt",
        "sample",
        "samples",
        "serial",
        "session",
        "spans",
        "status",
        "stop_ids",
        "swap_step",
        "tables",
    )

    def __init__(
        self,
        id: str,
        prompt: Tokens,
        params: SamplingParams,
        *,
        arrival: int = 0,
        priority: int = 0,
        salt: str | None = None,
        adapter: str | None = None,
        adapter_key: str | None = None,
        spans: Sequence[Span] = (),
        stop_ids: tuple[int, ...] = (),
        parent: Request | None = None,
        sample: int = 0,
        session: str | None = None,
        parent_session: str | None = None,
        hint: Hint | None = None,
    ) -> None:
        self.id = id
        self.prompt = prompt
        self.params = params
        self.arrival = arrival  # ns
        self.foreseen = None  # of its `kv`: the first compaction, and the most keys it holds
        if params.kv is not None and not hasattr(params.kv, "split"):  # else it depends on the scheduler's blocks
            self.foreseen = foresee(params.kv, len(prompt), len(prompt) + (params.max_tokens or 1))
        self.priority = priority  # a smaller number goes first
        self.salt = salt
        self.adapter = adapter
        self.adapter_key = adapter_key or adapter  # its name, and which weights: what the prefix cache tells apart
        self.spans = tuple(spans)
        self.stop_ids = stop_ids  # stop ids and, unless ignored, eos
        self.parent = parent
        self.sample = sample
        self.session = session
        self.parent_session = parent_session  # the session that this one works for
        self.hint = hint  # of what its session does once this request has ended
        self.samples: list[Request] = []  # the further samples of this request, forked from it
        self.serial = -1
        self.status = Status.ARRIVING
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.row: int | None = None
        self.tables: BlockTables | None = None
        self.output = NO_TOKENS  # while it has no row
        self.num_computed = 0  # kept by a swap
        self.num_cached = 0  # prompt tokens that hit the prefix cache at first admission
        self.cached_tokens = 0  # prompt tokens that would hit now; updated for orders that use it
        self.num_preemptions = 0
        self.hashes: list[bytes] | None = None
        self.host_blocks: list[int] = []
        self.swap_step = -1
        self.admitted_at: int | None = None
        self.first_token_at: int | None = None
        self.finished_at: int | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        if self.row is None or self.tables is None:
            return len(self.prompt) + len(self.output)
        return int(self.tables.num_tokens[self.row])

    @property
    def num_output(self) -> int:
        return self.num_tokens - len(self.prompt)

    @property
    def num_left(self) -> int:
        """Tokens it may still produce."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens - self.num_output

    @property
    def output_array(self) -> Tokens:
        if self.row is None or self.tables is None:
            return self.output
        return self.tables.row_tokens(self.row)[len(self.prompt) :]

    @property
    def output_ids(self) -> list[int]:
        ids: list[int] = self.output_array.tolist()
        return ids

    @property
    def tokens(self) -> Tokens:
        """All known token ids, prompt first."""
        output = self.output_array
        return np.concatenate((self.prompt, output)) if len(output) else self.prompt

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def __repr__(self) -> str:
        how = f", {self.finish_reason}" if self.finish_reason else ""
        again = f", preempted {self.num_preemptions}x" if self.num_preemptions else ""
        return f"Request({self.id!r}: {self.status}{how}, {self.num_prompt} + {self.num_output} tokens{again})"
