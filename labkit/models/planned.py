"""Splits a model that runs by transformers' own code among ranks, as the tensor-parallel plan of its class says.

A plan names modules and styles. Each rank keeps its part of their weights; what the ranks tell each other goes through
labkit's collectives, in hooks around the modules, so that formats and adapters change products without knowing of it.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit.loading.checkpoint import Source
from labkit.loading.format import LinearSpec, Piece, Units
from labkit.models import hf
from labkit.models.place import Collectives, Place, check_ranks
from labkit.models.vocabulary import Vocabulary

COLUMNS = ("colwise", "packed_colwise", "colwise_gather_output", "colwise_rep")
GATHERED = ("colwise_gather_output", "colwise_rep")
ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
WHOLE = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj")  # nothing to do in a forward
EMBEDDING, EXPERTS = "embedding_rowwise", "moe_tp_experts"
STYLES = (*COLUMNS, *ROWS, *WHOLE, EMBEDDING, EXPERTS)
KEYS = ("k_proj", "v_proj", "k_norm")
CPU = torch.device("cpu")
ALL = slice(None)
_building = threading.Lock()  # transformers changes torch's defaults while it builds a model


class Cut(NamedTuple):
    """What a rank keeps of a parameter: these parts, one after the other along `dim`."""

    parts: list[tuple[slice, ...]]
    dim: int = 0

    def of(self, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        found = [read(part) for part in self.parts]
        return found[0].clone() if len(found) == 1 else torch.cat(found, self.dim)


class Quiet:
    """The ranks' collectives. Until it is `open`, answers of the same shape without the other ranks, which load at
    their own pace; see `labkit.models.place.Collectives`."""

    def __init__(self, group: Collectives) -> None:
        self.group, self.rank, self.ranks, self.open = group, group.rank, group.ranks, False

    def all_reduce(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.open:
            return self.group.all_reduce(x, residual)
        return x if residual is None else residual + x

    def all_gather(self, x: Tensor) -> Tensor:
        return self.group.all_gather(x) if self.open else x.expand(self.ranks, *x.shape).clone()


class Planned:
    """One rank's part of a model of transformers. `like` is the model without memory for its weights."""

    def __init__(self, like: Any, place: Place) -> None:
        assert place.group is not None
        self.like, self.shard, self.group = like, place.shard, Quiet(place.group)
        self.place = Place(place.shard, self.group)
        self.kind = like.config.model_type
        config = like.config.get_text_config()
        self.heads = int(config.num_attention_heads)
        self.keys = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.modules: dict[str, nn.Module] = dict(like.named_modules())
        name_of = {id(module): name for name, module in self.modules.items()}
        self.embedding = name_of[id(like.get_input_embeddings())]
        self.head = name_of[id(like.get_output_embeddings())]
        self.vocab_size = int(like.get_output_embeddings().weight.shape[0])
        self.style_of = dict(self._styles(dict(like.tp_plan or {})))
        self.pieces: dict[str, list[Piece]] = {}  # of linear layers that are cut
        self.cuts: dict[str, Cut | None] = {}  # by parameter; None: another rank has it
        self.splits_heads = any(self._is_attention(name) and style in ("colwise", "rowwise")
                                for name, style in self.style_of.items())  # fmt: skip
        self._check_ranks()
        for name, style in self.style_of.items():
            self._cut(name, style)
        if self.splits_heads:
            self._cut_norms()
        self.whole_head = True  # else this rank's logits only

    def __repr__(self) -> str:
        return f"Planned({self.kind}: {len(self.cuts)} parameters cut, rank {self.shard.rank} of {self.shard.ranks})"

    # -- the plan ------------------------------------------------------------------------------------------------

    def _styles(self, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Each module or parameter that the plan names, and its style. The vocabulary is always split."""
        instead = "run it in one process, or as several whole engines (data_parallel_size=2)"
        known = {*self.modules, *dict(self.like.named_parameters())}
        found = {name: style for name in known if (style := plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)))}
        found |= {self.embedding: EMBEDDING, self.head: "colwise_gather_output"}
        if len(found) == 2:
            raise ValueError(
                f"{self.kind!r} cannot be split among processes: it has no native decoder, or path= rules it out, and "
                f"transformers has no tensor-parallel plan (base_model_tp_plan) for its layers: {instead}"
            )
        for name, style in sorted(found.items()):
            if style not in STYLES:
                raise ValueError(
                    f"{self.kind!r} cannot be split among processes: transformers' plan gives {name!r} the style "
                    f"{style!r}, and known are {', '.join(STYLES)}: {instead}"
                )
            yield name, style

    def _is_attention(self, name: str) -> bool:
        return "att" in name.rpartition(".")[0].rpartition(".")[2]

    def _check_ranks(self) -> None:
        widths = []
        for name, style in self.style_of.items():
            module = self.modules.get(name)
            if not self._is_attention(name) and isinstance(module, nn.Linear):
                if style == "rowwise":
                    widths.append(module.in_features)
                elif style in ("colwise", "packed_colwise"):
                    widths.append(module.out_features // (2 if style == "packed_colwise" else 1))
        heads, keys = (self.heads, self.keys) if self.splits_heads else (self.shard.ranks, self.shard.ranks)
        check_ranks(self.shard.ranks, heads, keys, widths, type(self.like).__name__)

    def _units(self, name: str, size: int, uneven: bool) -> Units:
        """What a cut must not go through: a head of attention."""
        if uneven or not self._is_attention(name):
            return Units(size, uneven=uneven)
        keys = name.rpartition(".")[2] in KEYS
        count = self.keys if keys else self.heads
        if size % count:
            raise ValueError(
                f"{self.kind!r} cannot be split among processes: {name!r} has {size} elements, which are no "
                f"{count} {'key ' if keys else ''}heads"
            )
        return Units(count, size // count, shared=keys)

    # -- what is cut ---------------------------------------------------------------------------------------------

    def _cut(self, name: str, style: str) -> None:
        module = self.modules.get(name)
        if style in WHOLE or style == EXPERTS:
            return
        if style == EMBEDDING and isinstance(module, nn.Embedding):
            self.cuts[f"{name}.weight"] = Cut([(self._vocabulary(name).part,)])
        elif style != EMBEDDING and type(module) is nn.Linear:
            self._cut_linear(name, style, module)
        elif module is None and style in ("packed_colwise", "rowwise", "colwise"):
            self._cut_experts(name, style, self.like.get_parameter(name))
        else:
            raise ValueError(
                f"{self.kind!r} cannot be split among processes: transformers' plan gives {name!r}, a "
                f"{type(module).__name__}, the style {style!r}"
            )

    def _cut_linear(self, name: str, style: str, module: nn.Linear) -> None:
        out, inner = module.weight.shape
        if style in ROWS:
            spec = LinearSpec({name: (Units(out),)}, self._units(name, inner, style in SPLIT_INPUT), "row")
        elif style == "packed_colwise":
            half = self._units(name, out // 2, False)
            spec = LinearSpec({name: (half, half)}, Units(inner), "column")
        else:
            self._refuse_fused(name, style)
            spec = LinearSpec({name: (self._units(name, out, style in GATHERED),)}, Units(inner), "column")
        pieces = self.pieces[name] = spec.pieces(self.shard)
        self.cuts[f"{name}.weight"] = Cut([(piece.outputs, piece.inputs) for piece in pieces])
        if module.bias is not None:
            kept = Cut([(piece.outputs,) for piece in pieces])
            self.cuts[f"{name}.bias"] = kept if spec.has_bias(self.shard) else None

    def _refuse_fused(self, name: str, style: str) -> None:
        fused = name.rpartition(".")[2] in ("qkv_proj", "query_key_value")
        if fused and self.keys != self.heads and style not in GATHERED:
            raise ValueError(
                f"{self.kind!r} cannot be split among processes: {name!r} holds queries, keys and values with fewer "
                f"key heads than query heads, which transformers' plan would cut through"
            )

    def _cut_experts(self, name: str, style: str, stacked: Tensor) -> None:
        """A parameter of all experts: [experts, outputs, inputs]."""
        owner = name.rpartition(".")[0]
        if stacked.ndim != 3 or self.style_of.get(owner) != EXPERTS or getattr(
            self.modules[owner], "is_transposed", False
        ):  # fmt: skip
            raise ValueError(
                f"{self.kind!r} cannot be split among processes: transformers' plan gives the parameter {name!r} of "
                f"shape {tuple(stacked.shape)} the style {style!r}, which is known for stacked experts only"
            )
        if style == "rowwise":
            self.cuts[name] = Cut([(ALL, ALL, self.shard.part(name, Units(stacked.shape[2])))])
        else:
            num = 2 if style == "packed_colwise" else 1
            width = stacked.shape[1] // num
            mine = self.shard.part(name, Units(width))
            cuts = [slice(mine.start + i * width, mine.stop + i * width) for i in range(num)]
            self.cuts[name] = Cut([(ALL, cut) for cut in cuts], 1)

    def _cut_norms(self) -> None:
        """Norms of queries and keys that have a weight for each head."""
        for name, parameter in self.like.named_parameters():
            owner = name.rpartition(".")[0]
            if parameter.ndim == 2 and owner.endswith(("q_norm", "k_norm")) and self._is_attention(owner):
                self.cuts[name] = Cut([(self.shard.part(name, self._units(owner, parameter.shape[0], False)),)])

    def _vocabulary(self, name: str) -> Vocabulary:
        module: Any = self.modules[name]
        return Vocabulary(int(module.weight.shape[0]), self.place)

    # -- loading -------------------------------------------------------------------------------------------------

    def load(self, source: Source, dtype: torch.dtype, device: torch.device) -> Any:
        """The model with this rank's part of its weights. Of tensors that are stored as the model has them, no more
        than that is read."""
        shape_of = {name: tuple(value.shape) for name, value in self.like.named_parameters()}
        head, table = f"{self.head}.weight", f"{self.embedding}.weight"
        stored = {name for name in self.cuts if source.shapes.get(name) == shape_of.get(name)}
        left = {head} if self.like.config.tie_word_embeddings and {head, table} <= source.shapes.keys() else set()
        nothing = torch.zeros((), dtype=dtype)  # of any shape without memory
        state = {
            name: nothing.expand(shape) if name in stored else source.read(name, None, CPU)
            for name, shape in source.shapes.items()
            if name not in left
        }
        with _building:
            try:
                model, report = type(self.like).from_pretrained(
                    None, config=copy.deepcopy(self.like.config), state_dict=state, dtype=dtype, device_map=None,
                    output_loading_info=True,
                )  # fmt: skip
            except RuntimeError as error:
                where = type(self.like).__name__
                raise ValueError(f"{source!r}: its tensors do not fit into {where}: {error}") from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{source!r} lacks {len(missing)} tensors of {self.kind!r}, {missing[0]!r} first")
        self._keep(model, source, stored - left, dtype, device)
        return model.to(device)

    def _keep(self, model: Any, source: Source, stored: set[str], dtype: torch.dtype, device: torch.device) -> None:
        """Replace the parameters that are cut. Tied ones stay one."""
        kept: dict[int, tuple[Tensor, nn.Parameter]] = {}
        first = {id(model.get_parameter(name)): name for name in sorted(self.cuts) if name in stored}
        for name, cut in self.cuts.items():
            owner, _, leaf = name.rpartition(".")
            old = model.get_parameter(name)
            if cut is None:
                setattr(model.get_submodule(owner), leaf, None)
                continue
            if id(old) not in kept:
                read = _reader(old.data, source, first.get(id(old)), dtype, device)
                new = nn.Parameter(cut.of(read).to(device), requires_grad=False)
                kept[id(old)] = (old, new)  # the old one stays, so that its id is no other's
            setattr(model.get_submodule(owner), leaf, kept[id(old)][1])

    # -- exchanges -----------------------------------------------------------------------------------------------

    def connect(self, model: Any) -> None:
        """Exchange what the styles say, around the modules."""
        for name, style in self.style_of.items():
            if style in WHOLE or name not in self.modules:
                continue
            module = model.get_submodule(name)
            if style == EMBEDDING:
                self._connect_embedding(name, module)
            elif style in GATHERED:
                self._connect_gathered(name, module)
            elif style in ROWS or style == EXPERTS:
                module.register_forward_hook(lambda module, given, out: self.group.all_reduce(out))
            if style in SPLIT_INPUT:
                part = self.pieces[name][0].inputs
                module.register_forward_pre_hook(lambda module, given, part=part: (given[0][..., part], *given[1:]))

    def _connect_embedding(self, name: str, module: Any) -> None:
        vocabulary, rows = self._vocabulary(name), module.forward
        module.padding_idx = None  # of the whole
        module.forward = lambda ids: vocabulary.embed(ids.reshape(-1), rows).unflatten(0, ids.shape)

    def _connect_gathered(self, name: str, module: Any) -> None:
        vocabulary, is_head = self._vocabulary(name), name == self.head

        def gather(module: nn.Module, given: Any, out: Tensor) -> Tensor | None:
            if is_head and not self.whole_head:
                return None
            return vocabulary.gather(out.reshape(-1, out.shape[-1])).unflatten(0, out.shape[:-1])

        module.register_forward_hook(gather)

    def best(self, logits: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Each row's likeliest token and its logit, of logits that this rank's part of the head gives."""
        self.whole_head = False
        try:
            value, index = logits().max(-1)
        finally:
            self.whole_head = True
        return self._vocabulary(self.head).best(index, value)


def _reader(
    loaded: Tensor, source: Source, name: str | None, dtype: torch.dtype, device: torch.device
) -> Callable[[tuple[slice, ...]], Tensor]:
    """Parts of a tensor: from the checkpoint, if it is stored by this name."""
    if name is None:
        return loaded.__getitem__
    return lambda part: source.read(name, dtype, device, part)


def planned(config: Any, place: Place, dtype: torch.dtype, trust_remote_code: bool) -> Planned:
    """How a model of this config is split. Reads no weights."""
    with _building, torch.device("meta"):
        like = hf.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return Planned(like, place)
