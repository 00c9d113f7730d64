"""A runner that computes: a model over a paged KV cache, and a sampler. It does not depend on the scheduler.

A step is one forward over all of a plan's tokens, decode rows and prefill chunks together. Read `launch` first.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels import copy_blocks, generation, swap_blocks
from labkit_kernels import sample as sample_op
from torch import Tensor

from labkit.core.blocks.tiers import Stub
from labkit.core.options import flag, named_options, real, whole
from labkit.core.plan import Plan
from labkit.models.base import Batch, Capture, KVCache, Model
from labkit.runner.base import Done, Layout, Pending
from labkit.runner.computed import Computed, on_its_way
from labkit.runner.disk import DiskStore, fingerprint
from labkit.runner.extras import capture_of, extras_of, wants_prompt
from labkit.runner.graphs import FED, GIVEN, KEY, POSITION, ROW, SLOT, Graphs
from labkit.runner.groups import by_window, one_group
from labkit.runner.memory import BlockStore, available_memory, bytes_per_block, kv_dtype, make_caches
from labkit.runner.repeats import Repeats
from labkit.runner.rows import Rows
from labkit.sampling.sampler import Drawn, Sampler
from labkit.transfer import put


@named_options
class TorchRunner:
    """Runs plans on a model.

    >>> import labkit as lk
    >>> runner = lk.TorchRunner(lk.load_model(lk.assets.path("tiny")))
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    >>> eng = lk.Engine(scheduler=sched, runner=runner)
    """

    def __init__(
        self,
        model: Model,
        *,
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        graphs: bool | None = None,
        hybrid_kv: bool = False,
        kv_cache_dtype: str = "auto",
        kv_disk_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """`graphs`: replay captured decode steps. None means yes on a GPU, for models that can be captured; on a CPU it
        means that the layers' C++ calls are recorded and repeated. False means neither.
        `hybrid_kv`: layers with a sliding window keep only the window's blocks; steps with several groups are not
        captured. `kv_cache_dtype`: "fp8_e4m3" (or "fp8"), "fp8_e5m2" and "int8" store keys and values in 8 bits, with a
        scale for each token and head. `kv_disk_path` is the folder of blocks that a `BlockManager` with
        `num_disk_blocks` offloads; files in it are found again by later engines of the same model."""
        self.model, self.device = model, model.device
        self.kv_dtype = kv_dtype(model, kv_cache_dtype)
        if graphs is not None:
            flag("graphs", graphs)
        self.graphs: Graphs | None = None
        self.repeats: Repeats | None = None
        self.groups = by_window(model.kv) if flag("hybrid_kv", hybrid_kv) else one_group(model.kv)
        self._wants_graphs = (
            model.capturable and not hybrid_kv and (model.device.type == "cuda" if graphs is None else graphs)
        )
        self._wants_repeats = (
            graphs is None and self.device.type == "cpu" and model.capturable and hasattr(model, "through")
        )
        self.vocab_size = model.vocab_size
        self.eos_token_ids = tuple(whole("eos_token_ids", i, least=0, most=model.vocab_size - 1) for i in eos_token_ids)
        self.seed = whole("seed", seed, least=0)
        self.embedding_size = getattr(model, "embedding_size", None)
        self.largest_input = torch.finfo(model.dtype).max
        self.kv_disk_path = kv_disk_path
        self.disk: DiskStore | None = None
        self.layout: Layout | None = None
        self.store = self.host = BlockStore([])
        self._generation = -1

    def __repr__(self) -> str:
        if "model" not in vars(self):
            return "TorchRunner(closed)"
        where = "not open"
        if self.layout is not None:
            num, size = self.layout.num_blocks, self.layout.block_size
            where = f"{num}x{size}, {num * self.bytes_per_block(size) / 2**20:.0f} MiB of keys and values"
            where += "" if self.kv_dtype == self.model.dtype else f" in {str(self.kv_dtype)[6:]}"
            where += "" if self.graphs is None else f", {self.graphs!r}"
        return f"TorchRunner({self.model.name} on {self.device}, {str(self.model.dtype)[6:]}, {where})"

    # -- memory --------------------------------------------------------------------------------------------------

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes per block: keys and values of all layers in a group, with their scales."""
        return bytes_per_block(self.model, self.groups, self.kv_dtype, block_size)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group of layers, as `BlockManager` takes it."""
        return self.groups.windows

    def fitting_blocks(self, block_size: int, utilization: float, most_tokens: int, most_rows: int) -> int:
        """How many blocks fit into `utilization` of the memory, besides the weights and a step of `most_tokens`."""
        real("gpu_memory_utilization", utilization, least=0.0, most=1.0, open_left=True)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            budget = free - (1 - utilization) * total - self._peak(most_tokens, most_rows)
        else:
            budget = utilization * available_memory()
        blocks = int(budget // self.bytes_per_block(block_size))
        if blocks < 1:
            raise ValueError(
                f"no memory is left for keys and values: {utilization:.0%} of it are used up by the weights and a step "
                f"of {most_tokens} tokens; raise gpu_memory_utilization or lower max_num_batched_tokens"
            )
        return blocks

    def _peak(self, most_tokens: int, most_rows: int) -> int:
        """Peak bytes of the largest step beyond what is allocated now, measured on a scratch cache."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        caches = make_caches(self.model, one_group(self.model.kv), self.kv_dtype, 2, 16, self.device)
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
        if layout.windows != self.windows:
            raise ValueError(
                f"the BlockManager was made for windows {layout.windows}, the layers of this runner have "
                f"{self.windows}: make it with windows=runner.windows"
            )
        self.layout = layout
        self.rows = Rows(layout)
        self.store, self.host = self._stores(layout)
        self.sampler = Sampler(self.vocab_size, layout.num_rows, self.eos_token_ids, self.seed, self.device)
        self.latest = torch.zeros(layout.num_rows + 1, dtype=torch.int64, device=self.device)  # and one for padding
        self._asking = np.zeros(layout.num_rows, bool)  # rows that want prompt logprobs or captured layers
        self._embedded = np.zeros(layout.num_rows, np.int64)  # positions before it may have embeddings
        if layout.num_disk_blocks:
            if self.kv_disk_path is None:
                raise ValueError("num_disk_blocks needs a folder: give the TorchRunner a kv_disk_path")
            name = fingerprint(self.model, self.kv_dtype, layout.block_size)
            self.disk = DiskStore(self.kv_disk_path, name, self.host.flat)
        self._make_repeated()

    def on_disk(self) -> list[Stub]:
        """The blocks of this model in `kv_disk_path`, the longest unused first."""
        return [] if self.disk is None else self.disk.scan()

    def _make_repeated(self) -> None:
        """What repeats steps, if anything does. It knows where this runner's tensors lie."""
        if self.layout is None:
            return
        if self._wants_graphs:
            size, rows = self.layout.block_size, self.layout.num_rows
            self.graphs = Graphs(self.model, self.store.caches, self.sampler, self.latest, size, rows)
        if self._wants_repeats:
            self.repeats = Repeats(self.model, self.caches)  # type: ignore[arg-type]

    @torch.inference_mode()
    def capture_all(self, most_tokens: int) -> None:
        """Capture decode steps for every number of rows, with contexts up to `most_tokens`. Does nothing if steps are
        not captured."""
        if self.graphs is not None and self.layout is not None:
            self._pick()
            self.graphs.capture(self.layout.num_rows, -(-most_tokens // self.layout.block_size), self._sample)

    def _stores(self, layout: Layout) -> tuple[BlockStore, BlockStore]:
        cpu, pinned = torch.device("cpu"), self.device.type == "cuda"
        kind, size = (self.model, self.groups, self.kv_dtype), layout.block_size
        here = make_caches(*kind, layout.num_blocks + 1, size, self.device)
        if not layout.num_host_blocks:
            return BlockStore(here), BlockStore([])
        return BlockStore(here), BlockStore(make_caches(*kind, layout.num_host_blocks + 1, size, cpu, pinned))

    @property
    def caches(self) -> list[KVCache]:
        """Caches by layer. Layers of different groups share memory, but never blocks."""
        return [self.store.caches[place] for place in self.groups.place_of] if self.store.caches else []

    @property
    def num_layers(self) -> int:
        return len(self.model.kv)

    def memory_parts(self) -> list[tuple[str, Tensor]]:
        """Every tensor that must be freed by closing."""
        kv = [("kv", tensor) for tensor in (*self.store.flat, *self.host.flat)]
        return [*kv, *(("weights", tensor) for tensor in self.model.tensors())]

    def close(self) -> None:
        """Release the cache and the model; the runner cannot be used afterwards."""
        if self.disk is not None:
            self.disk.close()
            self.disk = None
        self.store, self.host, self.layout = BlockStore([]), BlockStore([]), None
        self.graphs = self.repeats = None
        for name in ("model", "sampler", "rows", "latest"):
            vars(self).pop(name, None)

    # -- snapshots: the model is shared, everything else is state ------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self.layout is not None:
            self.sampler.settle()  # an event cannot be copied
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("model", "_sample", "graphs", "repeats", "disk")
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchRunner:
        other = object.__new__(TorchRunner)
        memo[id(self)] = other
        state = copy.deepcopy(self.__getstate__(), memo)
        other.model = self.model
        other.store, other.host = self._stores(self.layout) if self.layout else (BlockStore([]), BlockStore([]))
        other.__setstate__(state | {"_generation": -1})
        other.graphs = other.repeats = other.disk = None
        other._make_repeated()
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("store", "host"):
            getattr(self, name).load(state[name])
        vars(self).update({name: value for name, value in state.items() if name not in ("store", "host")})
        if "graphs" in vars(self):  # what there was reads the tensors that were replaced
            self._make_repeated()

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
        capture = capture_of(wanted)
        hidden = self._forward(inputs.batch, capture)  # [tokens, hidden size]
        drawn = self._draw(plan, inputs, hidden)
        extras = extras_of(self.model, plan, inputs.query_start, hidden, wanted, capture) if wanted else {}
        names = [join and join.request for join in self.rows.joins] if drawn and drawn.logprobs else []
        return self._pending(Computed(plan, on_its_way(drawn), drawn, extras, names, begin, self.device))

    def _pending(self, computed: Computed) -> Pending:
        if self.disk is not None:
            computed.read = self.disk.done(wait=not len(computed.plan.rows))
        return computed if self.device.type == "cuda" else Done(computed.result())

    def _forward(self, batch: Batch, capture: Capture | None) -> Tensor:
        if self.repeats is not None and capture is None:
            return self.repeats.forward(batch)
        return self.model.forward(batch, self.caches, capture)

    def _pick(self) -> None:
        """Pick ops again, after a variant was put in use or removed."""
        if self._generation != generation():
            self._generation = generation()
            self._sample = sample_op.pick(self.device, torch.float32, vocab=self.vocab_size)
            self.model.refresh_ops()
            for repeated in (self.graphs, self.repeats):
                if repeated is not None:
                    repeated.forget()

    def _can_replay(self, plan: Plan) -> bool:
        """Whether the step has only decode rows, each with one sample and no special parameters."""
        rows = plan.rows
        return bool(
            len(rows)
            and plan.num_decode == len(rows) == len(plan.sample_row)
            and not len(plan.drafts)
            and (plan.sample_row == rows).all()
            and self.sampler.plain[rows].all()
            and not self._asking[rows].any()
            and not (plan.start < self._embedded[rows]).any()
        )

    def _replay(self, graphs: Graphs, plan: Plan, begin: float) -> Pending:
        assert self.layout is not None
        rows, start, size = plan.rows, plan.start, self.layout.block_size
        index, place = np.divmod(start, size)
        blocks = self.rows.tables[0, rows, index]
        self.store.touched[blocks] = True
        columns = np.zeros((7, len(rows)), np.int64)
        columns[FED, plan.feed] = 1
        columns[GIVEN, columns[FED] == 0] = plan.tokens
        columns[POSITION], columns[SLOT], columns[ROW] = start, blocks * size + place, rows
        columns[KEY] = self.sampler.keys(rows, start + 1)
        table = self.rows.tables[0, rows, : int(index.max()) + 1]
        out = graphs.run(columns, table, self._sample)[:, : len(rows)]
        return self._pending(Computed(plan, out, None, {}, [], begin, self.device))

    def _apply(self, plan: Plan) -> None:
        if plan.reset:
            self.sampler.reset()
        for row in plan.leaves:
            self.sampler.leave(row)
        self.rows.apply(plan)
        self.sampler.join(plan.joins)
        for join in plan.joins:
            self._asking[join.row] = bool(join.params.capture) or join.params.prompt_logprobs is not None
            ends = (span.end for span in join.spans if span.embeddings is not None)
            self._embedded[join.row] = max(ends, default=0)
        if self.disk is not None:
            self.disk.write_all(plan, self.device)
        if len(plan.swap_out):
            self._swap(self.store, self.host, plan.swap_out)
        if len(plan.copies):
            pairs = self._put(plan.copies)
            self.store.touched[plan.copies[:, 1]] = True
            copy_blocks(self.store.flat, pairs)
        if self.disk is not None:
            for digest, host_block in plan.disk.reads:
                self.host.touched[host_block] = True
                self.disk.read(digest, host_block)
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
        blocks = self.rows.tables[:, rows[entry], index]  # [groups, tokens]
        self.store.touched[blocks] = True
        slots = blocks * size + place
        seq_len = start + count
        longest = int(seq_len.max()) if len(rows) else 0
        tables = self.rows.tables[:, rows, : max(1, -(-longest // size))].astype(np.int32)
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
            slots=self._put(slots[0]),
            block_table=self._put(tables[0]),
            query_start=self._put(query_start.astype(np.int32)),
            seq_len=self._put(seq_len.astype(np.int32)),
            max_query_len=int(count.max()) if len(rows) else 0,
            max_seq_len=longest,
            group_of=self.groups.group_of if len(tables) > 1 else (),
            other_groups=tuple((self._put(slots[i]), self._put(tables[i])) for i in range(1, len(tables))),
            embeddings=self._embeddings(plan, query_start),
        )
        return _Inputs(batch, query_start)

    def _embeddings(self, plan: Plan, query_start: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """Inputs of this step that a request brings along: which of the step's tokens they are for, and they."""
        places, values = [], []
        for entry in (plan.start < self._embedded[plan.rows]).nonzero()[0].tolist():
            start, join = int(plan.start[entry]), self.rows.joins[plan.rows[entry]]
            for span in join.spans if join is not None else ():
                begin, end = max(span.start, start), min(span.end, start + int(plan.count[entry]))
                if span.embeddings is not None and begin < end:
                    places.append(np.arange(begin, end) + query_start[entry] - start)
                    values.append(span.embeddings[begin - span.start : end - span.start])
        if not places:
            return None
        return self._put(np.concatenate(places)), self._put(np.concatenate(values)).to(self.model.dtype)

    def _put(self, array: np.ndarray) -> Tensor:
        return put(array, self.device)

    def _draw(self, plan: Plan, inputs: _Inputs, hidden: Tensor) -> Drawn | None:
        if not len(plan.sample_row):
            return None
        sample, queries = plan.draws()
        rows, inverse = plan.sample_row[sample], None
        entries = np.searchsorted(inputs.query_start, queries, side="right") - 1
        known = plan.start[entries] + queries - inputs.query_start[entries] + 1
        if plan.num_decode < len(plan.rows):  # n samples may share a query
            queries, inverse = np.unique(queries, return_inverse=True)
        hidden, again = hidden[self._put(queries)], None
        if inverse is not None and len(inverse) > len(queries):
            again = self._put(inverse)
        found = self.model.greedy(hidden) if self.sampler.greedy[rows].all() else None
        if found is not None:
            tokens, chosen = found if again is None else (found[0][again], found[1][again])
            self.latest[self._put(rows)] = tokens
            return Drawn(tokens, chosen, {})
        logits = self.model.logits(hidden)
        if again is not None:
            logits = logits[again]
        drawn = self.sampler.draw(logits, rows, known, self._sample)
        self.latest[self._put(rows)] = drawn.tokens
        return drawn

    # -- prompt logprobs and captured layers ---------------------------------------------------------------------

    def _wanted(self, plan: Plan) -> list[tuple[int, Any]]:
        """(entry, join) of rows that want prompt logprobs or captured layers."""
        found = []
        for entry in self._asking[plan.rows].nonzero()[0].tolist():
            join = self.rows.joins[plan.rows[entry]]
            if join is not None and (join.params.capture or wants_prompt(plan, entry, join)):
                found.append((entry, join))
        return found


class _Inputs(NamedTuple):
    batch: Batch
    query_start: np.ndarray  # [entries + 1]
