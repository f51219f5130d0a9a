"""Transforms: rewrites that leave the float model unchanged and make it easier to quantize."""

from dither.quant.transforms.scale import ScaleSearch

__all__ = ["ScaleSearch"]
