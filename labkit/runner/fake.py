"""A runner without a model. It stores token ids where a model stores keys and values, and reads them back through the
block tables, so a wrong copy, swap, table or input shows as a wrong token."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from labkit.core.blocks.exported import Form
from labkit.core.blocks.states import Save
from labkit.core.blocks.stubs import Stub
from labkit.core.options import duration, named_options, whole
from labkit.core.plan import Plan, Result
from labkit.core.smaller import Compaction, Keys, SmallerKV, chosen
from labkit.runner.base import Done, Layout
from labkit.runner.rows import Rows


def next_token(seed: int, sample_seed: int, context: np.ndarray, vocab_size: int, adapter: str | None = None) -> int:
    """The fake model: a pure function of its seed, the sample's seed, all previous tokens, and what is in the adapter's
    slot."""
    key = f"{seed}:{sample_seed}{'' if adapter is None else f':{adapter}'}".encode()
    digest = blake2b(np.ascontiguousarray(context, np.int32).tobytes(), digest_size=8, key=key[:64]).digest()
    return int.from_bytes(digest, "little") % vocab_size


def state_after(state: bytes, token: int) -> bytes:
    """The fake model's recurrent layer."""
    return blake2b(state + token.to_bytes(4, "little", signed=True), digest_size=8).digest()


@named_options
class FakeRunner:
    """Tokens from a hash of the whole context, read through the block tables.

    >>> FakeRunner(seed=0, vocab_size=256)
    FakeRunner(seed 0, vocab 256, not open)
    """

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 32_000,
        eos_token_id: int | None = None,
        seconds: float = 0.001,
    ) -> None:
        self.seed = whole("seed", seed, least=0)
        self.vocab_size = whole("vocab_size", vocab_size, least=1)
        most = self.vocab_size - 1
        self.eos_token_ids = () if eos_token_id is None else (whole("eos_token_id", eos_token_id, least=0, most=most),)
        self.seconds = duration("seconds", seconds)
        self.disk: dict[bytes, tuple[Stub, np.ndarray]] = {}  # its files; given to another runner they survive it
        self.layout: Layout | None = None

    def __repr__(self) -> str:
        where = "not open" if self.layout is None else f"{self.layout.num_blocks}x{self.layout.block_size}"
        return f"FakeRunner(seed {self.seed}, vocab {self.vocab_size}, {where})"

    def open(self, layout: Layout) -> None:
        if self.layout is not None:
            raise ValueError("this FakeRunner already serves an engine: make another one")
        self.layout = layout
        self.rows = Rows(layout)
        self.positions: dict[int, list[np.ndarray]] = {}  # by row, by group: of keys that were moved
        self.memory = np.full((layout.num_blocks + 1, layout.block_size), -1, np.int32)
        self.host = np.full((layout.num_host_blocks + 1, layout.block_size), -1, np.int32)
        self.states: dict[int, bytes] = {}  # by row, of its recurrent layers: a hash of all tokens so far
        self.kept: dict[int, bytes] = {}  # by slot
        self.path: dict[int, list[bytes]] = {}  # by row: after each of the step's tokens

    def launch(self, plan: Plan) -> Done:
        rows, memory, host = self.rows, self.memory, self.host
        rows.apply(plan)
        for digest in plan.disk.drops:
            self.disk.pop(digest, None)
        for host_block, stub in plan.disk.writes:
            self.disk[stub.digest] = stub, host[host_block].copy()
        for block, host_block in plan.swap_out:
            host[host_block] = memory[block]
        errors = self._compact(plan)
        for source, copy in plan.copies:
            memory[copy] = memory[source]
        read = self._read(plan)
        for host_block, data in plan.arrivals:
            host[host_block] = data.view(np.int32)
        for host_block, block in plan.swap_in:
            memory[block] = host[host_block]
        for slot, row in plan.states.loads:
            self.states[row] = self.kept[slot]
        for entry in range(len(plan.rows)):
            self._write(plan, entry)
            if self.layout is not None and self.layout.num_states is not None:
                self._go_on(plan, entry)
        drawn = self._sample(plan)
        stands, indptr = plan.verify(drawn)
        if self.layout is not None and self.layout.num_states is not None:
            self._settle_states(plan, indptr)
        return Done(Result(drawn[stands], self.seconds, errors or None, indptr=indptr, read=read))

    def check_kv(self, kv: SmallerKV) -> None:
        if kv.queries:
            raise ValueError(f"{kv!r} chooses by attention, and a FakeRunner has none: use a TorchRunner")

    def _compact(self, plan: Plan) -> dict[int, str]:
        """Moves the token ids of kept keys, as a model would move the keys."""
        assert self.layout is not None
        errors = {}
        for join in plan.joins:
            self.positions.pop(join.row, None)
        for compaction in plan.compactions:
            try:
                self._keep(compaction, self.layout.block_size)
            except Exception as error:  # a user's method may raise anything
                errors[compaction.row] = f"kv= failed: {type(error).__name__}: {error}"
        return errors

    def _keep(self, compaction: Compaction, size: int) -> None:
        row, at = compaction.row, compaction.num_tokens
        join = self.rows.joins[row]
        assert join is not None and join.params.kv is not None, f"row {row} is compacted and has no kv"
        before = self.positions.get(row, [np.zeros(0, np.int64)] * len(compaction.keep))
        self.positions[row] = []
        for group, moved in enumerate(before):  # each is one layer
            num_keys, keep, blocks = (column[group] for column in compaction[2:])
            positions = np.concatenate((moved, np.arange(at - num_keys + len(moved), at)))
            (which,) = chosen(join.params.kv, Keys(group, join.num_prompt, at, num_keys, positions[None]), keep, 1)
            kept = self.memory[blocks].reshape(-1)[which]
            places = np.arange(keep)
            self.memory[blocks[places // size], places % size] = kept
            self.positions[row].append(positions[which])

    def block_form(self) -> Form:
        """What must be the same in engines that hand blocks to each other."""
        assert self.layout is not None
        size = self.layout.block_size
        return Form(size, "int32", f"[{size}]", f"fake:{self.seed}:{self.vocab_size}", 4 * size)

    def read_blocks(self, blocks: Sequence[int], *, in_host: bool = False) -> np.ndarray:
        """The bytes of these blocks [blocks, bytes], of the device or of host memory."""
        found = (self.host if in_host else self.memory)[list(blocks)]
        return found.view(np.uint8).reshape(len(blocks), -1)

    def on_disk(self) -> list[Stub]:
        return [stub for stub, _ in self.disk.values()]

    def _read(self, plan: Plan) -> dict[bytes, bool] | None:
        """What comes from disk is there at once."""
        if not plan.disk.reads:
            return None
        for digest, host_block in plan.disk.reads:
            if digest in self.disk:
                self.host[host_block] = self.disk[digest][1]
        return {digest: digest in self.disk for digest, _ in plan.disk.reads}

    def _write(self, plan: Plan, entry: int) -> None:
        assert self.layout is not None
        start = int(plan.start[entry] - self.rows.dropped[plan.rows[entry]])
        places = np.arange(start, start + int(plan.count[entry]))
        size = self.layout.block_size
        tokens = self.rows.inputs(plan, entry)
        for table in self.rows.tables:
            blocks = table[plan.rows[entry], places // size]
            assert blocks.all(), f"row {plan.rows[entry]} writes tokens {places[0]}.. into the scratch block"
            self.memory[blocks, places % size] = tokens

    def _go_on(self, plan: Plan, entry: int) -> None:
        """The row's state takes in the step's tokens."""
        row = int(plan.rows[entry])
        state = self.states[row] if plan.start[entry] else b""
        self.path[row] = []
        for token in self.rows.inputs(plan, entry).tolist():
            state = state_after(state, token)
            self.path[row].append(state)

    def _settle_states(self, plan: Plan, indptr: np.ndarray | None) -> None:
        """States behind the tokens that stand; those of wrong drafts are dropped."""
        right = plan.count.copy()
        if indptr is not None:
            right[: plan.num_decode] = np.diff(indptr)[: plan.num_decode]
        saves: dict[int, list[Save]] = {}
        for save in plan.states.saves:
            saves.setdefault(save.row, []).append(save)
        for row, start, count in zip(plan.rows.tolist(), plan.start.tolist(), right.tolist(), strict=True):
            self.states[row] = self.path[row][count - 1]
            for save in saves.get(row, ()):
                if save.end <= start + count:
                    self.kept[save.slot] = self.path[row][save.end - start - 1]
        for parent, child in plan.states.forks:
            self.states[child] = self.states[parent]

    def _sample(self, plan: Plan) -> np.ndarray:
        assert self.layout is not None
        ends = np.cumsum(plan.count)
        sample, query = plan.draws()
        rows = plan.sample_row[sample]
        tokens = np.zeros(len(rows), np.int32)
        entries = np.searchsorted(ends, query, side="right")
        for i, (entry, row) in enumerate(zip(entries.tolist(), rows.tolist(), strict=True)):
            length = int(plan.start[entry] + plan.count[entry] - (ends[entry] - 1 - query[i]))
            length -= int(self.rows.dropped[plan.rows[entry]])
            context = self._context(int(plan.rows[entry]), length)
            if self.layout.num_states is not None and not self._is_state_of(
                context, self.path[int(plan.rows[entry])][length - int(plan.start[entry]) - 1]
            ):
                context = np.append(context, -1)  # another state, another token
            join = self.rows.joins[row]
            assert join is not None, f"row {row} samples but never joined"
            adapter = None if join.slot is None else self.rows.adapters[join.slot]
            seed = (join.params.seed or 0) + join.sample
            tokens[i] = next_token(self.seed, seed, context, self.vocab_size, adapter)
        self.rows.latest[rows] = tokens
        return tokens

    def _is_state_of(self, context: np.ndarray, found: bytes) -> bool:
        assert self.layout is not None
        if None not in self.layout.windows:
            return True  # the context is not all there is
        state = b""
        for token in context.tolist():
            state = state_after(state, token)
        return found == state

    def _context(self, row: int, length: int) -> np.ndarray:
        """The tokens that the row's layers see: all if a group keeps them, else those in the widest window. Every group
        must hold the tokens in its window. With kv= each group sees tokens of its own: those of all, one after the
        other."""
        assert self.layout is not None
        windows, size = self.layout.windows, self.layout.block_size
        join = self.rows.joins[row]
        if len(windows) > 1 and join is not None and join.params.kv is not None:
            tables, lengths = self.rows.read(np.array([row]), np.array([length]))
            each = zip(tables[:, 0], lengths[:, 0].tolist(), strict=True)
            return np.concatenate([self.memory[table[: -(-n // size)]].reshape(-1)[:n] for table, n in each])
        seen = [
            self.memory[table[row, : -(-length // size)]].reshape(-1)[max(0, length - (window or length)) : length]
            for table, window in zip(self.rows.tables, windows, strict=True)
        ]
        context = max(seen, key=len)
        for part, window in zip(seen, windows, strict=True):
            same = np.array_equal(part, context[len(context) - len(part) :])
            assert same, f"row {row}: the layers with window {window} read other tokens than the rest"
        return context
