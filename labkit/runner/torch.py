"""A runner that computes: a model over a paged KV cache, and a sampler. It does not depend on the scheduler.

A step is one forward over all of a plan's tokens, decode rows and prefill chunks together. Read `launch` first.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from labkit_kernels import copy_blocks, generation
from labkit_kernels import sample as sample_op
from torch import Tensor

from labkit.core.blocks.stubs import Stub
from labkit.core.options import flag, named_options, real, whole
from labkit.core.params import SamplingParams
from labkit.core.plan import Plan
from labkit.core.smaller import SmallerKV
from labkit.models.base import Batch, Capture, KVCache, Model, num_layers_of, states_of
from labkit.models.eagle import EagleHead
from labkit.runner.asleep import Sleeps
from labkit.runner.base import Done, Layout, Pending
from labkit.runner.compactor import Compactor, refuse, rope_tables
from labkit.runner.computed import Computed, on_its_way
from labkit.runner.disk import DiskStore, fingerprint
from labkit.runner.drafter import Drafter, check_draft, draft_bytes
from labkit.runner.edits import Edits
from labkit.runner.extras import capture_of, captured, check_shown, prompts_of, wanted_of
from labkit.runner.features import MOST_BYTES, features_of
from labkit.runner.graphs import Graphs
from labkit.runner.groups import groups_of_model, one_group
from labkit.runner.handing import Hands
from labkit.runner.heads import HeadDrafter
from labkit.runner.inputs import draw, draw_from, draws_of, inputs_of
from labkit.runner.memory import BlockStore, blocks_in, bytes_per_block, kv_dtype, make_caches, memory_for_blocks
from labkit.runner.pooling import pooled_step
from labkit.runner.repeats import Repeats
from labkit.runner.replay import can_replay, replay
from labkit.runner.rows import Rows
from labkit.runner.states import StateStore, store_of
from labkit.runner.steps import MOST_TOKENS, Steps
from labkit.runner.trees import TreeDrafter, settle_trees
from labkit.runner.weights import Replaces, runners_of
from labkit.sampling.sampler import Drawn, LogprobBatch, Sampler
from labkit.transfer import put


@named_options
class TorchRunner(Sleeps, Replaces, Hands):
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
        graphs: bool | str | None = None,
        hybrid_kv: bool = False,
        kv_groups: int = 1,
        kv_cache_dtype: str = "auto",
        kv_disk_path: str | os.PathLike[str] | None = None,
        capture: tuple[int, int] | None = None,
        draft_model: Model | EagleHead | None = None,
        most_feature_bytes: int = MOST_BYTES,
    ) -> None:
        """`graphs`: replay captured decode steps. None means yes on a GPU, for models that can be captured; on a CPU it
        means that the layers' C++ calls are recorded and repeated. False means neither. "all" captures every step, also
        those with prefills, drafts and rows with penalties or masks (see `labkit.runner.steps`). A size is captured
        when it first comes; `capture` (longest context, tokens a step) captures all up to these when the runner is
        opened.
        `hybrid_kv`: layers with a sliding window keep only the window's blocks; steps with several groups are not
        captured. `kv_groups`: so many groups of layers have block tables of their own, for `kv=` objects that keep
        other numbers of keys in them. `kv_cache_dtype`: "fp8_e4m3" (or "fp8"), "fp8_e5m2" and "int8" store keys and
        values in 8 bits, with a scale for each token and head. `kv_disk_path` is the folder of blocks that a
        `BlockManager` with `num_disk_blocks` offloads; files in it are found again by later engines of the same
        model. `draft_model` guesses tokens for a scheduler with `draft=lk.ModelDraft(...)`. Image features are kept
        within `most_feature_bytes`, besides those of the step."""
        self.model, self.device = model, model.device
        self.groups = groups_of_model(model.kv, flag("hybrid_kv", hybrid_kv), whole("kv_groups", kv_groups, least=1))
        several = len(self.groups.windows) > 1
        self.draft_model = check_draft(draft_model, model, several, kv_disk_path)
        self.drafter: Drafter | None = None
        self.kv_dtype = kv_dtype(model, kv_cache_dtype)
        if graphs is not None and graphs != "all":
            if isinstance(graphs, str):
                raise ValueError(f'graphs must be True or False or "all", got {graphs!r}')
            flag("graphs", graphs)
        self.graphs: Graphs | Steps | None = None
        self._kind = Steps if graphs == "all" else Graphs
        self.repeats: Repeats | None = None
        self._wants_graphs = (
            model.capturable
            and not several
            and not isinstance(draft_model, EagleHead)  # it reads hidden states, which captured steps keep
            and (model.device.type == "cuda" if graphs is None else bool(graphs))
        )
        wants = graphs is None and model.capturable and hasattr(model, "through")
        self._wants_repeats = wants and self.device.type == "cpu"
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self.eos_token_ids = tuple(whole("eos_token_ids", i, least=0, most=model.vocab_size - 1) for i in eos_token_ids)
        self.seed = whole("seed", seed, least=0)
        self.embedding_size = getattr(model, "embedding_size", None)
        self.max_model_len, self.head_size = model.max_model_len, model.kv[0].key_size if model.kv else 0
        self.dtype_name, self.pooler = str(model.dtype)[6:], getattr(model, "pooler", None)
        self.features = features_of(model, most_feature_bytes)
        self.draws = getattr(model, "is_last", True)  # stages before the last one compute, and draw nothing
        self.largest_input = torch.finfo(model.dtype).max
        self.kv_disk_path, self.capture = kv_disk_path, capture
        self.disk: DiskStore | None = None
        self.compactor: Compactor | None = None  # once a request with kv= has come
        self.layout: Layout | None = None
        self.store = self.host = BlockStore([])
        self.state_bytes = sum(spec.num_bytes for spec in states_of(model))  # of a row; and of each kept state
        self.states: StateStore | None = None
        self.state_room = 0  # bytes that `fitting_blocks` leaves to states
        self._generation = -1
        self._num_made = 0  # steps captured or recorded so far
        self._version = 0  # of the model's adapters
        runners_of(model).add(self)

    def __repr__(self) -> str:
        if "model" not in vars(self):
            return "TorchRunner(closed)"
        where = "not open"
        if self.layout is not None:
            num, size = self.layout.num_blocks, self.layout.block_size
            where = f"{num}x{size}, {num * self.bytes_per_block(size) / 2**20:.0f} MiB of keys and values"
            where += "" if self.kv_dtype == self.model.dtype else f" in {str(self.kv_dtype)[6:]}"
            where += "" if self.states is None else f", {self.states!r}"
            where += "" if self.graphs is None else f", {self.graphs!r}"
        return f"TorchRunner({self.model.name} on {self.device}, {str(self.model.dtype)[6:]}, {where})"

    # -- memory --------------------------------------------------------------------------------------------------

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes per block: keys and values of all layers in a group, with their scales."""
        own = bytes_per_block(self.model, self.groups, self.kv_dtype, block_size)
        return own + draft_bytes(self.draft_model, block_size)

    def held(self, block_size: int) -> list[tuple[int, int]]:
        """Bytes of weights and states, and of a block, by process: there is one."""
        tensors = (*self.model.tensors(), *(self.draft_model.tensors() if self.draft_model is not None else ()))
        return [(sum(tensor.nbytes for tensor in tensors) + self.state_room, self.bytes_per_block(block_size))]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group of layers, as `BlockManager` takes it."""
        return self.groups.windows

    def fitting_blocks(self, block_size: int, utilization: float, most_tokens: int, most_rows: int) -> int:
        """How many blocks fit into `utilization` of the memory, besides the weights and a step of `most_tokens`."""
        real("gpu_memory_utilization", utilization, least=0.0, most=1.0, open_left=True)
        captured = self._kind is Steps and self._wants_graphs  # such steps have memory of their own
        most = [most_tokens, min(most_tokens, MOST_TOKENS)] if captured else [most_tokens]
        kept = self.state_room + (self.features.most_bytes if self.features and self.device.type == "cuda" else 0)
        budget = memory_for_blocks(self.model, self.kv_dtype, utilization, most, most_rows) - kept
        return blocks_in(budget, self.bytes_per_block(block_size), utilization, most_tokens, self.state_room)

    def open(self, layout: Layout) -> None:
        if self.layout is not None:
            raise ValueError("this TorchRunner already serves an engine: close that one, or make another runner")
        if layout.windows != self.windows:
            raise ValueError(
                f"the BlockManager was made for windows {layout.windows}, the layers of this runner have "
                f"{self.windows}: make it with windows=runner.windows"
            )
        if layout.num_adapters != (room := 0 if self.model.adapters is None else self.model.adapters.num_slots):
            raise ValueError(
                f"the scheduler counts {layout.num_adapters} adapters, the model has room for {room}: call "
                f"make_room(model, {layout.num_adapters}) of labkit.models.lora before the TorchRunner is made"
            )
        self.layout = layout
        self.rows = Rows(layout)
        self.store, self.host = self._stores(layout)
        self.states = store_of(self.model, layout, self.device)
        self.sampler = Sampler(self.vocab_size, layout.num_rows, self.eos_token_ids, self.seed, self.device)
        self.latest = torch.zeros(layout.num_rows + 1, dtype=torch.int64, device=self.device)  # and one for padding
        if layout.num_disk_blocks:
            if self.kv_disk_path is None:
                raise ValueError("num_disk_blocks needs a folder: give the TorchRunner a kv_disk_path")
            name = fingerprint(self.model, self.kv_dtype, layout.block_size)
            self.disk = DiskStore(self.kv_disk_path, name, self.host.flat)
        self._make_repeated()
        self._make_drafter()
        if self.capture is not None:
            self.capture_all(*self.capture)

    def _make_drafter(self) -> None:
        if self.draft_model is not None and self.layout is not None:
            caches = self.store.caches[self.groups.size :]
            args = (caches, self.layout, self.sampler)
            if isinstance(self.draft_model, EagleHead):
                self.drafter = HeadDrafter(self.draft_model, *args)
            else:
                self.drafter = TreeDrafter(self.draft_model, *args, self._wants_repeats)

    def on_disk(self) -> list[Stub]:
        """The blocks of this model in `kv_disk_path`, the longest unused first."""
        return [] if self.disk is None else self.disk.scan()

    def _make_repeated(self) -> None:
        """What repeats steps, if anything does. It knows where this runner's tensors lie."""
        if self.layout is None:
            return
        self.edits = Edits(self.rows, self.hidden_size, self.device)
        if self._wants_graphs:
            self.graphs = self._kind(self.model, self.caches, self.sampler, self.latest, self.rows)
        if self._wants_repeats:
            self.repeats = Repeats(self.model, self.caches)  # type: ignore[arg-type]

    @torch.inference_mode()
    def capture_all(self, most_tokens: int, budget: int = 0) -> None:
        """Capture steps of every size, with contexts up to `most_tokens` and, if steps with prefills are captured, up
        to `budget` tokens a step; on a CPU, record those that are repeated."""
        self._pick()
        if self.graphs is not None:
            self.graphs.capture(most_tokens, budget, self._sample)
        if self.repeats is not None:
            self.repeats.capture()

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what this model cannot show."""
        check_shown(self.model, params)

    def _stores(self, layout: Layout) -> tuple[BlockStore, BlockStore]:
        cpu, pinned = torch.device("cpu"), self.device.type == "cuda"
        kinds, size = [(self.model, self.groups, self.kv_dtype)], layout.block_size
        if self.draft_model is not None:
            kinds.append((self.draft_model, one_group(self.draft_model.kv), self.draft_model.dtype))

        def stored(num: int, *where: Any) -> BlockStore:
            return BlockStore([c for kind in kinds for c in make_caches(*kind, num + 1, size, *where)], num + 1)

        host = stored(layout.num_host_blocks, cpu, pinned) if layout.num_host_blocks else BlockStore([])
        return stored(layout.num_blocks, self.device), host

    @property
    def caches(self) -> list[KVCache]:
        """Caches by layer. Layers of different groups share memory, but never blocks."""
        return [self.store.caches[place] for place in self.groups.place_of] if self.store.caches else []

    @property
    def num_layers(self) -> int:
        return num_layers_of(self.model)

    def memory_parts(self) -> list[tuple[str, Tensor]]:
        """Every tensor that must be freed by closing."""
        states = () if self.states is None else self.states.tensors
        kv = [("kv", tensor) for tensor in (*self.store.flat, *self.host.flat, *states)]
        draft = () if self.draft_model is None else self.draft_model.tensors()
        return [*kv, *(("weights", tensor) for tensor in (*self.model.tensors(), *draft))]

    def close(self) -> None:
        """Release the cache and the model; the runner cannot be used afterwards."""
        if self.disk is not None:
            self.disk.close()
            self.disk = None
        self.store, self.host, self.layout, self.states = BlockStore([]), BlockStore([]), None, None
        self.graphs = self.repeats = self.drafter = self.draft_model = self.features = None
        for name in ("model", "sampler", "rows", "latest", "edits"):
            vars(self).pop(name, None)

    # -- snapshots: the model is shared, everything else is state ------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self.layout is not None:
            self.sampler.settle()  # an event cannot be copied
        left_out = ("model", "draft_model", "_sample", "graphs", "repeats", "disk", "drafter", "features", "edits")
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return state | {"_drafted": None if self.drafter is None else self.drafter.state()}

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchRunner:
        other = object.__new__(TorchRunner)
        memo[id(self)] = other
        state = copy.deepcopy(self.__getstate__(), memo)
        other.model, other.draft_model, other.features = self.model, self.draft_model, self.features
        runners_of(self.model).add(other)
        other.store, other.host = self._stores(self.layout) if self.layout else (BlockStore([]), BlockStore([]))
        other.__setstate__(state | {"_generation": -1})
        other.graphs = other.repeats = other.disk = other.drafter = None
        other._make_repeated()
        other._make_drafter()
        if other.drafter is not None:
            other.drafter.load(state["_drafted"])
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("store", "host"):
            getattr(self, name).load(state[name])
        vars(self).update({name: value for name, value in state.items() if name not in ("store", "host")})
        if "graphs" in vars(self):  # what there was reads the tensors that were replaced
            self._make_repeated()
            self._make_drafter()
            if self.drafter is not None:
                self.drafter.load(state["_drafted"])

    # -- a step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        begin = time.perf_counter()
        self._pick()
        self._apply(plan)
        if self.drafter is not None:
            self.drafter.follow(plan, self.rows.tables[0])
            if plan.fill_drafts:
                plan = self.drafter.fill(plan, self.rows.tables[0], self._sample)
            self.drafter.settle(plan, self.rows.tables[0])
        if isinstance(self.graphs, Steps) and self.graphs.can_run(plan):
            return self._run_captured(self.graphs, plan, begin)
        if isinstance(self.graphs, Graphs) and can_replay(plan, self.rows, self.sampler):
            out, *shown = replay(self.graphs, plan, self.rows, self.edits, self._sample)
            return self._pending(Computed(plan, out, None, {}, [], begin, self.device).showing(*shown))
        mass = None if self.compactor is None else self.compactor.watch(plan, self.rows, self.device)
        inputs = inputs_of(plan, self.rows, self.latest, self.groups, self.model.dtype, self.features, mass)
        if self.states is not None:
            inputs = inputs._replace(batch=self.states.enter(plan, inputs.query_start, inputs.batch))
        asked = bool(self.rows.asking[plan.rows].any())
        wanted = wanted_of(plan, inputs.query_start, self.rows) if asked else None
        edits = self.edits.of(plan, inputs.query_start)
        capture = capture_of(wanted, () if self.drafter is None else self.drafter.layers, edits.by_layer())
        hidden = self._forward(inputs.batch, capture)  # [tokens, hidden size]
        if self.states is not None:
            self.states.fork(plan)
        if self.drafter is not None:
            self.drafter.keep(plan, inputs.query_start, hidden, capture, self.rows.tables[0])
        failed = inputs.failed | edits.failed
        if not self.draws:
            return self._pending(Computed(plan, None, None, {}, [], begin, self.device), failed)
        drawn = draw(plan, inputs.query_start, hidden, self.model, self.sampler, self.latest, self._sample)
        prompts = prompts_of(self.model, plan, inputs.query_start, hidden, self.rows) if asked else {}
        shown = captured(plan, self.rows, inputs.query_start, wanted, capture) if wanted and capture else None
        pooled = pooled_step(plan, self.rows, inputs.query_start, hidden, self.pooler) if asked else None
        computed = self._drawn(plan, drawn, prompts, begin)
        return self._pending(computed.showing(shown, edits.counts, pooled), failed)

    def _drawn(self, plan: Plan, drawn: Drawn | None, prompts: dict[str, list[LogprobBatch]], begin: float) -> Computed:
        names = [join and join.request for join in self.rows.joins] if drawn and drawn.logprobs else []
        return Computed(plan, on_its_way(drawn), drawn, prompts, names, begin, self.device, self._accepted)

    @torch.inference_mode()
    def _accepted(self, plan: Plan, stands: np.ndarray, indptr: np.ndarray) -> None:
        if self.states is not None:
            self.states.accept(plan, indptr)
        if len(plan.parents):
            settle_trees(plan, stands, self.rows, self.caches, self.drafter)

    def _run_captured(self, steps: Steps, plan: Plan, begin: float) -> Pending:
        tokens, hidden, failed = steps.run(plan, self._sample, self.features)
        if hidden is None:
            tokens = tokens if len(plan.sample_row) else None
            return self._pending(Computed(plan, tokens, None, {}, [], begin, self.device), failed)
        rows, _, known = draws_of(plan, np.concatenate(([0], np.cumsum(plan.count))))
        drawn = draw_from(plan, hidden, rows, known, self.model, self.sampler, self.latest, self._sample)
        return self._pending(self._drawn(plan, drawn, {}, begin), failed)

    def _pending(self, computed: Computed, failed: dict[int, str] | None = None) -> Pending:
        computed.failed = failed or {}
        if self.compactor is not None:
            computed.failed = computed.failed | self.compactor.failed
        made = sum(of.num_captured for of in self._repeating())
        computed.once, self._num_made = made != self._num_made, made
        if self.disk is not None:
            computed.read = self.disk.done(wait=not len(computed.plan.rows))
        return computed if self.device.type == "cuda" else Done(computed.result())

    def _forward(self, batch: Batch, capture: Capture | None) -> Tensor:
        if self.repeats is not None:
            return self.repeats.forward(batch, capture)
        return self.model.forward(batch, self.caches, capture)

    def _pick(self) -> None:
        """Pick ops again, after a variant was put in use or removed."""
        if self._generation != generation():
            self._generation = generation()
            self._sample = sample_op.pick(self.device, torch.float32, vocab=self.vocab_size)
            self.model.refresh_ops()
            if self.draft_model is not None:
                self.draft_model.refresh_ops()
            for repeating in self._repeating():
                repeating.forget()

    def _repeating(self) -> list[Any]:
        """What captures or records steps here."""
        found = (self.graphs, self.repeats, self.drafter and self.drafter.repeats)
        return [one for one in found if one is not None]

    def _apply(self, plan: Plan) -> None:
        if plan.reset:
            self.sampler.reset()
        for row in plan.leaves:
            self.sampler.leave(row)
        self.rows.apply(plan)
        self.edits.apply(plan)
        self.store.touched[plan.table_changes.block] = True
        if isinstance(self.graphs, Steps):
            self.graphs.note(plan)
        self.sampler.join(plan.joins)
        if self.rows.adapters:
            self._load_adapters()
        if self.disk is not None:
            self.disk.write_all(plan, self.device)
        if len(plan.swap_out):
            self.store.copy_to(self.host, plan.swap_out)
        self._compact(plan)
        if len(plan.copies):
            pairs = put(plan.copies, self.device)
            self.store.touched[plan.copies[:, 1]] = True
            copy_blocks(self.store.flat, pairs)
        for digest, host_block in plan.disk.reads:
            self.host.touched[host_block] = True
            self.disk.read(digest, host_block)  # type: ignore[union-attr]
        self.write_arrivals(plan)
        if len(plan.swap_in):
            self.host.copy_to(self.store, plan.swap_in)

    def _compact(self, plan: Plan) -> None:
        """Keep some of the keys of requests with `kv=`."""
        if self.compactor is None and any(join.params.kv is not None for join in plan.joins):
            self.compactor = Compactor(self.model, self.layout.block_size, self.groups.group_of)  # type: ignore[union-attr]
        if self.compactor is not None:
            self.compactor.follow(plan)
            self.compactor.compact(plan, self.caches, rope_tables(self.model))

    def check_kv(self, kv: SmallerKV) -> None:
        """Refuse what cannot be combined with `kv=`, by name."""
        refuse(kv, self.model, self.draft_model, self.kv_dtype)

    def _load_adapters(self) -> None:
        """What is in the model's slots may be of another engine, which shares the model."""
        slots = self.model.adapters
        slots.load(self.rows.adapters)
        if slots.version != self._version:  # layers matter that captured steps lack
            self._version, self._generation = slots.version, -1
            self._pick()
