"""`quantization_report`: one model in several formats, side by side: size, quality, speed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labkit.core.frames import table
from labkit.core.options import flag, whole
from labkit.loading.integers import WiderWeightsWarning
from labkit.models import load_model
from labkit.quantization.folder import DenseModel
from labkit.quantization.methods import METHODS, method_of
from labkit.quantization.progress import followed
from labkit.quantization.quality import Yardstick, decode_speed
from labkit.quantization.quantize import Quantized, quantize
from labkit.quantization.texts import Text, windows
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

    from labkit.models.base import Model

OF_QUANTIZE = ("skip", "head", "num_tokens", "length", "seed")  # options besides those of the method
DECODED = 64  # tokens of each request that speed is measured on
EVERY = ("int8", "fp8", "nf4", "int4", "gptq", "awq")


@dataclass(frozen=True)
class Format:
    """One row."""

    format: str
    bits_per_weight: float  # of the quantized layers
    num_bytes: int  # of the model in memory, embeddings included
    perplexity: float
    divergence: float  # KL(dense || this), nats a token
    agreement: float  # share of positions with the dense model's likeliest token
    tokens_per_s: float  # decode; nan if not measured


@dataclass(frozen=True)
class QuantizationReport:
    """A model in several formats, the dense one first. `frame()` has a row each, `plot()` is quality against bytes."""

    model: str
    rows: tuple[Format, ...]
    num_tokens: int  # that quality was measured on
    speed: str  # how speed was measured

    def __getitem__(self, format: str) -> Format:
        for row in self.rows:
            if row.format == format:
                return row
        raise KeyError(f"{format!r}; the report has {', '.join(row.format for row in self.rows)}")

    def frame(self) -> pandas.DataFrame:
        return table([astuple(row) for row in self.rows], [field.name for field in fields(Format)])

    def plot(self, y: str = "perplexity") -> Figure:
        """A plotly figure of perplexity, divergence, agreement or tokens_per_s over the model's bytes."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ImportError("plot() needs plotly: pip install 'labkit[lab]'") from error
        names = [field.name for field in fields(Format)][3:]
        if y not in names:
            raise ValueError(f"y must be one of {', '.join(names)}, got {y!r}")
        figure = go.Figure()
        for i, row in enumerate(self.rows):
            figure.add_trace(go.Scatter(
                x=[row.num_bytes / 2**20], y=[getattr(row, y)], name=row.format, text=[row.format],
                mode="markers+text", textposition="top center",
                marker={"size": 11, "color": style.HUES[i % len(style.HUES)]},
                hovertemplate=f"{row.format}: %{{x:.3g}} MiB, {y} %{{y:.4g}}<extra></extra>",
            ))  # fmt: skip
        figure.update_layout(**charts.LAYOUT, height=380, margin={"l": 60, "r": 20, "t": 40, "b": 50})
        figure.update_layout(title=self.model, xaxis_title="MiB", yaxis_title=y, showlegend=False)
        figure.update_yaxes(rangemode="normal")
        return figure

    def __repr__(self) -> str:
        head, lines = self._cells()
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        shown = []
        for first, *rest in (head, *lines):
            cells = [first.ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(rest, widths[1:], strict=True))]
            shown.append("  ".join(cells))
        return "\n".join([f"QuantizationReport({self.model}, {self.num_tokens} tokens{self._speed()})", *shown])

    def _repr_html_(self) -> str:
        head, lines = self._cells()
        worse = [charts.Bar(row.format, max(row.divergence, 0.0), color=style.HUES[1]) for row in self.rows[1:]]
        sizes = [charts.Bar(row.format, row.num_bytes / 2**20) for row in self.rows]
        return style.page(
            style.title(f"{self.model} in {len(self.rows)} formats"),
            style.note(f"quality on {self.num_tokens} tokens{self._speed()}"),
            style.text_table(head, lines),
            style.side_by_side(
                style.title("MiB") + charts.bars(sizes),
                style.title("KL against the dense model") + charts.bars(worse),
            ),
        )

    def _speed(self) -> str:
        return f"; {self.speed}" if self.speed else ""

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["format", "bits a weight", "memory", "perplexity", "", "KL", "same token"]
        dense = self.rows[0].perplexity
        lines = [
            [row.format, f"{row.bits_per_weight:.2f}", style.num_bytes(row.num_bytes), f"{row.perplexity:.4g}",
             f"{row.perplexity / dense - 1:+.2%}" if row is not self.rows[0] else "", f"{row.divergence:.2g}",
             f"{row.agreement:.1%}"]
            for row in self.rows
        ]  # fmt: skip
        if self.speed:
            head.append("tokens/s")
            for line, row in zip(lines, self.rows, strict=True):
                line.append(f"{row.tokens_per_s:,.0f}")
        return head, lines


def quantization_report(
    model: Any,
    methods: Sequence[str | tuple[str, dict[str, Any]] | Quantized] = EVERY,
    *,
    texts: Sequence[Text] | None = None,
    calibration: Sequence[Text] | None = None,
    num_tokens: int = 8192,
    length: int = 512,
    speed: bool = True,
    rows: int = 8,
    device: Any = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model by each method into a temporary folder and compare what comes out with the dense model.

    A method is a name, a name with options of `quantize` ("int4", {"group": 32}), or what `quantize` returned. Quality
    is measured on `num_tokens` tokens of `texts` in sequences of `length`; without texts, on files of Python's standard
    library on which the embedded model was not trained. `speed` decodes `rows` requests at once with each.

    >>> import labkit as lk
    >>> found = lk.quantization_report(lk.assets.path("tiny"), ["int8"], num_tokens=512, speed=False, progress=False)
    >>> [row.format for row in found.rows]
    ['bfloat16', 'int8']
    """
    flag("speed", speed)
    flag("progress", progress)
    whole("rows", rows, least=1)
    whole("length", length, least=16)
    whole("num_tokens", num_tokens, least=length)
    tries = [_try(method) for method in ((methods,) if isinstance(methods, (str, Quantized)) else methods)]
    if not tries:
        raise ValueError(f"methods names no format to compare; there are {', '.join(METHODS)}")
    source = DenseModel(model)
    dtype, folder, length = source.dtype, source.folder, source.within(length)
    source.close()
    ids = windows(folder, texts, num_tokens, length, held_out=True, seed=seed)
    dense = load_model(folder, dtype=dtype, device=device, path="native", max_model_len=ids.shape[1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", WiderWeightsWarning)  # the column of memory shows it
        yardstick = Yardstick(dense, ids)
        found = [_row(str(dtype)[6:], 8.0 * dtype.itemsize, dense, yardstick, folder, rows if speed else 0, device)]
        for label, name, options, made in followed(tries, len(tries), "format", progress):
            with tempfile.TemporaryDirectory() as scratch:
                if made is None:
                    made = quantize(
                        folder, name, out=Path(scratch) / name, device=device, progress=False,
                        calibration=calibration if METHODS[name].needs_texts else None, **options,
                    )  # fmt: skip
                loaded = load_model(made.folder, dtype=dtype, device=device, max_model_len=ids.shape[1])
                bits = made.bits_per_weight
                found.append(_row(label, bits, loaded, yardstick, made.folder, rows if speed else 0, device))
    how = f"{rows} requests decode at once on {device}, {torch.get_num_threads()} threads" if speed else ""
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    return QuantizationReport(folder.name, tuple(found), predicted, how)


def _try(method: Any) -> tuple[str, str, dict[str, Any], Quantized | None]:
    """(label, method, its options, what there is already), the options checked."""
    if isinstance(method, Quantized):
        return f"{method.method} in {method.folder.name}", method.method.name, {}, method
    name, options = (method, {}) if isinstance(method, str) else method
    method_of(name, {key: value for key, value in options.items() if key not in OF_QUANTIZE})
    shown = ", ".join(_option(key, value) for key, value in options.items())
    return f"{name}({shown})" if shown else name, name, options, None


def _option(key: str, value: Any) -> str:
    return f"{key}={value}" if not isinstance(value, (list, tuple)) or len(value) < 3 else f"{key}={len(value)} layers"


def _row(
    format: str, bits: float, model: Model, yardstick: Yardstick, folder: Path, speed_rows: int, device: Any
) -> Format:
    quality = yardstick.measure(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.tensors())
    speed = float("nan")
    if speed_rows:
        from labkit.engine.engine import Engine

        engine = Engine(folder, device=device, num_blocks=16 * speed_rows, skip_tokenizer_init=True)
        try:
            speed = decode_speed(engine, speed_rows, DECODED)
        finally:
            engine.close()
    return Format(format, bits, size, quality.perplexity, quality.divergence, quality.agreement, speed)
