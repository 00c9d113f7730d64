"""Plans, results and other messages as bytes. What is read makes plain data and the few types listed here: nothing is
run, whoever sends it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import numpy as np

from labkit.core.blocks.prefix import Span
from labkit.core.blocks.stubs import Arrival, DiskMoves, DiskWrite, Stub
from labkit.core.captures import Captured, CapturedStep
from labkit.core.edits import Add, Clamp, Edit, Function, Project, Replace
from labkit.core.messagepack import pack, unpack
from labkit.core.params import SamplingParams
from labkit.core.plan import Extras, Join, Plan, Result, TableChanges, TokenLogprobs
from labkit.core.pooling import PoolingParams, PoolingSpec
from labkit.runner.base import Layout

# A plan's columns that nearly every step has, packed without names; all others follow by name where they are not empty.
NUMBERS = ("step", "now", "num_decode", "budget", "reset", "fill_drafts")
COLUMNS = ("rows", "start", "count", "indptr", "feed", "sample_query", "sample_row")
CHANGES = TableChanges._fields
HEAD = struct.Struct(f"<{len(NUMBERS) + len(COLUMNS) + len(CHANGES) + 1}q")
RESULT = struct.Struct("<qdddqq")  # step, seconds, busy, waited, tokens, indptr
_NONE: Any = np.zeros(0, np.int64)
EMPTY = Plan(0, 0, *(_NONE,) * 3, 0, *(_NONE,) * 5)
KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Add, Arrival, Captured, CapturedStep, Clamp, DiskMoves, DiskWrite, Extras, Join, Layout, PoolingParams,
        PoolingSpec, Project, Replace, SamplingParams, Span, Stub, TableChanges, TokenLogprobs,
    )
}  # fmt: skip
NOT_SENT = {"extra_args", "logits_processors", "output_kind", "structured_outputs"}  # of SamplingParams
OF_RESULT = ("errors", "extras", "read", "once", "captured", "edited", "pooled")  # sent where it is there
_INT = np.dtype("<i8")


class Unsendable(ValueError):
    """Something that only lives in this process."""


def plan_bytes(plan: Plan) -> bytes:
    arrays = [getattr(plan, name) for name in COLUMNS] + list(plan.table_changes)
    head = HEAD.pack(*(getattr(plan, name) for name in NUMBERS), *map(len, arrays), len(plan.tokens))
    parts = [head, *(np.ascontiguousarray(array, _INT).tobytes() for array in arrays)]
    parts.append(np.ascontiguousarray(plan.tokens, np.int32).tobytes())
    rest = {}
    for name in OTHERS:
        value, default = getattr(plan, name), getattr(EMPTY, name)
        if value is not default and len(value) and (name != "disk" or value != default):
            rest[name] = pack_any(value)
    if rest:
        parts.append(pack(rest))
    return b"".join(parts)


OTHERS = tuple(name for name in Plan._fields if name not in (*NUMBERS, *COLUMNS, "tokens", "table_changes"))


def read_plan(data: bytes) -> Plan:
    head = HEAD.unpack_from(data)
    at, arrays = HEAD.size, []
    num = len(NUMBERS)
    for length in head[num:-1]:
        arrays.append(np.frombuffer(data, _INT, length, at))
        at += 8 * length
    tokens = np.frombuffer(data, np.int32, head[-1], at)
    at += 4 * head[-1]
    step, now, num_decode, budget, reset, fill_drafts = head[:num]
    rows, start, count, indptr, feed, query, row, *changes = arrays
    plan = Plan(
        step, now, rows, start, count, num_decode, tokens, indptr, feed, query, row, TableChanges(*changes),
        reset=bool(reset), budget=budget, fill_drafts=bool(fill_drafts),
    )  # fmt: skip
    if at < len(data):
        plan = plan._replace(**{name: unpack_any(value) for name, value in unpack(data[at:]).items()})
    return plan


class Reported(NamedTuple):
    """A result, and where the rank's time went, in seconds: computing, and waiting for other ranks."""

    step: int
    result: Result
    busy: float
    waited: float


def result_bytes(step: int, result: Result, busy: float, waited: float) -> bytes:
    num = -1 if result.indptr is None else len(result.indptr)
    parts = [
        RESULT.pack(step, result.seconds, busy, waited, len(result.tokens), num),
        np.ascontiguousarray(result.tokens, np.int32).tobytes(),
        b"" if result.indptr is None else np.ascontiguousarray(result.indptr, _INT).tobytes(),
    ]
    rest = {name: value for name in OF_RESULT if (value := getattr(result, name))}
    if rest:
        parts.append(pack({name: pack_any(value) for name, value in rest.items()}))
    return b"".join(parts)


def read_result(data: bytes) -> Reported:
    step, seconds, busy, waited, num, num_indptr = RESULT.unpack_from(data)
    tokens = np.frombuffer(data, np.int32, num, RESULT.size)
    at, indptr = RESULT.size + 4 * num, None
    if num_indptr >= 0:
        indptr = np.frombuffer(data, _INT, num_indptr, at)
        at += 8 * num_indptr
    rest = unpack(data[at:]) if at < len(data) else {}
    result = Result(tokens, seconds, indptr=indptr, **{name: unpack_any(value) for name, value in rest.items()})
    return Reported(step, result, busy, waited)


# -- anything else: [tag, ...] for what is not a plain value -----------------------------------------------------------


def pack_any(value: Any) -> Any:
    """A value as plain data."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, list(value.shape), value.tobytes()]
    kind = type(value).__name__
    if isinstance(value, SamplingParams):
        return [kind, _params(value)]
    if kind in KINDS and isinstance(value, KINDS[kind]):
        known: Any = value
        names = known._fields if isinstance(value, tuple) else [field.name for field in fields(known)]
        return [kind, {name: pack_any(getattr(value, name)) for name in names}]
    if isinstance(value, (tuple, list)):
        return ["tuple" if isinstance(value, tuple) else "list", *map(pack_any, value)]
    if isinstance(value, dict):
        return ["dict", *([pack_any(key), pack_any(one)] for key, one in value.items())]
    if hasattr(value, "detach"):  # a tensor
        dtype = str(value.dtype)[6:]
        whole = value.detach().cpu().contiguous()
        data = whole.view(-1).numpy() if dtype != "bfloat16" else whole.float().view(-1).numpy()
        return ["tensor", dtype, list(whole.shape), data.tobytes(), data.dtype.str]
    raise Unsendable(f"a {type(value).__name__} cannot be sent to another process: {value!r}")


def _params(params: SamplingParams) -> dict[str, Any]:
    """The fields that a runner reads and that are not at their defaults."""
    found = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if field.name in NOT_SENT or (field.default is not MISSING and value == field.default):
            continue
        found[field.name] = pack_any(value)
    forms = [form_of(processor) for processor in params.logits_processors]
    if forms:
        found["logits_processors"] = pack_any(forms)
    return found


def form_of(processor: Any) -> dict[str, Any]:
    """The form of a grammar, which the other process makes again."""
    form = getattr(processor, "form", None)
    if form is None:
        raise Unsendable(
            f"logits_processors are functions of this process, and the model is computed in others: {processor!r} "
            f"cannot be used with several ranks; logit_bias, allowed_token_ids, bad_words and structured_outputs can"
        )
    return dict(form)


def check_edits(edits: Mapping[int, tuple[Edit, ...]] | None) -> None:
    """Functions are of this process."""
    for layer, several in (edits or {}).items():
        for edit in several:
            if isinstance(edit, Function):
                raise Unsendable(
                    f"edit of layer {layer} is a function of this process, and the model is computed in others: "
                    f"{edit!r} cannot be used with several processes; vectors can"
                )


def unpack_any(value: Any, make_grammar: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag == "array":
        dtype, shape, data = rest
        return np.frombuffer(data, _plain(dtype)).reshape(shape).copy()  # torch warns of what it cannot write to
    if tag == "tensor":
        return _tensor(*rest)
    if tag in ("tuple", "list"):
        return (tuple if tag == "tuple" else list)(unpack_any(one) for one in rest)
    if tag == "dict":
        return {unpack_any(key): unpack_any(one) for key, one in rest}
    if tag not in KINDS:
        raise ValueError(f"a message holds a {str(tag)[:40]!r}, which is not read here")
    given = {name: unpack_any(one) for name, one in rest[0].items()}
    if tag == "SamplingParams":
        forms = given.pop("logits_processors", ())
        given["logits_processors"] = tuple(Form(form) for form in forms)
    return KINDS[tag](**given)


class Form:
    """A grammar that was sent: its form. The receiver makes the grammar, which needs its tokenizer."""

    def __init__(self, form: dict[str, Any]) -> None:
        self.form = form

    def begin(self) -> Any:
        raise ValueError("this process has no tokenizer to make a grammar with")


def _plain(dtype: str) -> np.dtype[Any]:
    found = np.dtype(dtype)
    if found.kind not in "biuf":
        raise ValueError(f"a message holds an array of {found}")
    return found


def _tensor(dtype: str, shape: list[int], data: bytes, stored: str) -> Any:
    import torch

    found = torch.from_numpy(np.frombuffer(data, _plain(stored)).copy()).view(shape)
    return found.to(getattr(torch, dtype)) if isinstance(getattr(torch, dtype, None), torch.dtype) else found
