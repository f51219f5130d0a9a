"""Sees any torch model: its blocks and layers, who reads what, and which rewrites leave it unchanged. No list of names anywhere:
structure is found by running the model, and every claim about it is proved numerically."""

from __future__ import annotations

from dither.graph.discovery import discover, discover_block
from dither.graph.fold import apply_scale, apply_shift
from dither.graph.heads import HeadRotation, find_head_rotations, rotate_heads
from dither.graph.keys import KeyScaling, apply_key_scaling, find_key_scalings
from dither.graph.layers import layers_of
from dither.graph.residual import fix_ones, fold_norms, ones_reflection, random_rotation, rotate_residual
from dither.graph.structure import Block, Consumer, Layer, Producer, Residual, Site, Structure, Weight
from dither.graph.verify import verified
from dither.graph.whole import BlockSites, Whole, discover_whole

__all__ = [
    "Block",
    "BlockSites",
    "Consumer",
    "HeadRotation",
    "KeyScaling",
    "Layer",
    "Producer",
    "Residual",
    "Site",
    "Structure",
    "Weight",
    "Whole",
    "apply_key_scaling",
    "apply_scale",
    "apply_shift",
    "discover",
    "discover_block",
    "discover_whole",
    "find_head_rotations",
    "find_key_scalings",
    "fix_ones",
    "fold_norms",
    "layers_of",
    "ones_reflection",
    "random_rotation",
    "rotate_heads",
    "rotate_residual",
    "verified",
]
