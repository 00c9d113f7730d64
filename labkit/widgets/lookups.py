"""Why a prefix lookup hit as far as it did: block by block, with the stored prefix that it parted from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.core import frames
from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import Span, hash_blocks, root_hash, span_keys
from labkit.core.events.types import Batch
from labkit.core.request import Request
from labkit.core.shown import Shown
from labkit.core.tokens import as_tokens
from labkit.widgets import svg
from labkit.widgets.style import COLORS, key, legend, plural, short, table, view

if TYPE_CHECKING:
    import pandas

STATE_COLOR = {
    "hit": COLORS["green"],
    "capped": COLORS["sky"],
    "diverged": COLORS["orange"],
    "evicted": COLORS["red"],
    "never seen": COLORS["grey"],
    "no full block": "none",
}
CONTEXT = 12  # tokens shown on either side of the place where two prompts differ


@dataclass(frozen=True)
class Cell:
    """One block of the tokens that were looked up."""

    index: int
    first: int  # its first token
    num_tokens: int
    state: str  # a key of STATE_COLOR
    block: int | None = None  # where it is stored
    common: int = 0  # tokens that it shares with the closest stored one
    step: int | None = None  # evicted when
    request: str | None = None  # the request it was evicted for


@dataclass(frozen=True)
class LookupStory(Shown):
    """Why a lookup hit as far as it did; see `lookup`."""

    what: str  # what was looked up, and when
    num_tokens: int
    num_hit: int
    reason: str
    detail: str
    cells: tuple[Cell, ...]
    here: str = ""  # the tokens around the place where they differ
    there: str = ""  # the closest stored neighbour's

    def frame(self) -> pandas.DataFrame:
        """One row per block of the tokens."""
        return frames.table(
            [(c.index, c.first, c.num_tokens, c.state, c.block, c.common, c.step, c.request) for c in self.cells],
            columns=["index", "first", "tokens", "state", "block", "common", "step", "request"],
        )

    def __repr__(self) -> str:
        lines = [f"{self.what}: {self.num_hit} of {self.num_tokens} tokens hit", f"  {self.reason}: {self.detail}"]
        if self.there:
            lines += [f"  asked:  {self.here}", f"  stored: {self.there}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Cache:
    """A prefix cache as it is now or was earlier."""

    find: Callable[[bytes], int | None]
    ghost: Callable[[bytes], tuple[int, str | None] | None]
    children: Callable[[bytes], list[Any]]  # the tokens of the blocks stored right after this hash


def lookup(
    where: Any,
    what: Any,
    *,
    salt: str | None = None,
    adapter: str | None = None,
    spans: Sequence[Span] = (),
) -> LookupStory:
    """Why a lookup of `what` hits as far as it does, in an engine or a block manager.

    `what` is token ids, text if the engine has a tokenizer, or a request. For a request that was admitted, the log
    tells what the cache held at that moment. Otherwise the cache is taken as it is now.

    >>> lk.explain.lookup(bm, [*range(20), *[99] * 20])
    40 tokens, now: 16 of 40 tokens hit
      diverged: the closest stored prefix differs from token 20 on
    """
    bm = where if isinstance(where, BlockManager) else getattr(where, "blocks", None)
    if not isinstance(bm, BlockManager):
        raise TypeError(f"a BlockManager or an engine is needed, got {where!r}")
    tokenizer = getattr(where, "tokenizer", None)
    decode = None if tokenizer is None else tokenizer.decode
    if isinstance(what, str) and hasattr(where, "request"):
        what = _request_or_text(where, what)
    if isinstance(what, Request):
        salt, adapter, spans, tokens = what.salt, what.adapter_key, what.spans, what.prompt
        batches = getattr(where, "log", None) and _until_admitted(where.log.batches(), what.id)
        if batches is not None and not where.log.num_trimmed:
            asked = f"{what.id}, when it was admitted at step {batches[-1].step}"
            return _story(asked, bm, _then(batches, what.id), tokens, salt, adapter, spans, decode)
        asked = f"{what.id}, now"
    else:
        if isinstance(what, str):
            if not hasattr(tokenizer, "encode"):
                raise TypeError("text needs a tokenizer, and the engine has none: pass token ids")
            what = tokenizer.encode(what)
        tokens = as_tokens(what, "tokens")
        asked = f"{plural(len(tokens), 'token')}, now"
    story = _story(asked, bm, _now(bm), tokens, salt, adapter, spans, decode)
    known = bm.explain(tokens, salt=salt, adapter=adapter, spans=spans)  # also knows of other salts and adapters
    return LookupStory(
        story.what, story.num_tokens, known.num_hit, known.reason, known.detail, story.cells, story.here, story.there
    )


def _request_or_text(engine: Any, what: str) -> Any:
    try:
        return engine.request(what)
    except ValueError:
        if engine.tokenizer is None:
            raise ValueError(
                f"there is no request {what!r}, and no tokenizer to read it as text: give token ids"
            ) from None
        return what


def _now(bm: BlockManager) -> _Cache:
    prefix = bm.prefix

    def ghost(digest: bytes) -> tuple[int, str | None] | None:
        return (prefix.ghost_step[digest], prefix.ghost_for[digest]) if digest in prefix.ghost_step else None

    def children(parent: bytes) -> list[Any]:
        return [prefix.tokens_of[block] for block in prefix._children_of(parent)]

    return _Cache(prefix.block_of.get, ghost, children)


def _until_admitted(batches: list[Batch], id: str) -> list[Batch] | None:
    for i, batch in enumerate(batches):
        if any(event[0] == "Admitted" and event[1] == id for event in batch.events):
            return batches[: i + 1]
    return None


def _then(batches: list[Batch], id: str) -> _Cache:
    """The cache at the moment `id` was admitted, from the events before it."""
    stored: dict[bytes, tuple[int, bytes, bytes]] = {}  # hash -> block, parent, tokens
    ghosts: dict[bytes, tuple[int, str | None]] = {}
    for batch in batches:
        for event in batch.events:
            if event[0] in ("Stored", "Removed") and event[-1] != "gpu":
                continue  # offloaded copies: the lookup is told of them apart
            if event[0] == "Stored":
                _, digests, parents, blocks, tokens, _ = event
                width = len(tokens) // len(blocks)
                for i, block in enumerate(blocks):
                    digest = digests[32 * i : 32 * i + 32]
                    ids = tokens[i * width : (i + 1) * width]
                    stored[digest] = (block, parents[32 * i : 32 * i + 32], ids)
                    ghosts.pop(digest, None)
            elif event[0] == "Removed":
                _, digests, blocks, requests, _ = event
                for i, request in enumerate(requests):
                    digest = digests[32 * i : 32 * i + 32]
                    stored.pop(digest, None)
                    if request != id:  # else the request itself evicted it, after its lookup
                        ghosts[digest] = (batch.step, request)
            elif event[0] == "Cleared":
                stored.clear()
                ghosts.clear()
            elif event[0] == "Admitted" and event[1] == id:
                break

    def find(digest: bytes) -> int | None:
        return stored[digest][0] if digest in stored else None

    def children(parent: bytes) -> list[Any]:
        return [np.frombuffer(ids, np.int32) for _, above, ids in stored.values() if above == parent]

    return _Cache(find, ghosts.get, children)


def _story(
    asked: str,
    bm: BlockManager,
    cache: _Cache,
    tokens: Any,
    salt: str | None,
    adapter: str | None,
    spans: Sequence[Span],
    decode: Callable[[list[int]], str] | None,
) -> LookupStory:
    size, num_tokens = bm.block_size, len(tokens)
    root = root_hash(salt, adapter)
    hashes = hash_blocks(tokens, size, root, span_keys(spans, size))
    usable = bm.usable_blocks(num_tokens, spans, num_tokens)
    found = list(map(cache.find, hashes))
    missed = next((index for index, block in enumerate(found) if block is None), None)
    near, common = None, 0
    if missed is not None:
        siblings = cache.children(hashes[missed - 1] if missed else root)
        near, common = _closest(siblings, tokens[missed * size : (missed + 1) * size])
    cells: list[Cell] = []
    for index, (digest, block) in enumerate(zip(hashes, found, strict=True)):
        step = request = None
        if missed is None or index < missed:
            state = "hit" if index < usable else "capped"
        elif (ghost := cache.ghost(digest)) is not None:
            state, block, (step, request) = "evicted", None, ghost
        else:
            parted = index == missed and near is not None and (common > 0 or index > 0)
            state, block = "diverged" if parted else "never seen", None
        cells.append(Cell(index, index * size, size, state, block, common if index == missed else 0, step, request))
    if num_tokens % size:
        cells.append(Cell(len(hashes), len(hashes) * size, num_tokens % size, "no full block"))
    num_hit = sum(cell.state == "hit" for cell in cells) * size
    reason, detail = _because(cells, missed, size, num_tokens)
    here = there = ""
    if reason == "diverged" and missed is not None:
        at = missed * size + common
        here = _around(tokens, at, decode)
        there = _around(np.concatenate((tokens[: missed * size], near)), at, decode)
    return LookupStory(asked, num_tokens, num_hit, reason, detail, tuple(cells), here, there)


def _closest(siblings: list[Any], wanted: Any) -> tuple[Any, int]:
    """The stored block that agrees with `wanted` for the most tokens, and how many."""
    best, most = None, -1
    for ids in siblings:
        differs = np.flatnonzero(ids != wanted)
        common = int(differs[0]) if len(differs) else len(wanted)
        if common > most:
            best, most = ids, common
    return best, max(most, 0)


def _around(ids: Any, at: int, decode: Callable[[list[int]], str] | None) -> str:
    """The tokens on either side of `at`, with a mark between them."""
    before, after = ids[max(at - CONTEXT, 0) : at].tolist(), ids[at : at + CONTEXT].tolist()
    if decode is None:
        return f"{' '.join(map(str, before))} | {' '.join(map(str, after))}"
    return f"{decode(before)!r} | {decode(after)!r}"


def _because(cells: list[Cell], missed: int | None, size: int, num_tokens: int) -> tuple[str, str]:
    if num_tokens < size:
        return "shorter than a block", f"{num_tokens} tokens do not fill a block of {size}"
    if missed is None:
        if any(cell.state == "capped" for cell in cells):
            return "capped", "at least one token must be computed to have logits"
        return "all full blocks hit", f"the last {num_tokens % size} tokens fill no block"
    cell = cells[missed]
    if cell.state == "evicted":
        whom = f" for request {cell.request!r}" if cell.request is not None else ""
        return "evicted", f"tokens {cell.first}..{cell.first + size - 1} were evicted at step {cell.step}{whom}"
    if cell.state == "diverged":
        return "diverged", f"the closest stored prefix differs from token {cell.first + cell.common} on"
    if missed:
        return "never seen", f"nothing stored goes on after token {cell.first}"
    return "never seen", "no stored block starts with these tokens"


def story_view(story: LookupStory) -> str:
    """The tokens in blocks, coloured by what was found; where two prompts differ, both are shown."""
    counts: dict[str, int] = {}
    for cell in story.cells:
        counts[cell.state] = counts.get(cell.state, 0) + 1
    entries = legend(key(state, STATE_COLOR[state], number) for state, number in counts.items())
    about = f"{story.num_hit:,} of {story.num_tokens:,} tokens hit"
    why = f"<p><b>{short(story.reason)}</b>: {short(story.detail, 200)}</p>"
    texts = ""
    if story.there:
        texts = table([], [["asked", _code(story.here)], ["stored", _code(story.there)]], "ll")
    return view(f"Lookup of {story.what}"[:100], entries, _cells(story.cells), why, texts, about=about)


def _code(text: str) -> str:
    return f"<code>{short(text, 200)}</code>"


def _cells(cells: Sequence[Cell], most: int = 256) -> str:
    across, pitch, high = 16, 53, 44
    shapes = []
    for i, cell in enumerate(cells[:most]):
        y, x = divmod(i, across)
        left, top = x * pitch, y * high
        color = STATE_COLOR[cell.state]
        title = f"tokens {cell.first} to {cell.first + cell.num_tokens - 1}: {cell.state}"
        title += f", block {cell.block}" if cell.block is not None else ""
        title += f" at step {cell.step}" if cell.step is not None else ""
        title += f" for {cell.request}" if cell.request is not None else ""
        shapes.append(svg.text(left + 24, top + 9, f"{cell.first}\u2013{cell.first + cell.num_tokens - 1}", "s c q"))
        if cell.state == "diverged" and cell.common:
            full = 48 * cell.common / cell.num_tokens
            shapes.append(svg.rect(left, top + 13, 48, 24, color, title[:200], ' rx="3"'))
            shapes.append(svg.rect(left, top + 13, full, 24, COLORS["green"], title[:200], ' fill-opacity=".8" rx="3"'))
        else:
            shapes.append(svg.rect(left, top + 13, 48, 24, color, title[:200], ' rx="3"'))
        said = str(cell.block) if cell.block is not None else f"@{cell.step}" if cell.step is not None else ""
        shapes.append(svg.text(left + 24, top + 29, said, f"c {svg.ink(color)}".strip()))
    rest = f'<p class="q">and {len(cells) - most:,} more blocks</p>' if len(cells) > most else ""
    lines = -(-min(len(cells), most) // across)
    return svg.svg(min(len(cells), across) * pitch, lines * high, *shapes) + rest if cells else ""
