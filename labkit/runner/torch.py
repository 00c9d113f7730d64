"""A runner that computes: a model over a paged cache, and a sampler. Knows tensors and plans; refuses to know who is
scheduled and why.

A step is one forward over all of a plan's tokens, decode rows and prefill chunks alike. Read `launch` first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels import copy_blocks, generation, pages, swap_blocks
from labkit_kernels import sample as sample_op
from torch import Tensor

from labkit.core.options import flag, named_options, real, whole
from labkit.core.plan import Extras, Plan, Result, TokenLogprobs
from labkit.models.base import Batch, Capture, KVCache, Model
from labkit.runner.base import Done, Layout, Pending
from labkit.runner.graphs import FED, GIVEN, KEY, POSITION, ROW, SLOT, Graphs
from labkit.runner.rows import Rows
from labkit.sampling.sampler import Drawn, Sampler, logprobs_of
from labkit.transfer import fetch, put

MOST_LOGITS = 2**26  # entries of a matrix of prompt logits computed at once


@named_options
class TorchRunner:
    """Runs plans on a model.

    >>> import labkit as lk
    >>> runner = lk.TorchRunner(lk.load_model(lk.assets.path("tiny")))
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    >>> eng = lk.Engine(scheduler=sched, runner=runner)
    """

    def __init__(
        self, model: Model, *, eos_token_ids: Sequence[int] = (), seed: int = 0, graphs: bool | None = None
    ) -> None:
        """`graphs`: replay captured decode steps; None is yes on a GPU, for models that can be captured."""
        self.model = model
        if graphs is not None:
            flag("graphs", graphs)
        self.graphs: Graphs | None = None
        self._wants_graphs = model.capturable and (model.device.type == "cuda" if graphs is None else graphs)
        self.vocab_size = model.vocab_size
        self.eos_token_ids = tuple(whole("eos_token_ids", i, least=0, most=model.vocab_size - 1) for i in eos_token_ids)
        self.seed = whole("seed", seed, least=0)
        self.device = model.device
        self.layout: Layout | None = None
        self.store = self.host = BlockStore([])
        self._generation = -1

    def __repr__(self) -> str:
        if "model" not in vars(self):
            return "TorchRunner(closed)"
        where = "not open"
        if self.layout is not None:
            size = self.bytes_per_block(self.layout.block_size) * self.layout.num_blocks
            where = f"{self.layout.num_blocks}x{self.layout.block_size}, {size / 2**20:.0f} MiB of keys and values"
            where += "" if self.graphs is None else f", {self.graphs!r}"
        return f"TorchRunner({self.model.name} on {self.device}, {str(self.model.dtype)[6:]}, {where})"

    # -- memory --------------------------------------------------------------------------------------------------

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that all layers' keys and values of one block take."""
        size = self.model.dtype.itemsize
        return sum(spec.num_heads * (spec.key_size + spec.value_size) for spec in self.model.kv) * block_size * size

    def fitting_blocks(self, block_size: int, utilization: float, most_tokens: int, most_rows: int) -> int:
        """How many blocks fit into `utilization` of the memory beside the weights and a step of `most_tokens`."""
        real("gpu_memory_utilization", utilization, least=0.0, most=1.0, open_left=True)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            budget = free - (1 - utilization) * total - self._peak(most_tokens, most_rows)
        else:
            budget = utilization * _available_memory()
        blocks = int(budget // self.bytes_per_block(block_size))
        if blocks < 1:
            raise ValueError(
                f"no memory is left for keys and values: {utilization:.0%} of it are used up by the weights and a step "
                f"of {most_tokens} tokens; raise gpu_memory_utilization or lower max_num_batched_tokens"
            )
        return blocks

    def _peak(self, most_tokens: int, most_rows: int) -> int:
        """Bytes that the largest step takes beside what is allocated now, by trying it on a scratch cache."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        caches = _caches(self.model, 2, 16, self.device)
        ids = torch.zeros(most_tokens, dtype=torch.int64, device=self.device)
        each = torch.ones(most_tokens, dtype=torch.int32, device=self.device)
        starts = torch.arange(most_tokens + 1, dtype=torch.int32, device=self.device)
        batch = Batch(ids, ids, ids, each[:, None] * 0, starts, each, 1, 1)
        with torch.inference_mode():
            hidden = self.model.forward(batch, caches)
            self.model.logits(hidden[:most_rows])
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def open(self, layout: Layout) -> None:
        if self.layout is not None:
            raise ValueError("this TorchRunner already serves an engine: close that one, or make another runner")
        self.layout = layout
        self.rows = Rows(layout)
        self.store, self.host = self._stores(layout)
        self.sampler = Sampler(self.vocab_size, layout.num_rows, self.eos_token_ids, self.seed, self.device)
        self.latest = torch.zeros(layout.num_rows + 1, dtype=torch.int64, device=self.device)  # and one for padding
        self._asking = np.zeros(layout.num_rows, bool)  # rows that want prompt logprobs or a look inside
        if self._wants_graphs:
            self.graphs = self._make_graphs()

    def _make_graphs(self) -> Graphs:
        assert self.layout is not None
        size, rows = self.layout.block_size, self.layout.num_rows
        return Graphs(self.model, self.store.caches, self.sampler, self.latest, size, rows)

    def _stores(self, layout: Layout) -> tuple[BlockStore, BlockStore]:
        cpu, pinned = torch.device("cpu"), self.device.type == "cuda"
        here = _caches(self.model, layout.num_blocks + 1, layout.block_size, self.device)
        if not layout.num_host_blocks:
            return BlockStore(here), BlockStore([])
        there = _caches(self.model, layout.num_host_blocks + 1, layout.block_size, cpu, pinned)
        return BlockStore(here), BlockStore(there)

    @property
    def caches(self) -> list[KVCache]:
        return self.store.caches

    @property
    def num_layers(self) -> int:
        return len(self.model.kv)

    def memory_parts(self) -> list[tuple[str, Tensor]]:
        """Every tensor that must be gone after closing."""
        kv = [("kv", tensor) for tensor in (*self.store.flat, *self.host.flat)]
        return [*kv, *(("weights", tensor) for tensor in self.model.tensors())]

    def close(self) -> None:
        """Let go of the cache and the model; the runner is of no further use."""
        self.store, self.host, self.layout, self.graphs = BlockStore([]), BlockStore([]), None, None
        for name in ("model", "sampler", "rows", "latest"):
            vars(self).pop(name, None)

    # -- time travel: the model is shared, everything else is state ----------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("model", "_sample", "graphs")}

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchRunner:
        other = object.__new__(TorchRunner)
        memo[id(self)] = other
        state = copy.deepcopy(self.__getstate__(), memo)
        other.model = self.model
        other.store, other.host = self._stores(self.layout) if self.layout else (BlockStore([]), BlockStore([]))
        other.__setstate__(state | {"_generation": -1})
        other.graphs = other._make_graphs() if self.graphs is not None else None
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("store", "host"):
            getattr(self, name).load(state[name])
        vars(self).update({name: value for name, value in state.items() if name not in ("store", "host")})
        if vars(self).get("graphs") is not None:
            self.graphs = self._make_graphs()  # the old ones read the tensors that were replaced

    # -- a step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        begin = time.perf_counter()
        self._pick()
        self._apply(plan)
        if self.graphs is not None and self._can_replay(plan):
            return self._replay(self.graphs, plan, begin)
        inputs = self._inputs(plan)
        wanted = self._wanted(plan)
        capture = _capture_of(wanted)
        hidden = self.model.forward(inputs.batch, self.caches, capture)  # [tokens, hidden size]
        drawn = self._draw(plan, inputs, hidden)
        extras = self._extras(plan, inputs, hidden, wanted, capture) if wanted else {}
        names = [join and join.request for join in self.rows.joins] if drawn and drawn.logprobs else []
        pending = _Computed(plan, _on_its_way(drawn), drawn, extras, names, begin, self.device)
        return pending if self.device.type == "cuda" else Done(pending.result())

    def _pick(self) -> None:
        """Ask the registry again after a variant was put in use, or taken out."""
        if self._generation != generation():
            self._generation = generation()
            self._sample = sample_op.pick(self.device, torch.float32, vocab=self.vocab_size)
            self.model.refresh_ops()
            if self.graphs is not None:
                self.graphs.forget()

    def _can_replay(self, plan: Plan) -> bool:
        """Decode rows only, each with one draw that wants nothing special."""
        rows = plan.rows
        return bool(
            len(rows)
            and plan.num_decode == len(rows) == len(plan.sample_row)
            and (plan.sample_row == rows).all()
            and self.sampler.plain[rows].all()
            and not self._asking[rows].any()
        )

    def _replay(self, graphs: Graphs, plan: Plan, begin: float) -> Pending:
        assert self.layout is not None
        rows, start, size = plan.rows, plan.start, self.layout.block_size
        index, place = np.divmod(start, size)
        blocks = self.rows.tables[rows, index]
        self.store.touched[blocks] = True
        columns = np.zeros((7, len(rows)), np.int64)
        columns[FED, plan.feed] = 1
        columns[GIVEN, columns[FED] == 0] = plan.tokens
        columns[POSITION], columns[SLOT], columns[ROW] = start, blocks * size + place, rows
        columns[KEY] = self.sampler.keys(rows, start + 1)
        table = self.rows.tables[rows, : int(index.max()) + 1]
        out = graphs.run(columns, table, self._sample)[:, : len(rows)]
        pending = _Computed(plan, out, None, {}, [], begin, self.device)
        return pending if self.device.type == "cuda" else Done(pending.result())

    def _apply(self, plan: Plan) -> None:
        if plan.reset:
            self.sampler.reset()
        for row in plan.leaves:
            self.sampler.leave(row)
        self.rows.apply(plan)
        self.sampler.join(plan.joins)
        for join in plan.joins:
            self._asking[join.row] = bool(join.params.capture) or join.params.prompt_logprobs is not None
        if len(plan.swap_out):
            self._swap(self.store, self.host, plan.swap_out)
        if len(plan.copies):
            pairs = self._put(plan.copies)
            self.store.touched[plan.copies[:, 1]] = True
            copy_blocks(self.store.flat, pairs)
        if len(plan.swap_in):
            self._swap(self.host, self.store, plan.swap_in)

    @staticmethod
    def _swap(source: BlockStore, target: BlockStore, pairs: np.ndarray) -> None:
        target.touched[pairs[:, 1]] = True
        swap_blocks(source.flat, target.flat, torch.from_numpy(pairs))

    def _inputs(self, plan: Plan) -> _Inputs:
        """The plan's columns as one batch of tensors."""
        assert self.layout is not None
        size, rows, start, count = self.layout.block_size, plan.rows, plan.start, plan.count
        query_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(count, out=query_start[1:])
        total = int(query_start[-1])
        if total == len(rows):  # decode only
            entry, positions = slice(None), start
        else:
            entry = np.repeat(np.arange(len(rows)), count)
            positions = np.arange(total) - query_start[:-1][entry] + start[entry]
        index, place = np.divmod(positions, size)
        blocks = self.rows.tables[rows[entry], index]
        self.store.touched[blocks] = True
        slots = blocks * size + place
        seq_len = start + count
        longest = int(seq_len.max()) if len(rows) else 0
        table = self.rows.tables[rows, : max(1, -(-longest // size))]
        ids = np.zeros(total, np.int64)
        feed = plan.feed
        if len(feed):
            given = np.ones(total, bool)
            given[query_start[feed]] = False
            ids[given] = plan.tokens
        else:
            ids[:] = plan.tokens
        token_ids = self._put(ids)
        if len(feed):
            token_ids[self._put(query_start[feed])] = self.latest[self._put(rows[feed])]
        batch = Batch(
            token_ids=token_ids,
            positions=self._put(positions),
            slots=self._put(slots),
            block_table=self._put(table.astype(np.int32)),
            query_start=self._put(query_start.astype(np.int32)),
            seq_len=self._put(seq_len.astype(np.int32)),
            max_query_len=int(count.max()) if len(rows) else 0,
            max_seq_len=longest,
        )
        return _Inputs(batch, query_start, seq_len)

    def _put(self, array: np.ndarray) -> Tensor:
        return put(array, self.device)

    def _draw(self, plan: Plan, inputs: _Inputs, hidden: Tensor) -> Drawn | None:
        if not len(plan.sample_row):
            return None
        queries, inverse = plan.sample_query, None
        if plan.num_decode < len(plan.rows):  # n samples may share a query
            queries, inverse = np.unique(queries, return_inverse=True)
        hidden, again = hidden[self._put(queries)], None
        if inverse is not None and len(inverse) > len(queries):
            again = self._put(inverse)
        found = self.model.greedy(hidden) if self.sampler.greedy[plan.sample_row].all() else None
        if found is not None:
            tokens, chosen = found if again is None else (found[0][again], found[1][again])
            self.latest[self._put(plan.sample_row)] = tokens
            return Drawn(tokens, chosen, {})
        logits = self.model.logits(hidden)
        if again is not None:
            logits = logits[again]
        entries = np.searchsorted(inputs.query_start, plan.sample_query, side="right") - 1
        drawn = self.sampler.draw(logits, plan.sample_row, inputs.seq_len[entries], self._sample)
        self.latest[self._put(plan.sample_row)] = drawn.tokens
        return drawn

    # -- what some requests want beside tokens -------------------------------------------------------------------

    def _wanted(self, plan: Plan) -> list[tuple[int, Any]]:
        """(entry, join) of rows that want prompt logprobs or a look inside."""
        found = []
        for entry in self._asking[plan.rows].nonzero()[0].tolist():
            join = self.rows.joins[plan.rows[entry]]
            if join is not None and (join.params.capture or self._wants_prompt(plan, entry, join)):
                found.append((entry, join))
        return found

    @staticmethod
    def _wants_prompt(plan: Plan, entry: int, join: Any) -> bool:
        return join.params.prompt_logprobs is not None and int(plan.start[entry]) < join.num_prompt - 1

    def _extras(
        self, plan: Plan, inputs: _Inputs, hidden: Tensor, wanted: list[tuple[int, Any]], capture: Capture | None
    ) -> dict[str, Extras]:
        found = {}
        for entry, join in wanted:
            begin, end = int(inputs.query_start[entry]), int(inputs.query_start[entry + 1])
            start = int(plan.start[entry])
            prompt = None
            if self._wants_prompt(plan, entry, join):
                prompt = self._prompt_logprobs(hidden[begin:end], start, join)
            captured = _captured(capture, join.params.capture, entry, begin, end, start) if capture else None
            found[join.request] = Extras(None, prompt, captured)
        return found

    def _prompt_logprobs(self, hidden: Tensor, start: int, join: Any) -> dict[int, TokenLogprobs]:
        """Of the prompt's tokens that follow positions start .. start + len(hidden)."""
        end = min(start + len(hidden), join.num_prompt - 1)
        targets = torch.from_numpy(join.tokens[start + 1 : end + 1].astype(np.int64)).to(self.device)
        wanted, found = join.params.prompt_logprobs, {}
        piece = max(1, MOST_LOGITS // self.vocab_size)
        for first in range(0, end - start, piece):
            of = targets[first : first + piece]
            logits = self.model.logits(hidden[first : first + len(of)])
            lines = list(range(start + 1 + first, start + 1 + first + len(of)))
            found |= logprobs_of(logits, of, [wanted] * len(of), lines).by_row()
        return found


class SavedBlocks(NamedTuple):
    """The blocks that had been written at some moment, and their contents."""

    index: np.ndarray
    kept: list[Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        return self


class BlockStore:
    """Keys and values of all layers, and which blocks were ever written: a copy holds only those."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches
        self.flat = [tensor for pair in caches for tensor in pair]
        self.touched = np.zeros(len(self.flat[0]) if caches else 0, bool)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        index = self.touched.nonzero()[0]
        return SavedBlocks(index, [tensor[torch.from_numpy(index)] for tensor in self.flat])

    def load(self, saved: SavedBlocks) -> None:
        for tensor, kept in zip(self.flat, saved.kept, strict=True):
            tensor[torch.from_numpy(saved.index)] = kept
        self.touched[:] = False
        self.touched[saved.index] = True


class _Inputs(NamedTuple):
    batch: Batch
    query_start: np.ndarray  # [entries + 1]
    seq_len: np.ndarray  # [entries]


def _on_its_way(drawn: Drawn | None) -> Tensor | None:
    """Tokens and their logits [2, samples], on the host when the device has come that far."""
    return None if drawn is None else fetch(torch.stack((drawn.tokens.double(), drawn.chosen.double())))


class _Computed:
    """A launched step. On a GPU its tokens travel to the host while the next step is prepared."""

    def __init__(
        self, plan: Plan, host: Tensor | None, drawn: Drawn | None, extras: dict[str, Extras], names: list[str | None],
        begin: float, device: torch.device,
    ) -> None:  # fmt: skip
        self.plan, self.host, self.drawn, self.extras, self.names = plan, host, drawn, extras, names
        self.begin = begin
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record()

    def result(self) -> Result:
        if self.event is not None:
            self.event.synchronize()
        if self.host is None:
            return Result(np.zeros(0, np.int32), time.perf_counter() - self.begin, None, self.extras or None)
        tokens, chosen = self.host.numpy()
        rows = self.plan.sample_row
        errors = dict(self.drawn.errors) if self.drawn is not None else {}
        for row, value in zip(rows.tolist(), chosen.tolist(), strict=True) if not np.isfinite(chosen).all() else ():
            if value == float("-inf"):
                errors.setdefault(row, "every token is forbidden: masks, bias or a logits processor left none")
            elif value != value:
                errors.setdefault(row, "the model gave nan for its next token")
        extras = dict(self.extras)
        if self.drawn is not None and self.drawn.logprobs is not None:
            for row, logprobs in self.drawn.logprobs.by_row().items():
                name = self.names[row]
                assert name is not None
                extras[name] = extras.get(name, Extras())._replace(logprobs=logprobs)
        seconds = time.perf_counter() - self.begin
        return Result(tokens.astype(np.int32), seconds, errors or None, extras or None)


def _caches(
    model: Model, num_blocks: int, block_size: int, device: torch.device, pinned: bool = False
) -> list[KVCache]:
    """Zeroed (nan in a place never written would poison a product with 0)."""

    def zeros(*shape: int) -> Tensor:
        if device.type != "cpu" or pinned:
            return torch.zeros(shape, dtype=model.dtype, device=device, pin_memory=pinned)
        return pages.zeros(shape, model.dtype)

    return [
        (
            zeros(num_blocks, spec.num_heads, block_size, spec.key_size),
            zeros(num_blocks, spec.num_heads, block_size, spec.value_size),
        )
        for spec in model.kv
    ]


def _available_memory() -> int:
    """Bytes that a new process may take without swapping, as the system says."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _capture_of(wanted: list[tuple[int, Any]]) -> Capture | None:
    layers: dict[str, set[int]] = {"hidden": set(), "attention": set()}
    for _, join in wanted:
        for what, which in join.params.capture.items() if join.params.capture else ():
            layers[what] |= set(which)
    if not any(layers.values()):
        return None
    return Capture(frozenset(layers["hidden"]), frozenset(layers["attention"]))


def _captured(
    capture: Capture, asked: dict[str, Any] | None, entry: int, begin: int, end: int, start: int
) -> dict[tuple[str, int], tuple[int, Any]]:
    asked = asked or {}
    hidden = {("hidden", i): (start, capture.hidden[i][begin:end].float().cpu()) for i in asked.get("hidden", ())}
    attention = {("attention", i): (start, capture.attention[i][entry].cpu()) for i in asked.get("attention", ())}
    return hidden | attention
