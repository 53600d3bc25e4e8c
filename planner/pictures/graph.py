"""The forward graph coloured by decision: a column per block, a row per operator, arcs for what skips a row."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.formats import format_bytes, format_seconds
from planner.pictures.blocks import DECISIONS, Block, Cell
from planner.pictures.svg import picture, tag, text

ROW, CELL_WIDTH, COLUMN = 21, 152, 214
MAX_ROWS, MAX_COLUMNS = 36, 40


def graph_svg(blocks: Sequence[Block]) -> str:
    """The picture; it is as wide as it needs to be, so a page lets it scroll."""
    parts: list[str] = []
    left, bottom, drawn = 8.0, 0.0, 0
    for block in blocks:
        pieces = [
            range(start, min(start + MAX_ROWS, len(block.cells))) for start in range(0, len(block.cells), MAX_ROWS)
        ]
        if drawn and drawn + len(pieces) > MAX_COLUMNS:
            parts.append(text(left, 14, f"and {len(blocks)} blocks in all", class_="soft"))
            break
        for number, rows in enumerate(pieces):
            times = f" x {block.blocks}" if block.blocks > 1 else ""
            parts.append(_heading(left, block.label, times if number == 0 else f"{times}, continued"))
            parts.extend(_column(left, block, rows))
            bottom = max(bottom, 30.0 + ROW * len(rows))
            left += COLUMN
            drawn += 1
    return picture(left, bottom + 8, parts, "The operators of the forward pass, coloured by what was decided for them")


def _heading(left: float, label: str, suffix: str) -> str:
    short = label if len(label) + len(suffix) <= 28 else f"…{label[-(27 - len(suffix)) :]}"
    return text(left, 16, short + suffix, title=label + suffix)


def _column(left: float, block: Block, rows: range) -> list[str]:
    parts: list[str] = []
    for a, b in block.edges:
        if a in rows and b in rows:
            parts.append(_edge(left, a - rows.start, b - rows.start))
    for position in rows:
        y = 28.0 + ROW * (position - rows.start)
        if position in block.entering:
            parts.append(tag("path", d=f"M{left - 8:g} {y + 8:g}h8", class_="arc"))
        parts.append(_cell(left, y, block.cells[position]))
    return parts


def _cell(left: float, y: float, cell: Cell) -> str:
    size = format_bytes(cell.size_bytes, short=True)
    lines = [f"{cell.target}: {DECISIONS[cell.decision]}", cell.module, cell.source, cell.note]
    lines.append(f"{size}, {format_seconds(cell.seconds) if cell.seconds else 'no time'} a run")
    name = cell.target.removeprefix("aten.").rsplit(".", 1)[0]
    name = name if len(name) <= 16 else f"{name[:15]}…"
    box = tag("rect", x=left, y=y, width=7, height=ROW - 4, rx=2, class_=f"f-{cell.decision}")
    row = tag("rect", x=left, y=y, width=CELL_WIDTH + 24, height=ROW - 4, rx=2, class_="cell band")
    label = text(left + 12, y + 12.5, name, class_="small")
    amount = text(left + CELL_WIDTH + 20, y + 12.5, size, class_="small soft", anchor="end")
    return tag("g", row, box, label, amount, title="\n".join(line for line in lines if line))


def _edge(left: float, a: int, b: int) -> str:
    """From one row to a later one: straight to the next, an arc at the right past others."""
    if b == a + 1:
        x = left + 3.5
        return tag("path", d=f"M{x:g} {28 + ROW * a + ROW - 4:g}v4", class_="arc")
    right = left + CELL_WIDTH + 24
    start, end = 28.0 + ROW * a + ROW / 2 - 2, 28.0 + ROW * b + ROW / 2 - 2
    reach = min(26.0, 5.0 + 1.6 * (b - a))
    return tag("path", d=f"M{right:g} {start:g}c{reach:g} 0 {reach:g} {end - start:g} 0 {end - start:g}", class_="arc")
