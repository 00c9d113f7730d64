"""KV cache blocks as coloured cells: the pool, a table, and usage.

In a pool of more than 512 blocks one cell stands for several blocks, and says so.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.stats import BlockStats, filled_places
from labkit.core.blocks.table import BlockTable, TableOwner
from labkit.widgets import svg
from labkit.widgets.prefix import Decode, tree
from labkit.widgets.style import BLOCK_COLOR, COLORS, key, legend, plural, section, short, view
from labkit.widgets.style import table as rows_of

MOST_CELLS = 512
MOST_TABLES = 24
USED, SHARED, CACHED = (BLOCK_COLOR[name] for name in ("used", "shared", "cached"))


def manager(bm: BlockManager, decode: Decode | None = None) -> str:
    """The whole pool, its tables, and the tree of cached prefixes (as text if a decoder is given)."""
    return view(
        f"BlockManager {bm.num_blocks}\u00d7{bm.block_size}",
        pool(bm),
        tables(bm),
        prefixes(bm, decode),
        about=_about(bm),
    )


def _about(bm: BlockManager) -> str:
    parts = [f"{bm.num_blocks * bm.block_size:,} token places", plural(len(bm.tables.row_of), "table")]
    parts += [f"{plural(bm.num_copied, 'block')} copied on write"] * bool(bm.num_copied)
    parts += [f"{bm.num_evicted} evicted"] * bool(bm.num_evicted)
    parts += [plural(len(bm.pins), "pin")] * bool(bm.pins)
    if bm.host.num_blocks:
        parts.append(f"{int((bm.host.count > 0).sum())} of {bm.host.num_blocks} host blocks in use")
    if bm.offload is not None:
        parts.append(f"host cache {plural(len(bm.offload.host), 'block')}")
        if bm.offload.disk is not None:
            parts.append(f"disk {plural(len(bm.offload.disk), 'block')}")
    return ", ".join([*parts, f"eviction {bm.eviction.name}"])


def pool(bm: BlockManager) -> str:
    """The cells and their legend."""
    filled, _ = filled_places(bm.tables, bm.pool, bm.pins)
    shared = int((bm.pool.count > 1).sum())
    used = bm.num_used
    entries = [
        key("used", USED, used - shared),
        key("shared", SHARED, shared),
        key("cached", CACHED, bm.num_cached),
        key("free", "none", bm.num_free),
    ]
    places = used * bm.block_size
    if places:
        entries.append(
            f'<span class="q">{1 - float(filled.sum()) / places:.1%} of the places in used blocks are empty</span>'
        )
    if spanned := _spanned(bm):
        entries.append(key("with an image or another span", COLORS["sky"], len(spanned)))
    draw = _cells if bm.num_blocks <= MOST_CELLS else _folded
    return legend(entries) + draw(bm, filled)


def _spanned(bm: BlockManager) -> set[int]:
    """Blocks with positions of spans: of live tables, and cached ones."""
    found = set(bm.prefix.spanned())
    for row, keys in list(bm.tables.span_keys.items()):
        blocks = bm.tables.row_blocks(row)
        found.update(blocks[i] for i in keys if i < len(blocks) and blocks[i])
    return found


def _corner(x: float, y: float, size: float) -> str:
    """The mark of a block that holds positions of a span."""
    look = f'fill="{COLORS["sky"]}" stroke="currentColor" stroke-width=".5" pointer-events="none"'
    return f'<path d="M{x:.5g} {y:.5g}h{size:.5g}l{-size:.5g} {size:.5g}z" {look}/>'


def _cells(bm: BlockManager, filled: Any) -> str:
    wide = bm.num_blocks <= 96
    pitch, across, size = (27, 32, 25) if wide else (13, 64, 12)
    count, stored, holders, spanned = bm.pool.count, bm.prefix.stored, _holders(bm), _spanned(bm)
    shapes = []
    for block in range(1, bm.num_blocks + 1):
        y, x = divmod(block - 1, across)
        shapes.append(
            cell(
                x * pitch, y * pitch, size, block, int(count[block]), bool(stored[block]),
                float(filled[block]) / bm.block_size, holders.get(block, ()), numbered=wide, spanned=block in spanned,
            )
        )  # fmt: skip
    num_lines = -(-bm.num_blocks // across)
    return svg.svg(min(bm.num_blocks, across) * pitch, num_lines * pitch, *shapes, alt=repr(bm))


def cell(x: float, y: float, size: float, block: int, count: int, stored: bool, filled: float, holders: Any = (),
         numbered: bool = True, spanned: bool = False) -> str:  # fmt: skip
    """One block. Its colour says who holds it, the filled height how full it is, a number the reference count."""
    color = SHARED if count > 1 else USED if count else CACHED if stored else "none"
    state = f"held {count}\u00d7" if count > 1 else "used" if count else "cached" if stored else "free"
    names = [str(name)[:40] for name in holders]
    whom = f" by {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names else ""
    title = f"block {block}: {state}{whom}"
    if count and filled < 1:
        title += f", {filled:.0%} full"
    title += ", with positions of an image or another span" if spanned else ""
    shapes = [f"<g><title>{escape(title)}</title>"]
    if color == "none":
        shapes.append(svg.rect(x, y, size, size, "none"))
    elif count and filled < 1:
        high = size * filled
        shapes.append(svg.rect(x, y, size, size, color, more=' fill-opacity=".25"'))
        shapes.append(svg.rect(x, y + size - high, size, high, color))
    else:
        shapes.append(svg.rect(x, y, size, size, color))
    look = svg.ink(color) if filled > 0.8 or not count else ""
    if numbered:
        shapes.append(
            svg.text(x + size / 2, y + size / 2 + 3.5, str(block), f"s c {look or ('' if count else 'q')}".strip())
        )
        if count > 1:
            shapes.append(svg.text(x + size - 1.5, y + 8, f"{count}", f"s e {svg.ink(color)}"))
    elif count > 1:
        shapes.append(svg.text(x + size / 2, y + size / 2 + 3.2, str(min(count, 99)), f"s c {svg.ink(color)}"))
    if spanned:
        shapes.append(_corner(x, y, size * 0.3))
    return "".join([*shapes, "</g>"])


def _holders(bm: BlockManager) -> dict[int, list[str]]:
    """block -> the first few tables that hold it."""
    found: dict[int, list[str]] = {}
    for name, row in list(bm.tables.row_of.items())[:MOST_CELLS]:
        for block in bm.tables.row_blocks(row)[: 4 * MOST_CELLS]:
            whom = found.setdefault(block, [])
            if len(whom) < 8:
                whom.append(repr(name))
    for pin in bm.pins[:MOST_CELLS]:
        for block in pin.blocks:
            found.setdefault(block, []).append("a pin")
    return found


def _folded(bm: BlockManager, filled: Any) -> str:
    """Cells of several blocks each, in block order; a cell shows the share of each kind as stacked colours."""
    each = -(-bm.num_blocks // MOST_CELLS)
    num_cells = -(-bm.num_blocks // each)
    at = np.arange(bm.num_blocks) // each
    count, stored = bm.pool.count[1:], bm.prefix.stored[1:]
    kinds = {
        SHARED: count > 1,
        USED: count == 1,
        CACHED: (count == 0) & stored,
    }
    shares = {color: np.bincount(at[mask], minlength=num_cells) for color, mask in kinds.items()}
    sizes = np.bincount(at, minlength=num_cells)
    pitch, size, across = 13, 12, 64
    shapes = []
    for i in range(num_cells):
        y, x = divmod(i, across)
        number, floor = int(sizes[i]), y * pitch + size
        these = {color: int(amounts[i]) for color, amounts in shares.items()}
        said = ", ".join(f"{these[color]} {name}" for name, color in BLOCK_COLOR.items() if these.get(color))
        title = f"blocks {i * each + 1}-{i * each + number}: {said or 'free'}"
        shapes.append(f"<g><title>{title}</title>")
        if sum(these.values()) < number:
            shapes.append(svg.rect(x * pitch, y * pitch, size, size, "none", "", ' fill-opacity="0"'))
        for color, amount in these.items():
            if amount:
                high = size * amount / number
                floor -= high
                shapes.append(svg.rect(x * pitch, floor, size, high, color))
        shapes.append("</g>")
    note = f'<p class="q">each cell stands for {each} blocks, its colours for their shares</p>'
    return note + svg.svg(across * pitch, -(-num_cells // across) * pitch, *shapes, alt=repr(bm))


def tables(bm: BlockManager) -> str:
    """The tables, one per line."""
    names = list(bm.tables.row_of)
    if not names:
        return ""
    strip = _strip if len(names) <= 4 else _numbers
    lines = []
    for name in names[:MOST_TABLES]:
        row = bm.tables.row_of.get(name)
        if row is not None:
            number = len(bm.tables.row_blocks(row))
            lines.append([short(name, 40), f"{int(bm.tables.num_tokens[row]):,}", str(number), strip(bm, row)])
    rest = f"<p class=q>and {len(names) - MOST_TABLES:,} more</p>" if len(names) > MOST_TABLES else ""
    body = rows_of(["table", "tokens", "blocks", "which"], lines, "lrrl")
    return section(plural(len(names), "table"), body, rest, is_open=len(names) <= 4)


def _numbers(bm: BlockManager, row: int, most: int = 16) -> str:
    """The first blocks of a table as text, with their reference counts."""
    blocks, count = bm.tables.row_blocks(row), bm.pool.count
    said = [f"{block}\u00d7{count[block]}" if count[block] > 1 else str(block) for block in blocks[:most] if block]
    return " ".join([*said, *([f"\u2026 +{len(blocks) - most}"] if len(blocks) > most else [])])


def _strip(bm: BlockManager, row: int, most: int = 24) -> str:
    """The first blocks of a table as small cells."""
    blocks, count, spanned = bm.tables.row_blocks(row), bm.pool.count, bm.tables.span_keys.get(row, {})
    held, size = int(bm.tables.num_tokens[row] - bm.tables.dropped[row]), bm.block_size
    shapes = []
    for i, block in enumerate(blocks[:most]):
        full = min(max(held - i * size, 0), size) / size
        if block:
            shapes.append(cell(i * 25, 0, 23, block, int(count[block]), False, full, spanned=i in spanned))
    if len(blocks) > most:
        shapes.append(svg.text(most * 25 + 4, 15, f"+{len(blocks) - most}", "q"))
    return svg.svg(min(len(blocks), most) * 25 + (40 if len(blocks) > most else 0), 23, *shapes)


def prefixes(bm: BlockManager, decode: Decode | None = None) -> str:
    if not len(bm.prefix):
        return ""
    return section(f"{len(bm.prefix):,} hashes in the prefix cache", tree(bm.prefix, decode))


def table(view_of: BlockTable) -> str:
    """A table's blocks in the order of its tokens."""
    bm, name = view_of._manager, view_of.name
    row = bm.tables.row_of.get(name)
    if row is None:
        return view(f"BlockTable {name!r}", about="freed")
    blocks, count, size = bm.tables.row_blocks(row), bm.pool.count, bm.block_size
    num_tokens, copies = int(bm.tables.num_tokens[row] - bm.tables.dropped[row]), bm.copies.get(row, {})
    others = _sharers(bm, row)
    writes = num_tokens // size if bm.must_copy(row, num_tokens) else None
    across, pitch, high, most = 16, 53, 62, 256
    shapes = []
    for i, block in enumerate(blocks[:most]):
        y, x = divmod(i, across)
        left, top = x * pitch, y * high
        shapes.append(svg.text(left + 24, top + 9, f"{i * size}\u2013{(i + 1) * size - 1}", "s c q"))
        if not block:
            shapes.append(svg.rect(left, top + 13, 48, 30, "none", "released: out of the attention window", ' rx="3"'))
            continue
        full = min(max(num_tokens - i * size, 0), size) / size
        shared = others.get(block, [])
        about = f", logical block {i}"
        if i in copies:
            about += f", copied from block {copies[i]} when it was written"
        if i == writes:
            about += ", shared: the next table that writes to it gets its own copy"
        is_spanned = i in bm.tables.span_keys.get(row, ())
        about += ", with positions of an image or another span" if is_spanned else ""
        shapes.append(_place(left, top + 13, block, int(count[block]), full, shared, about, i in copies, i == writes))
        shapes += [_corner(left, top + 13, 9)] if is_spanned else []
        below = f"from {copies[i]}" if i in copies else f"{int(full * size)} of {size}" if full < 1 else ""
        if below:
            shapes.append(svg.text(left + 24, top + 54, below, "s c"))
    lines = -(-min(len(blocks), most) // across)
    rest = f'<p class="q">and {len(blocks) - most:,} more blocks</p>' if len(blocks) > most else ""
    picture = svg.svg(min(max(len(blocks), 1), across) * pitch, max(lines, 1) * high, *shapes, alt=repr(view_of)[:200])
    who = sorted({other for names in others.values() for other in names})
    entries = [key("its own", USED), key("shared", SHARED)]
    if copies:
        entries.append(key("copied on write", COLORS["green"]))
    if who:
        entries.append(f'<span class="q">shares with {short(", ".join(map(repr, who[:8])), 120)}</span>')
    about = f"{plural(num_tokens, 'token')} in {plural(len(blocks), 'block')} of {size}"
    return view(f"BlockTable {name!r}"[:80], legend(entries), picture, rest, about=about)


def _place(x: float, y: float, block: int, count: int, full: float, shared: list[str], about: str, copied: bool,
           written: bool) -> str:  # fmt: skip
    """A block of a table, 48 wide: how full it is, its number and its reference count."""
    color = SHARED if count > 1 else COLORS["green"] if copied else USED
    whom = f", shared with {', '.join(map(repr, shared[:6]))}" if shared else ""
    title = f"block {block}, held {count}\u00d7{whom}{about}"[:300]
    shapes = [
        svg.rect(x, y, 48, 30, color, title, ' rx="3" fill-opacity=".25"'),
        svg.rect(x, y, 48 * full, 30, color, title, ' rx="3"'),
        svg.text(x + 6, y + 19, str(block), svg.ink(color) if full > 0.3 else ""),
    ]
    if count > 1:
        shapes.append(svg.text(x + 44, y + 19, f"\u00d7{count}", f"e {svg.ink(color) if full > 0.9 else ''}".strip()))
    if written:
        shapes.append(
            f'<rect x="{x + 0.5:.5g}" y="{y + 0.5:.5g}" width="47" height="29" rx="3" fill="none" '
            'stroke="currentColor" stroke-dasharray="4 2" stroke-width="1.5" pointer-events="none"/>'
        )
    return "".join(shapes)


def _sharers(bm: TableOwner, row: int) -> dict[int, list[str]]:
    """shared block of this row -> the other tables that hold it."""
    mine = {block for block in bm.tables.row_blocks(row) if block and bm.pool.count[block] > 1}
    found: dict[int, list[str]] = {}
    if not mine:
        return found
    for name, other in list(bm.tables.row_of.items())[:2048]:
        if other != row:
            for block in mine.intersection(bm.tables.row_blocks(other)):
                found.setdefault(block, []).append(name)
    return found


def stats(found: BlockStats) -> str:
    """Block usage, and token slots inside the used blocks."""
    blocks = svg.bar(
        [("used", found.used_blocks, USED), ("cached", found.cached_blocks, CACHED)], 560, 20, total=found.num_blocks
    )
    places = found.used_blocks * found.block_size
    tokens = svg.bar([("tokens", found.used_tokens, COLORS["green"])], 560, 20, total=places or 1)
    hit = (
        "nothing queried" if found.hit_rate is None else f"{found.hit_rate:.1%} of {found.num_queried_tokens:,} tokens"
    )
    lines = [
        [
            "blocks",
            svg.svg(560, 20, blocks),
            f"{found.used_blocks} used, {found.cached_blocks} cached, {found.free_blocks} free",
        ],
        [
            "places in used blocks",
            svg.svg(560, 20, tokens),
            f"{found.used_tokens:,} of {places:,}, waste {found.waste:.1%}",
        ],
        ["prefix cache", "", hit],
        ["tables", "", f"{found.num_tables}, {found.saved_by_sharing:.1%} of their tokens shared"],
    ]
    about = f"{found.num_copied} copied on write, {found.num_evicted} evicted"
    return view(f"BlockStats {found.num_blocks}\u00d7{found.block_size}", rows_of([], lines, align="lll"), about=about)
