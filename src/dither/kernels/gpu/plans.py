"""The plans worth trying for a product: few, since each costs a compilation."""

from __future__ import annotations

from dither.kernels.gpu.tuning import Plan

FEW = 4  # rows up to which a product without tensor cores may be faster
DECODE_FROM = 32  # rows from which decoding the whole weight first may be


def power_above(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cut(columns: int, block_k: int, parts: int) -> tuple[int, int]:
    """``parts`` parts of how many blocks, and how many parts that makes."""
    blocks = -(-columns // block_k)
    steps = -(-blocks // parts)
    return steps, -(-blocks // steps)


def parts_for(outputs: int, tokens: int, columns: int, block: tuple[int, int, int], programs: int) -> int:
    """Into how many parts (a power of two) the columns are cut, so that about ``programs`` run; each part has two blocks of columns or more."""
    tiles = -(-outputs // block[0]) * -(-tokens // block[1])
    most = max(-(-columns // block[2]) // 2, 1)
    return min(power_above(-(-programs // tiles)), 1 << most.bit_length() - 1, 16)


def tile_plans(tokens: int, outputs: int, columns: int, units: int, *, narrow: bool) -> list[Plan]:
    """Tiles on tensor cores for a device of ``units`` multiprocessors; ``narrow``: both operands have one byte, so blocks of columns are longer."""
    width = min(max(power_above(tokens), 16), 128)
    long = 2 if narrow else 1
    if width <= 32:  # the weights' bytes are what counts: many programs, many loads under way
        blocks = [(64, width, 128 * long, 4, 4, 2), (64, width, 128 * long, 4, 4, 4), (64, width, 64 * long, 4, 5, 4), (128, width, 128, 8, 4, 2),
                  (64, width, 256, 4, 3, 2)]  # fmt: skip
    elif width == 64:
        blocks = [(64, 64, 64 * long, 4, 4, 2), (64, 64, 128 * long, 4, 3, 2), (128, 64, 64 * long, 8, 4, 2), (128, 64, 64 * long, 4, 3, 1)]
    else:
        blocks = [(128, 128, 64 * long, 8, 3, 1), (128, 128, 64 * long, 4, 4, 1), (128, 256, 64, 8, 3, 0), (64, 128, 64 * long, 4, 4, 1),
                  (256, 128, 64, 8, 3, 0)]  # fmt: skip
    found = []
    for o, t, k, warps, stages, waves in blocks:
        parts = parts_for(outputs, tokens, columns, (o, t, k), waves * units) if waves else 1
        plan = Plan("tile", o, t, k, parts, warps, stages)
        if plan not in found:
            found.append(plan)
    return found


def row_plans(columns: int) -> list[Plan]:
    """Rows of x one by one, without tensor cores."""
    whole = max(power_above(columns), 64)
    shapes = [(4, 1024, 4, 1), (4, 2048, 4, 1), (4, 1024, 4, 3), (8, 2048, 8, 1), (2, 2048, 2, 2)]
    found = []
    for o, k, warps, stages in shapes:
        plan = Plan("row", block_o=o, block_t=1, block_k=min(k, whole), warps=warps, stages=stages)
        if plan not in found:
            found.append(plan)
    return found
