"""Few-bit weights: the engine, its parts, and one recipe a paper."""

from dither.quant import recipes
from dither.quant.calibration import calibration_batches
from dither.quant.checkpoint import is_checkpoint, load
from dither.quant.engine import compute_dtype, quantize
from dither.quant.judge import Perplexity, perplexity
from dither.quant.linear import QuantEmbedding, QuantLinear
from dither.quant.outcome import Event, LayerReport, Quantized, Report
from dither.quant.parts import Grid, Part, Rounded, Rounding, Transform
from dither.quant.recipe import Chain, Method, Recipe
from dither.quant.top1 import Accuracy, accuracy

__all__ = [
    "Accuracy",
    "Chain",
    "Event",
    "Grid",
    "LayerReport",
    "Method",
    "Part",
    "Perplexity",
    "QuantEmbedding",
    "QuantLinear",
    "Quantized",
    "Recipe",
    "Report",
    "Rounded",
    "Rounding",
    "Transform",
    "accuracy",
    "calibration_batches",
    "compute_dtype",
    "is_checkpoint",
    "load",
    "perplexity",
    "quantize",
    "recipes",
]
