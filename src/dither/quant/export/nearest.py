"""The nearest re-encoding: a weight that a format cannot hold, on a grid that it can, and what that loses.

Where only the offset is of another kind (``w = s (q - z)`` on the same blocks as ``w = s q + m``), codes and scales stay and m = -s z is rounded to
float16: an error of at most 2^-11 s z a weight, the same for the whole block. Everything else is decoded and rounded to the nearest point of the
new grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dither.formats import Int, QTensor, Scheme


@dataclass(frozen=True)
class Loss:
    """``||W' - W||^2 / ||W||^2`` of a weight that was re-encoded from W to W'."""

    name: str
    scheme: Scheme
    error: float


def reencode(tensor: QTensor, scheme: Scheme) -> tuple[QTensor, float]:
    """``tensor`` on ``scheme``, and the relative squared error of that."""
    old = tensor.dequantize()
    new = _other_offset(tensor, scheme) or _rounded(tensor, scheme)
    power = float(old.double().square().sum())
    return new, float((new.dequantize() - old).double().square().sum()) / power if power else 0.0


def _other_offset(tensor: QTensor, scheme: Scheme) -> QTensor | None:
    """The same codes and scales with a float offset; None where ``scheme`` differs in more than that."""
    old = tensor.scheme
    if not isinstance(old, Scheme) or not isinstance(old.format, Int) or old.blocks != scheme.blocks or old.format.sym:
        return None
    if old.format.zero != "int" or scheme.format != Int(old.format.bits, zero="float", scale=old.format.scale):
        return None
    scale = tensor.params["scale"]
    return QTensor.from_codes(tensor.codes, {"scale": scale, "offset": -scale * tensor.params["zero_point"]}, scheme)


def _rounded(tensor: QTensor, scheme: Scheme) -> QTensor:
    values = tensor.dequantize()
    params = scheme.fit(values)
    return QTensor.from_codes(scheme.encode(values, params), params, scheme)


def told(losses: Sequence[Loss]) -> str:
    """What re-encoding cost, in words: how many weights on which grids, the mean and the worst error."""
    schemes = ", ".join(sorted({str(loss.scheme) for loss in losses}))
    worst = max(losses, key=lambda loss: loss.error)
    mean = sum(loss.error for loss in losses) / len(losses)
    return (
        f"{len(losses)} weights as {schemes}: relative squared error {mean:.1e} on average, {worst.error:.1e} at worst ({worst.name})"
    )
