"""Number formats, blocks, schemes, and the quantized tensor."""

from dither.formats.blocks import Blocks, channel, group, tensor, tile, token
from dither.formats.clip import Clip, clip_search
from dither.formats.floating import Float
from dither.formats.format import Format, Params
from dither.formats.integer import Int
from dither.formats.qtensor import QTensor
from dither.formats.scheme import MXFP4, NVFP4, Scheme

__all__ = [
    "MXFP4",
    "NVFP4",
    "Blocks",
    "Clip",
    "Float",
    "Format",
    "Int",
    "Params",
    "QTensor",
    "Scheme",
    "channel",
    "clip_search",
    "group",
    "tensor",
    "tile",
    "token",
]
