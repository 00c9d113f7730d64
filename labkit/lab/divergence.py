"""Compares two ways of computing the same answer: the first token that differs and by how much, the first layer, the
op."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from labkit_kernels import show

from labkit.core.frames import table
from labkit.core.options import real, whole
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.engine.intake import prompt_ids
from labkit.lab.layers import Hidden, LayerDifference, compare_layers, watched_layers
from labkit.lab.ops import OpDifference, first_op, recorded_ops
from labkit.lab.side import Side, settled
from labkit.lab.trial import NEAR, first_difference, gap, text_of, token_at
from labkit.widgets.plot import Plot, around, power

if TYPE_CHECKING:
    import pandas

TOLERATED = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 4e-3}  # a few roundings, relative
MOST_BYTES = 2 << 30  # most bytes of hidden states kept for comparison
BEFORE = 48  # characters of the text before the difference


@dataclass(frozen=True)
class Divergence:
    """What `divergence` found. Prints a summary; `frame()` has one row per layer."""

    a: str
    b: str
    num_tokens: int  # number of tokens compared
    position: int | None  # index of the first token that differs; None: none does
    tokens: tuple[str, str]
    before: str  # the text before it, the same in both
    gaps: tuple[float | None, float | None]  # how much likelier each side's own token was, in logits; None: by far
    layers: tuple[LayerDifference, ...]
    num_positions: int  # positions at which layers were compared
    tolerance: float
    op: OpDifference | None
    only_replayed: bool  # the tokens differ with replayed graphs, but not without

    @property
    def same(self) -> bool:
        """Whether all tokens are equal."""
        return self.position is None

    @property
    def identical(self) -> bool:
        """Whether every hidden state is equal, bit for bit."""
        return self.same and not any(one.largest for one in self.layers)

    @property
    def layer(self) -> int | None:
        """The first layer that differs by more than the tolerance, or None."""
        return next((one.layer for one in self.layers if one.largest > self.tolerance), None)

    @property
    def worst(self) -> LayerDifference:
        return max(self.layers, key=lambda one: one.largest)

    def frame(self) -> pandas.DataFrame:
        return table((astuple(one) for one in self.layers), list(LayerDifference.__dataclass_fields__))

    # -- text ----------------------------------------------------------------------------------------------------

    def headline(self) -> str:
        if self.identical:
            return f"the same: {self.num_tokens} tokens, and every hidden state to the bit"
        if self.same:
            return (
                f"the same {self.num_tokens} tokens; hidden states differ by {self.worst.largest:.2g} at most, "
                f"behind {self.worst.name}"
            )
        return f"token {self.position} of the answer: {self.tokens[0]!r} in a, {self.tokens[1]!r} in b"

    def sentences(self) -> list[str]:
        """Further findings, besides the headline."""
        found = []
        if not self.same:
            names = (f"{one} prefers its own by {'more than its 20 likeliest' if g is None else f'{g:.3g}'}"
                     for one, g in zip("ab", self.gaps, strict=True))  # fmt: skip
            found += [f"after {self.before!r}", f"in logits {', '.join(names)}"]
        if self.only_replayed:
            found.append("only with replayed graphs: in eager steps the tokens are the same")
        found.append(self._about_layers())
        if self.op is not None:
            o = self.op
            place = "outside the layers" if o.layer is None else f"in layer {o.layer}"
            variants = f"{o.variant_a} in a, {o.variant_b} in b" if o.variant_a != o.variant_b else o.variant_a
            found.append(
                f"the first op with a different result is {o.op} {place} ({variants}; its call {o.call}), off by "
                f"{o.difference:.2g}"
            )
        return found

    def _about_layers(self) -> str:
        where = f"at the {self.num_positions} positions that both computed from the same tokens"
        if self.layer is None:
            if self.same:
                return f"no layer is off by more than {self.tolerance:g} {where}"
            return (
                f"no layer is off by more than {self.tolerance:g} {where} ({self.worst.largest:.2g} at most, "
                f"{self.worst.name}): the two tokens are close, or the head or the sampler differs"
            )
        off = next(one for one in self.layers if one.layer == self.layer)
        return (
            f"{off.name} is the first that is off by more than {self.tolerance:g}: from position {off.first} on, by "
            f"{off.largest:.2g} at most"
        )

    def __repr__(self) -> str:
        lines = [f"Divergence({self.headline()})", f"  a: {self.a}", f"  b: {self.b}"]
        return "\n".join([*lines, *(f"  {line}" for line in self.sentences())])

    # -- pictures ------------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        marks = (show.mark("a", show.BLUE), escape(self.a), show.mark("b", show.ORANGE), escape(self.b))
        sides = "<div>{} {} &nbsp; {} {}</div>".format(*marks)
        said = "".join(f"<div>{escape(line)}</div>" for line in self.sentences())
        lines = [
            [escape(one.name), f"{one.largest:.3g}", f"{one.mean:.3g}", str(one.position),
             "" if one.first is None else str(one.first)]
            for one in self.layers
        ]  # fmt: skip
        heads = ("behind", ">largest", ">mean", ">at position", ">first off at")
        return show.page(
            "divergence", self.headline(), sides, said, self.svg(),
            show.folded("the numbers", show.table(heads, lines), False),
        )  # fmt: skip

    def svg(self) -> str:
        """One bar per layer: its difference on a logarithmic scale."""
        values = [min(one.largest, 1e9) for one in self.layers if one.largest]
        low, high = around([*values, self.tolerance])
        low = max(low, high * 1e-9)
        plot = Plot(820, 250, (-1.7, len(self.layers) - 1.3), (low, high), right=112)
        plot.ticks_y("relative difference", power)
        step = -(-len(self.layers) // 24)
        plot.ticks_x(
            "behind layer", [(one.layer, "emb" if one.layer < 0 else str(one.layer)) for one in self.layers[::step]]
        )
        wide = min(34.0, 0.6 * (plot.right - plot.left) / len(self.layers))
        for one in self.layers:
            title = f"{one.name}: largest {one.largest:.3g} at position {one.position}, mean {one.mean:.3g}"
            if one.largest:
                color = show.RED if one.largest > self.tolerance else show.BLUE
                plot.box(one.layer, wide, one.largest, color, title)
            else:
                plot.text(plot.at_x(one.layer), plot.bottom - 5, "0", anchor="middle", kind="muted")
        plot.line([(-1.7, self.tolerance), (len(self.layers) - 1.3, self.tolerance)], dash="5 3")
        plot.text(plot.right + 7, plot.at_y(self.tolerance) + 4, f"tolerated: {self.tolerance:g}")
        return plot.svg(self.headline())


def divergence(
    a: Any, b: Any, prompt: Any, *, model: Any = None, max_tokens: int = 32, tolerance: float | None = None
) -> Divergence:
    """Answer one prompt greedily in two ways, and find where they differ.

    `a` and `b` are settings: `use={"rms_norm": "mine"}` (variants of ops), `batch=8` (other prompts in the batch),
    `cached=True` (the prompt's blocks come from the prefix cache), `chunk=16` (prompt tokens per step), and every
    option of `Engine`: `dtype=`, `block_size=`, `deterministic=`, `path=`, ... Each can also be an engine, or (engine,
    settings of the run). `model` is the model for engines that are built. `tolerance` is relative; None means a few
    roundings of the coarser dtype.

    Tokens are compared first. Then both sides run again, step by step without replayed graphs, and every layer's output
    is compared wherever both computed it from the same tokens. If the sides use different variants of an op, every op's
    result on the prompt is compared as well.

    >>> import labkit as lk
    >>> lk.divergence({"batch": 1}, {"batch": 4}, "def f(x):", max_tokens=8).same         # doctest: +SKIP
    True
    """
    whole("max_tokens", max_tokens, least=1)
    if tolerance is not None:
        real("tolerance", tolerance, least=0.0)
    asked = (Side.of(a, "a"), Side.of(b, "b"))
    with settled(*asked, model, prompt, max_tokens) as sides:
        one, other = (_look(side, model, prompt, max_tokens) for side in sides)
        if one.ids != other.ids:
            raise ValueError("a and b encode the prompt as different tokens: compare engines with the same model")
        place = first_difference(one.plain, other.plain)
        seen = first_difference(one.handle.output_ids, other.handle.output_ids)
        at = place if seen is None else seen
        ids_a, ids_b = (look.plain if seen is None else look.handle.output_ids for look in (one, other))
        alike = len(one.ids) + (len(ids_a) if at is None else at)  # tokens that are inputs of both
        if tolerance is None:
            tolerance = max(TOLERATED.get(look.dtype, 1e-4) for look in (one, other))
        layers, num_positions = compare_layers(one.hidden, other.hidden, alike, tolerance)
        op = None
        if sides[0].differs_in_ops_only(sides[1]):
            common = [*one.ids, *ids_a[:at]]
            op = first_op([recorded_ops(side, model, common) for side in sides], len(layers) - 1, tolerance)
        differs = at is not None
        return Divergence(
            repr(asked[0]),
            repr(asked[1]),
            num_tokens=max(len(one.plain), len(other.plain)),
            position=at,
            tokens=(one.token(ids_a, at), other.token(ids_b, at)) if differs else ("", ""),
            before=one.text([*one.ids, *ids_a[:at]])[-BEFORE:] if differs else "",
            gaps=(gap(one.handle, at, ids_b[at : at + 1]), gap(other.handle, at, ids_a[at : at + 1]))
            if differs
            else (None, None),
            layers=layers,
            num_positions=num_positions,
            tolerance=tolerance,
            op=op,
            only_replayed=place is not None and seen is None,
        )


@dataclass(frozen=True)
class _Look:
    """What one side produced: its tokens, and a second run with every layer's output."""

    ids: list[int]  # of the prompt
    plain: list[int]
    handle: Handle
    hidden: Hidden
    dtype: torch.dtype
    engine: Engine

    def token(self, ids: list[int], place: int | None) -> str:
        return "" if place is None else token_at(self.engine, ids, place)

    def text(self, ids: list[int]) -> str:
        return text_of(self.engine, ids)


def _look(side: Side, model: Any, prompt: Any, max_tokens: int) -> _Look:
    with side.opened(model) as engine:
        ids: list[int] = prompt_ids(engine, prompt)[0].tolist()
        decoder = engine.runner.model  # type: ignore[attr-defined]
        num_layers = len(decoder.kv)
        size = (num_layers + 1) * (len(ids) + max_tokens) * decoder.hidden_size * 4
        if size > MOST_BYTES:
            raise ValueError(
                f"comparing every layer would keep {size / 2**30:.1f} GiB of hidden states: take a shorter prompt than "
                f"{len(ids)} tokens"
            )
        plain = side.run(engine, ids, SamplingParams(temperature=0, max_tokens=max_tokens)).output_ids
        id = engine.new_id()
        with watched_layers(engine, id) as hidden:
            handle = side.run(engine, ids, SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=NEAR), id)
        return _Look(ids, plain, handle, hidden, decoder.dtype, engine)
