"""Sees any torch model: its blocks and layers, who reads what, and which rewrites leave it unchanged. No list of names anywhere:
structure is found by running the model, and every claim about it is proved numerically."""

from __future__ import annotations

from dither.graph.discovery import discover, discover_block
from dither.graph.fold import apply_scale, apply_shift
from dither.graph.layers import layers_of
from dither.graph.residual import fix_ones, random_rotation, rotate_residual
from dither.graph.structure import Block, Consumer, Layer, Producer, Residual, Site, Structure, Weight
from dither.graph.verify import verified

__all__ = [
    "Block",
    "Consumer",
    "Layer",
    "Producer",
    "Residual",
    "Site",
    "Structure",
    "Weight",
    "apply_scale",
    "apply_shift",
    "discover",
    "discover_block",
    "fix_ones",
    "layers_of",
    "random_rotation",
    "rotate_residual",
    "verified",
]
