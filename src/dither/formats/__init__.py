"""Number formats, blocks, schemes, and the quantized tensor."""

from dither.formats.blocks import Blocks, channel, group, tensor, tile, token
from dither.formats.clip import Clip, clip_search
from dither.formats.codebook import Codebook
from dither.formats.floating import Float
from dither.formats.format import Format, Params
from dither.formats.integer import Int
from dither.formats.logarithm import Log
from dither.formats.names import named_format, named_scheme
from dither.formats.partial import PartialBinary
from dither.formats.qtensor import QTensor
from dither.formats.scheme import MXFP4, NVFP4, Scheme
from dither.formats.stored import WeightScheme, scheme_from_json

__all__ = [
    "MXFP4",
    "NVFP4",
    "Blocks",
    "Clip",
    "Codebook",
    "Float",
    "Format",
    "Int",
    "Log",
    "Params",
    "PartialBinary",
    "QTensor",
    "Scheme",
    "WeightScheme",
    "channel",
    "clip_search",
    "group",
    "named_format",
    "named_scheme",
    "scheme_from_json",
    "tensor",
    "tile",
    "token",
]
