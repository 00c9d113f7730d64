"""`quantize`: a dense model's folder -> an ordinary Hugging Face checkpoint folder in a quantized format.

Methods without calibration read, round and write one tensor after the other; the others run the model layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labkit.core.frames import table
from labkit.core.options import flag, whole
from labkit.quantization import awq, gptq
from labkit.quantization.folder import (
    DenseModel,
    Writer,
    appearing,
    check_free,
    copy_texts,
    write_config,
)
from labkit.quantization.methods import AWQ, GPTQ, Method, method_of
from labkit.quantization.moments import Change
from labkit.quantization.progress import followed
from labkit.quantization.texts import Text, windows
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas

CALIBRATION_TOKENS, LENGTH = 16384, 512


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint: `Engine(found.folder)` serves it.

    `frame()` has a row for each quantized layer.
    """

    folder: Path
    source: Path
    method: Method
    bits_per_weight: float  # of the quantized layers, scales included
    bytes_before: int  # of the safetensors
    bytes_after: int
    seconds: float
    changes: tuple[Change, ...]  # without their tensors
    kept: tuple[str, ...]  # linear layers that stay dense, besides the head

    def frame(self) -> pandas.DataFrame:
        """Relative errors of each layer's weight and, for calibrated methods, of its output."""
        rows = [(one.name, one.weight_error, one.output_error) for one in self.changes]
        return table(rows, ["layer", "weight_error", "output_error"])

    @property
    def worst(self) -> Change:
        """The layer with the largest error."""
        return max(self.changes, key=error_of)

    def __repr__(self) -> str:
        what = "output" if self.worst.output_error is not None else "weight"
        dense = f", {len(self.kept)} layers stay dense" if self.kept else ""
        return (
            f"Quantized({str(self.folder)!r}: {self.method}, {len(self.changes)} layers at "
            f"{self.bits_per_weight:.2f} bits a weight{dense}, {style.num_bytes(self.bytes_before)} -> "
            f"{style.num_bytes(self.bytes_after)} in {self.seconds:.1f} s; largest {what} error "
            f"{error_of(self.worst):.1%} in {self.worst.name})"
        )

    def _repr_html_(self) -> str:
        lines = [
            ["method", str(self.method)],
            ["bits a weight", f"{self.bits_per_weight:.2f} in {len(self.changes)} layers"],
            ["bytes", f"{style.num_bytes(self.bytes_before)} \u2192 {style.num_bytes(self.bytes_after)}"],
            ["seconds", f"{self.seconds:.1f}"],
            *(
                [["dense layers", ", ".join(self.kept[:4]) + (" .." if len(self.kept) > 4 else "")]]
                if self.kept
                else []
            ),
        ]
        what = "output" if self.worst.output_error is not None else "weight"
        kinds: dict[str, list[float]] = {}
        for one in self.changes:
            kinds.setdefault(one.name.rpartition(".")[2], []).append(100 * error_of(one))
        bars = [charts.Bar(kind, sum(errors) / len(errors), min(errors), max(errors)) for kind, errors in kinds.items()]
        rows = [
            [one.name, f"{one.weight_error:.2%}", "" if one.output_error is None else f"{one.output_error:.2%}"]
            for one in self.changes
        ]
        every = style.text_table(["layer", "weight error", "output error"], rows)
        return style.page(
            style.title(str(self.folder)),
            style.table([], [[style.short(a), style.short(b, 120)] for a, b in lines], align="ll"),
            style.side_by_side(style.title(f"relative error of the {what} [%], by kind of layer") + charts.bars(bars)),
            style.section("layer by layer", every),
        )


def error_of(change: Change) -> float:
    return change.weight_error if change.output_error is None else change.output_error


def quantize(
    model: Any,
    method: str = "int4",
    *,
    out: str | Path | None = None,
    calibration: Sequence[Text] | None = None,
    num_tokens: int = CALIBRATION_TOKENS,
    length: int = LENGTH,
    skip: Sequence[str] = (),
    head: bool = False,
    overwrite: bool = False,
    device: Any = "cpu",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Quantized:
    """Quantize a dense model (a folder, a hub's name, or an engine that serves one) into the folder `out`.

    | method | is read as | options |
    |---|---|---|
    | int4 | compressed-tensors, pack-quantized | bits, group, symmetric, search |
    | int8 | compressed-tensors, int-quantized (W8A8) | |
    | fp8 | compressed-tensors, float-quantized | block=(128, 128) |
    | nf4 | bitsandbytes | blocksize |
    | gptq | GPTQ v1 | bits, group, symmetric, act_order, search, damp |
    | awq | AWQ gemm | group, zero_point |

    gptq and awq are calibrated on `num_tokens` tokens of the texts in `calibration`, in sequences of `length`; without
    texts, on source files of Python's standard library. Embeddings, experts and routers stay dense, and so do the head,
    unless `head` is True, and layers whose name has a part of `skip` in it.

    >>> import labkit as lk
    >>> found = lk.quantize(lk.assets.path("tiny"), "int8", out="tiny-int8", progress=False)
    >>> eng = lk.Engine(found.folder, num_blocks=64)
    """
    begin = time.monotonic()
    for name, value in (("head", head), ("overwrite", overwrite), ("progress", progress)):
        flag(name, value)
    whole("length", length, least=16)
    whole("num_tokens", num_tokens, least=length)
    chosen = method_of(method, options)
    if calibration is not None and not chosen.needs_texts:
        raise ValueError(f"method {method!r} needs no calibration: leave it out")
    if head and not chosen.may_have_head:
        raise ValueError(f"method {method!r} leaves the head dense: int4, int8, fp8 and nf4 can quantize it")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    source = DenseModel(model)
    try:
        layers = source.layers(skip, head)
        chosen = chosen.fitted(list(layers.values()))
        for name, (outputs, inputs) in layers.items():
            if (reason := chosen.refusal(outputs, inputs)) is not None:
                last = name.rpartition(".")[2]
                raise ValueError(f"{chosen} cannot quantize {name}: {reason}; skip=({last!r},) leaves it dense")
        target = Path(out) if out is not None else Path(f"{_short_name(model, source.folder)}-{method}")
        check_free(target, overwrite)
        ids = None
        if chosen.needs_texts:
            length = source.within(length)
            ids = windows(source.folder, calibration, num_tokens, length, held_out=False, seed=seed)
        with appearing(target, overwrite) as partial, torch.no_grad():
            found = _changes(source, chosen, layers, ids, device)
            changes, size, total = _write(source, partial, followed(found, len(layers), "layer", progress))
            kept = source.kept(layers)
            write_config(source.folder, partial, chosen.config(kept, head, source.dtype))
            copy_texts(source.folder, partial)
        weights = sum(outputs * inputs for outputs, inputs in layers.values())
        return Quantized(
            target, source.folder, chosen, 8 * size / weights, source.num_bytes, total, time.monotonic() - begin,
            tuple(changes), tuple(kept),
        )  # fmt: skip
    finally:
        source.close()


def _short_name(model: Any, folder: Path) -> str:
    """Of the folder that is made: the hub's name of a model, not that of the folder in its cache."""
    if isinstance(model, str) and not Path(model).expanduser().exists():
        return model.rpartition("/")[2].rpartition(":")[2]
    return folder.resolve().name


def _changes(
    source: DenseModel, method: Method, layers: Mapping[str, tuple[int, int]], ids: Any, device: Any
) -> Iterator[Change]:
    """Every quantized layer, in the order in which it is made."""
    if ids is None:
        for name in layers:
            weight = source.read(f"{name}.weight")
            yield Change.of(name, weight, method.round(weight, source.dtype))
        return
    from labkit.quantization.stack import Stack

    stack, length = Stack(source, ids.shape[1], device), ids.shape[1]
    x = stack.embed(ids)
    for layer in range(len(stack.layers)):
        if isinstance(method, GPTQ):
            yield from gptq.quantize_layer(stack, method, layer, x, length, layers)
        else:
            assert isinstance(method, AWQ)
            yield from awq.quantize_layer(stack, method, layer, x, length, layers)
        x = stack.run(layer, x, length)


def _write(source: DenseModel, folder: Path, changes: Iterator[Change]) -> tuple[list[Change], int, int]:
    """Writes what changed, then all other tensors as they are. Returns the changes without their tensors, and the bytes
    of the quantized layers and of all tensors."""
    writer, seen, quantized, written = Writer(folder), [], set(), set()
    size = 0
    for change in changes:
        for name, tensor in change.tensors.items():
            writer.add({name: tensor.cpu()})
            written.add(name)
            if name.startswith(f"{change.name}.") and name != f"{change.name}.bias":
                size += tensor.numel() * tensor.element_size()
        quantized.add(f"{change.name}.weight")
        seen.append(Change(change.name, {}, change.weight_error, change.output_error))
    for name in source.shapes:
        if name not in written and name not in quantized:
            writer.add({name: source.read(name)})
    writer.finish()
    return seen, size, writer.num_bytes
