"""RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers.

Li, Xiao, Yang, Gu; ICCV 2023; arXiv 2212.08254. Quantize with the quantizer that the data wants, run with the one that hardware wants, and turn
one into the other: norm outputs channel by channel, then one grid a layer (`transforms.reparameterise`); probabilities of attention to powers of
sqrt 2, run as powers of 2 with two multipliers (`transforms.attention_operands`, `formats.logarithm`: A V is then two sums of shifted values, not
one product of integers). All else per tensor (inputs: `transforms.static_inputs`) or per output channel (weights: `grids.QuantileGrid`), by
quantiles. No hyper-parameters, no reconstruction; 32 images.

Where this differs from the paper's code: z~ is whole, so codes stay the same integers; every grid is fitted on the float model's activations, where
the code fits them one after the other on activations already rounded. What lies outside the blocks (patch embedding, head) stays float unless
``overrides`` names its weights, and inputs of convolutions stay float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dither.formats import Scheme
from dither.quant.grids import MinMax, QuantileGrid
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.nearest import Nearest
from dither.quant.transforms.attention_operands import AttentionOperands
from dither.quant.transforms.reparameterise import Reparameterise
from dither.quant.transforms.static_inputs import StaticInputs


@dataclass(frozen=True, kw_only=True)
class RepQViT(Method):
    """Static few-bit inputs too: ``act_bits`` of layer inputs and attention operands (None: weights only). Baselines are knobs:
    ``search="minmax"``, ``reparameterise=False``, ``softmax="uniform"`` is round-to-nearest per tensor. ``round=False`` leaves the rounding to the
    next method of a chain."""

    name: ClassVar[str] = "repq-vit"
    source: ClassVar[str] = "arXiv 2212.08254"
    unused: ClassVar[frozenset[str]] = frozenset({"act_group", "act_format", "kv_bits"})  # inputs, keys and values have one static scale a tensor

    group: int | None = None  # one scale an output channel
    act_bits: int | None = 4  # table 3: W4A4 and W6A6
    softmax: Literal["log_sqrt2", "log2", "uniform"] | None = "log_sqrt2"  # section 3.3; None: probabilities stay float
    reparameterise: bool = True  # section 3.2
    search: Literal["quantile", "minmax"] = "quantile"  # the code's calibration
    round: bool = True

    def __post_init__(self) -> None:
        for knob, bits in (("bits", self.bits), ("act_bits", self.act_bits)):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{knob} must be 2 to 8, not {bits}")

    def stages(self) -> Sequence[Part]:
        parts: list[Part] = []
        if self.act_bits is not None:
            if self.reparameterise:
                parts.append(Reparameterise(self.act_bits, self.search))
            parts += [AttentionOperands(self.act_bits, self.softmax, self.search), StaticInputs(self.act_bits, self.search)]
        parts.append(QuantileGrid() if self.search == "quantile" else MinMax())
        return [*parts, Nearest()] if self.round else parts

    def inputs(self) -> Scheme | None:
        """None: `StaticInputs` and `Reparameterise` fix each layer's own."""
        return None
