"""`sensitivity`: which linear layer costs a model most when it alone is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from labkit.core.frames import table
from labkit.core.options import flag, whole
from labkit.quantization.folder import DenseModel
from labkit.quantization.methods import Method, method_of
from labkit.quantization.progress import followed
from labkit.quantization.quality import ROWS, kl
from labkit.quantization.stack import Slot, Stack
from labkit.quantization.texts import Text, windows
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Cost:
    layer: int
    kind: str  # q, k, v, o, gate, up, down
    name: str
    divergence: float  # KL of the output against the dense model, nats a token
    num_bytes: int  # that the dense weight takes in the checkpoint


@dataclass(frozen=True)
class Sensitivity:
    """What each linear layer costs when it alone is quantized. `frame()` has a row a layer, `plot()` is a heatmap."""

    model: str
    method: Method
    costs: tuple[Cost, ...]  # in the order of the model
    num_tokens: int

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(cost.kind for cost in self.costs))

    @property
    def num_layers(self) -> int:
        return 1 + max(cost.layer for cost in self.costs)

    def worst(self, count: int = 5) -> list[str]:
        """Names of the layers that cost most, such as `quantize(skip=)` takes."""
        return [cost.name for cost in sorted(self.costs, key=lambda cost: -cost.divergence)[:count]]

    def frame(self) -> pandas.DataFrame:
        """The layers, the most costly first."""
        rows = sorted(self.costs, key=lambda cost: -cost.divergence)
        return table([(c.name, c.layer, c.kind, c.divergence, c.num_bytes) for c in rows],
                     ["name", "layer", "kind", "divergence", "bytes"])  # fmt: skip

    def plot(self) -> Figure:
        """A plotly heatmap, layer by kind."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        rows = [[self._cost(layer, kind) for layer in range(self.num_layers)] for kind in self.kinds]
        figure = go.Figure(go.Heatmap(
            z=rows, y=self.kinds, colorscale="Viridis", colorbar_title="KL",
            hovertemplate="layer %{x}, %{y}: KL %{z:.3g}<extra></extra>",
        ))  # fmt: skip
        figure.update_layout(**charts.LAYOUT, height=120 + 34 * len(rows), margin={"l": 60, "r": 20, "t": 40, "b": 50})
        figure.update_layout(title=self._title(), xaxis_title="layer")
        figure.update_yaxes(autorange="reversed", showgrid=False)
        return figure

    def _cost(self, layer: int, kind: str) -> float | None:
        return next((cost.divergence for cost in self.costs if (cost.layer, cost.kind) == (layer, kind)), None)

    def _title(self) -> str:
        return f"{self.model}: KL against the dense model with one layer in {self.method}"

    def __repr__(self) -> str:
        first = max(self.costs, key=lambda cost: cost.divergence)
        return (
            f"Sensitivity({self.model}, {self.method}: {len(self.costs)} layers on {self.num_tokens} tokens; most "
            f"costly {first.name}, KL {first.divergence:.2g})"
        )

    def _repr_html_(self) -> str:
        most = max(cost.divergence for cost in self.costs) or 1.0
        cells = []
        for kind in self.kinds:
            line = [escape(kind)]
            for layer in range(self.num_layers):
                value = self._cost(layer, kind)
                line.append("" if value is None else _cell(value, most))
            cells.append(line)
        rows = [[c.name, f"{c.divergence:.3g}"] for c in sorted(self.costs, key=lambda cost: -cost.divergence)]
        return style.page(
            style.title(self._title()),
            style.note(f"in thousandths of a nat a token, on {self.num_tokens} tokens"),
            style.table(["", *map(str, range(self.num_layers))], cells),
            style.section("all layers, the most costly first", style.text_table(["layer", "KL"], rows)),
        )


def _cell(value: float, most: float) -> str:
    share = (value / most) ** 0.5
    ink = "#fff" if share > 0.55 else "currentColor"
    color = f"background:rgba(0,114,178,{share:.2f});color:{ink}"
    return f'<span style="display:block;padding:1px 6px;border-radius:2px;{color}">{1000 * value:.2g}</span>'


def sensitivity(
    model: Any,
    method: str = "int4",
    *,
    texts: Sequence[Text] | None = None,
    num_tokens: int = 1024,
    length: int = 256,
    by: str = "linear",
    device: Any = "cpu",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Quantize one linear layer at a time (with by="layer": all of a decoder layer), and measure how far the model's
    next-token distribution moves.

    `method` and its options are those of `quantize`; gptq and awq round to nearest here. Without texts: files of
    Python's standard library on which the embedded model was not trained.

    >>> import labkit as lk
    >>> found = lk.sensitivity(lk.assets.path("tiny"), num_tokens=256, by="layer", progress=False)
    >>> len(found.costs)
    8
    """
    flag("progress", progress)
    whole("length", length, least=16)
    whole("num_tokens", num_tokens, least=length)
    if by not in ("linear", "layer"):
        raise ValueError(f'by= is "linear" or "layer", got {by!r}')
    chosen = method_of(method, options)
    source = DenseModel(model)
    try:
        layers = source.layers((), False)
        chosen = chosen.fitted(list(layers.values()))
        for name, (outputs, inputs) in layers.items():
            if (reason := chosen.refusal(outputs, inputs)) is not None:
                raise ValueError(f"{chosen} cannot quantize {name}: {reason}")
        ids = windows(source.folder, texts, num_tokens, source.within(length), held_out=True, seed=seed)
        with torch.no_grad():
            costs = _costs(Stack(source, ids.shape[1], device), chosen, ids, by, progress)
        return Sensitivity(source.folder.name, chosen, tuple(costs), ids.numel())
    finally:
        source.close()


def _costs(stack: Stack, method: Method, ids: Tensor, by: str, progress: bool) -> list[Cost]:
    num_layers, length = len(stack.layers), ids.shape[1]
    entering = [stack.embed(ids)]
    for layer in range(num_layers):
        entering.append(stack.run(layer, entering[-1], length))
    tries: list[tuple[int, str, list[Slot]]] = []
    for layer in range(num_layers):
        slots = [slot for shared in stack.slots(layer) for slot in shared]
        tries += [(layer, "all", slots)] if by == "layer" else [(layer, slot.kind, [slot]) for slot in slots]
    found = []
    for layer, kind, slots in followed(tries, len(tries), "layer", progress):
        before = [slot.weight.clone() for slot in slots]
        for slot, weight in zip(slots, before, strict=True):
            slot.weight.copy_(method.round(weight.cpu(), stack.source.dtype).dense)
        x = entering[layer]
        for behind in range(layer, num_layers):
            x = stack.run(behind, x, length)
        for slot, weight in zip(slots, before, strict=True):
            slot.weight.copy_(weight)
        name = slots[0].name if len(slots) == 1 else f"model.layers.{layer}."
        size = sum(weight.numel() for weight in before) * stack.source.dtype.itemsize
        found.append(Cost(layer, kind, name, _divergence(stack, entering[-1], x), size))
    return found


def _divergence(stack: Stack, dense: Tensor, changed: Tensor) -> float:
    total = 0.0
    for given, found in zip(dense.split(ROWS), changed.split(ROWS), strict=True):
        total += kl(stack.logits(given).log_softmax(-1), stack.logits(found).log_softmax(-1)).sum().item()
    return total / len(dense)
