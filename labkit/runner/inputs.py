"""A plan's columns as one batch of tensors, and what is drawn after its forward. Knows no model and no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels.lora import Groups as AdapterGroups
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, Model
from labkit.runner.adapters import groups_of
from labkit.runner.features import Elsewhere, Features
from labkit.runner.groups import Groups
from labkit.runner.rows import Rows, shift_of
from labkit.runner.trees import masks_of
from labkit.sampling.sampler import Drawn, Sample, Sampler
from labkit.transfer import put, put_all


class Inputs(NamedTuple):
    batch: Batch
    query_start: np.ndarray  # [entries + 1]
    failed: dict[int, str]  # rows whose images have no features, and why


def inputs_of(
    plan: Plan,
    rows: Rows,
    latest: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    features: Features | Elsewhere | None = None,
    mass: Any = None,
) -> Inputs:
    """The step's inputs on the device of `latest`, which has each row's latest sample. `dtype` is of embeddings;
    `features` computes those of images."""
    size, entries, start, count = rows.layout.block_size, plan.rows, plan.start, plan.count
    device = latest.device
    query_start = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(count, out=query_start[1:])
    total = int(query_start[-1])
    if total == len(entries):  # decode only
        entry, positions = slice(None), start
    else:
        entry = np.repeat(np.arange(len(entries)), count)
        positions = np.arange(total) - query_start[:-1][entry] + start[entry]
    seq_len, at = start + count, positions  # in slots
    if rows.has_dropped:
        dropped = rows.dropped[entries]
        seq_len, at = seq_len - dropped, positions - dropped[entry]
        positions = np.where(rows.by_slot[entries][entry], at, positions)
    index, place = np.divmod(at, size)
    if len(plan.parents):  # drafts of one place lie behind each other in the cache
        positions = start[entry] + plan.offsets()
    blocks = rows.tables[:, entries[entry], index]  # [groups, tokens]
    slots = blocks * size + place
    positions, axes = rotary_positions(plan, rows, positions, entry, query_start)
    tables, lengths = rows.read(entries, seq_len)
    ids = np.zeros(total, np.int64)
    feed = plan.feed
    if len(feed):
        given = np.ones(total, bool)
        given[query_start[feed]] = False
        ids[given] = plan.tokens
    else:
        ids[:] = plan.tokens
    given, failed = given_inputs(plan, rows, query_start, device, dtype, features)
    arrays = {"ids": ids, "positions": positions, "query_start": query_start.astype(np.int32)}
    for i in range(len(tables)):
        arrays |= {f"slots {i}": slots[i], f"table {i}": tables[i], f"lengths {i}": lengths[i]}
    if len(feed):
        arrays |= {"fed": query_start[feed], "fed from": entries[feed]}
    if given is not None:
        arrays["given at"] = given[0]
    if axes is not None:
        arrays |= {"axes at": axes[0], "axes": axes[1]}
    arrays |= (adapted := groups_of(plan, rows))
    there = put_all(arrays, device)
    if len(feed):
        there["ids"][there["fed"]] = latest[there["fed from"]]
    by_group = [(there[f"slots {i}"], there[f"table {i}"], there[f"lengths {i}"]) for i in range(len(tables))]
    batch = Batch(
        token_ids=there["ids"],
        positions=there["positions"],
        slots=by_group[0][0],
        block_table=by_group[0][1],
        query_start=there["query_start"],
        seq_len=by_group[0][2],
        max_query_len=int(count.max()) if len(entries) else 0,
        max_seq_len=int(lengths.max()) if len(entries) else 0,
        group_of=groups.group_of if len(tables) > 1 else (),
        other_groups=tuple(by_group[1:]),
        embeddings=None if given is None else (there["given at"], given[1]),
        axes=None if axes is None else (there["axes at"], there["axes"]),
        both_ways=_both_ways(plan, rows, query_start),
        adapters=AdapterGroups(*(there[name] for name in adapted)) if adapted else None,
        trees=masks_of(plan, device),
        mass=mass,
        routing=_routing(plan, rows, query_start, device),
    )
    return Inputs(batch, query_start, failed)


def rotary_positions(
    plan: Plan, rows: Rows, positions: np.ndarray, entry: Any, query_start: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Rotary positions, where images have several axes: those behind an image are shifted, those of its own tokens
    given by axis: (which tokens, positions [3, n])."""
    if not rows.has_axes[plan.rows].any():
        return positions, None
    places, values = [], []
    positions = positions + rows.shift[plan.rows][entry]
    for i in (plan.start < rows.embedded[plan.rows]).nonzero()[0].tolist():
        start, join = int(plan.start[i]), rows.joins[plan.rows[i]]
        end, at = start + int(plan.count[i]), int(query_start[i])
        mine = np.arange(start, end)
        for span in join.spans if join is not None else ():
            if span.axes is None:
                continue
            begin, stop = max(span.start, start), min(span.end, end)
            if begin < stop:
                places.append(np.arange(begin, stop) - start + at)
                first = mine[begin - start] - (begin - span.start)  # the rotary position where the span starts
                values.append(span.axes[:, begin - span.start : stop - span.start] + first)
            if span.end < end:
                mine[max(span.end - start, 0) :] += shift_of(span)
        positions[at : at + len(mine)] = mine
    if not places:
        return positions, None
    return positions, (np.concatenate(places), np.concatenate(values, 1))


def _routing(plan: Plan, rows: Rows, query_start: np.ndarray, device: torch.device) -> dict[int, Tensor] | None:
    """The experts that are given for this step's tokens, by layer."""
    if not rows.has_routed:
        return None
    entries = (plan.start < rows.routed[plan.rows]).nonzero()[0].tolist()
    if not entries:
        return None
    found: dict[int, np.ndarray] = {}
    for entry in entries:
        start, join = int(plan.start[entry]), rows.joins[plan.rows[entry]]
        at, end = int(query_start[entry]) - start, start + int(plan.count[entry])
        for span in join.spans if join is not None else ():
            begin, stop = max(span.start, start), min(span.end, end)
            if begin >= stop:
                continue
            for layer, experts in (span.routing or {}).items():
                free = np.full((int(query_start[-1]), experts.shape[1]), -1)
                lines = found.setdefault(layer, free)
                lines[at + begin : at + stop] = experts[begin - span.start : stop - span.start]
    return {layer: put(lines, device) for layer, lines in found.items()}


def _both_ways(plan: Plan, rows: Rows, query_start: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Tokens of this step that see each other: (first token, tokens, entry)."""
    found: list[tuple[int, int, int]] = []
    for entry in (rows.both_ways[plan.rows] & (plan.start < rows.embedded[plan.rows])).nonzero()[0].tolist():
        start, join = int(plan.start[entry]), rows.joins[plan.rows[entry]]
        end, at = start + int(plan.count[entry]), int(query_start[entry]) - start
        spans = join.spans if join is not None else ()
        mine = (span for span in spans if span.bidirectional and start <= span.start and span.end <= end)
        found += [(at + span.start, span.length, entry) for span in mine]
    return tuple(found)


def given_inputs(
    plan: Plan,
    rows: Rows,
    query_start: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    features: Features | Elsewhere | None,
) -> tuple[tuple[np.ndarray, Tensor] | None, dict[int, str]]:  # fmt: skip
    """Inputs of this step that a request brings along: which of the step's tokens they are for, and they; and the rows
    whose images failed."""
    if isinstance(features, Elsewhere):
        return None, {}
    parts = []  # (entry, span, first and last of the span's inputs, the step's token where the span starts)
    for entry in (plan.start < rows.embedded[plan.rows]).nonzero()[0].tolist():
        start, join = int(plan.start[entry]), rows.joins[plan.rows[entry]]
        end = start + int(plan.count[entry])
        for span in join.spans if join is not None else ():
            if span.num_inputs and span.start < end and start < span.end:
                at = np.arange(span.length) if span.places is None else span.places
                begin, stop = np.searchsorted(at, (start - span.start, end - span.start)).tolist()
                if begin < stop:
                    parts.append((entry, span, begin, stop, at[begin:stop] + span.start - start + query_start[entry]))
    if not parts:
        return None, {}
    images = [span for _, span, *_ in parts if span.pixels is not None]
    found, errors = ({}, {}) if features is None else (features.of(images), features.errors)
    failed: dict[int, str] = {}
    places, values = [], []
    for entry, span, begin, stop, at in parts:
        if span.embeddings is not None:
            value = put(span.embeddings[begin:stop], device)
        elif span.key in found:
            value = found[span.key][begin:stop]
        else:
            failed[int(plan.rows[entry])] = errors.get(span.key, "this runner computes no image features")
            continue
        places.append(at)
        values.append(value.to(dtype))
    return ((np.concatenate(places), torch.cat(values)) if places else None), failed


def draws_of(plan: Plan, query_start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By draw: the row that it is for, the token whose logits it is drawn from, and how many tokens the row has."""
    index, queries = plan.draws()
    entries = np.searchsorted(query_start, queries, side="right") - 1
    offsets = plan.offsets()[queries] if len(plan.parents) else queries - query_start[entries]
    return plan.sample_row[index], queries, plan.start[entries] + offsets + 1


def draw(
    plan: Plan, query_start: np.ndarray, hidden: Tensor, model: Model, sampler: Sampler, latest: Tensor, sample: Sample
) -> Drawn | None:
    """Draw the plan's samples from the forward's output [tokens, hidden size], and note them in `latest`."""
    if not len(plan.sample_row):
        return None
    rows, queries, known = draws_of(plan, query_start)
    arrays = {"queries": queries}
    if plan.num_decode < len(plan.rows):  # n samples may share a query
        arrays["queries"], inverse = np.unique(queries, return_inverse=True)
        if len(inverse) > len(arrays["queries"]):
            arrays["again"] = inverse
    there = put_all(arrays, latest.device)
    at, again = there["queries"], there.get("again")
    if model.adapters is not None:
        model.adapters.select(at)
    return draw_from(plan, hidden[at], rows, known, model, sampler, latest, sample, again)


def draw_from(
    plan: Plan, hidden: Tensor, rows: np.ndarray, known: np.ndarray, model: Model, sampler: Sampler, latest: Tensor,
    sample: Sample, again: Tensor | None = None,
) -> Drawn:  # fmt: skip
    """Draw one token for each of `rows`, which have `known` tokens, from its line of `hidden`; or from the line that
    `again` names."""
    found = model.greedy(hidden) if sampler.greedy[rows].all() else None
    if found is not None:
        tokens, chosen = found if again is None else (found[0][again], found[1][again])
        drawn = Drawn(tokens, chosen, {})
    else:
        drafted = plan if len(plan.drafts) else None
        plain = drafted is None and sampler.plain[rows].all()  # nothing is computed on the logits before the draw
        logits = (model.scores if plain else model.logits)(hidden)
        drawn = sampler.draw(logits if again is None else logits[again], rows, known, sample, drafted)
    latest[put(rows, latest.device)] = drawn.tokens
    return drawn
