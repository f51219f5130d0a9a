"""Where the error of each method lies: by block for all methods, and by block and kind of layer for one."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from dither.report.heat import HeatScale, Strip, heat
from dither.report.records import CompareRecord, InspectRecord, Row, role
from dither.report.svg import Drawing

UNIT = "relative output error"


def by_block(record: CompareRecord, uid: str) -> Drawing | None:
    """One strip a row: the mean relative output error of each block's layers. None if no row tells of its layers."""
    rows = [row for row in record.rows if row.layers]
    if not rows:
        return None
    columns = block_columns(layer.block for row in rows for layer in row.layers)
    strips = []
    for row in rows:
        cells: dict[int | None, list[float]] = {}
        for layer in row.layers:
            if layer.error is not None:
                cells.setdefault(layer.block, []).append(layer.error)
        strips.append(
            Strip(record.short_title(row), tuple(sum(v) / len(v) if (v := cells.get(c)) else None for c in columns))
        )
    return _both(strips, columns, f"mean {UNIT} of a block", f"{record.model}: error by block", uid)


def by_role(row: Row, scale: HeatScale, uid: str) -> Markup | None:
    """One strip a kind of layer, for one row, in colours comparable with other rows."""
    if not row.layers:
        return None
    columns = block_columns(layer.block for layer in row.layers)
    strips = role_strips(((layer.name, layer.block, layer.error) for layer in row.layers), columns)
    return heat(strips, columns, UNIT, f"{row.title}: error by layer", uid, 340, beside=False, scale=scale)


def layer_scale(record: CompareRecord) -> HeatScale:
    """The colours that all rows of a record share."""
    return HeatScale.over([Strip("", tuple(layer.error for row in record.rows for layer in row.layers))])


def sensitivity(record: InspectRecord, bits: int, scale: HeatScale, uid: str) -> Drawing:
    """One strip a kind of layer: the relative output error of round-to-nearest at ``bits``."""
    columns = block_columns(layer.block for layer in record.layers)
    strips = role_strips(((layer.name, layer.block, layer.rtn_error.get(bits)) for layer in record.layers), columns)
    unit = f"relative output error, {bits} bits rounded to nearest"
    return _both(strips, columns, unit, f"{record.model}: {unit}", uid, scale)


def sensitivity_scale(record: InspectRecord) -> HeatScale:
    """The colours that all widths share."""
    return HeatScale.over([Strip("", tuple(v for layer in record.layers for v in layer.rtn_error.values()))])


def block_columns(blocks: Iterable[int | None]) -> list[int | None]:
    """Every block from the first to the last, then None if something lies outside of them."""
    found = set(blocks)
    inner = [b for b in found if b is not None]
    every: list[int | None] = list(range(min(inner), max(inner) + 1)) if inner else []
    return [*every, None] if None in found else every


def role_strips(cells: Iterable[tuple[str, int | None, float | None]], columns: list[int | None]) -> list[Strip]:
    """``(layer, block, value)`` as one strip a role, in the order that the model runs them; layers outside of the
    blocks share a strip."""
    table: dict[str, dict[int | None, list[float]]] = {}
    for name, block, value in cells:
        known = table.setdefault("outside of the blocks" if block is None else role(name, block), {})
        if value is not None:
            known.setdefault(block, []).append(value)
    return [
        Strip(name, tuple(sum(v) / len(v) if (v := known.get(c)) else None for c in columns))
        for name, known in table.items()
    ]


def _both(
    strips: list[Strip],
    columns: list[int | None],
    unit: str,
    title: str,
    uid: str,
    scale: HeatScale | None = None,
) -> Drawing:
    return Drawing(
        heat(strips, columns, unit, title, f"{uid}w", 760, beside=True, scale=scale),
        heat(strips, columns, unit, title, f"{uid}n", 340, beside=False, scale=scale),
    )
