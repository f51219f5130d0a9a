"""Rotations that cannot be folded away: done to a layer's input at run time, undone in its weights.

    y = x W^T = (x H) (W H)^T          H orthogonal, H^T H = 1

`Turned` wraps a linear layer whose weight is already ``W H``; it is a module of its own, so statistics, rounding and few-bit inputs see the
rotated input, as they must. H is a normalised Hadamard matrix on blocks of ``order`` inputs: O(I log order) additions a row.
"""

from __future__ import annotations

from torch import Tensor, nn

from dither.special.hadamard import apply_hadamard


class Turned(nn.Module):
    """``y = layer(x H)``, H on blocks of ``order`` inputs."""

    def __init__(self, order: int, layer: nn.Module) -> None:
        super().__init__()
        self.order, self.layer = order, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(apply_hadamard(x, self.order))  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The layer's, W H: for models that look at it."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"order={self.order}"


def turn(model: nn.Module, name: str, order: int) -> Turned:
    """Put a `Turned` in place of the module ``name``; its weight is left as it is. Returns it."""
    owner, _, leaf = name.rpartition(".")
    wrapped = Turned(order, model.get_submodule(name))
    setattr(model.get_submodule(owner), leaf, wrapped)
    return wrapped
