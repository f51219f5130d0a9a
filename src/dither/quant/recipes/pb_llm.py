"""PB-LLM: Partially Binarized Large Language Models.

Shang, Yuan, Wu, Dong; ICLR 2024; arXiv 2310.00034. A salient share of the weights keeps 8 bits, the others get one bit each. The rounding is
`rounding.partial_binary`, the storage `formats.PartialBinary`; training in this form is `quant.train_partial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.formats import PartialBinary, WeightScheme
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.partial_binary import PartialBinaryColumns, PartialBinaryNearest


@dataclass(frozen=True, kw_only=True)
class PBLLM(Method):
    """``salient``: share of weights at ``high_bits``, chosen by ``metric``; the others have two levels a row (or ``group``) fitted by ``stats``.
    ``compensate=False`` is RTN-PB; with ``metric="magnitude"`` too it needs no data. Extensions of ours: ``refits`` solve the levels for the
    output error and round again; ``act_order``; ``mask="shorter"`` stores the salient places as a list where that takes fewer bits."""

    name: ClassVar[str] = "pb-llm"
    source: ClassVar[str] = "arXiv 2310.00034"
    unused: ClassVar[frozenset[str]] = frozenset({"bits", "sym", "scale", "weights"})

    bits: int = 1  # of most weights
    group: int | None = None  # the scripts' groupsize -1
    salient: float = 0.1  # 1 - low_frac; the scripts have 0.5, 0.8, 0.9, 0.95
    metric: str = "hessian"  # the scripts for large models; "magnitude" is the code's default
    high_bits: int = 8  # section 3.2
    stats: str = "masked"  # "reference" is the code; "lloyd" the best two levels
    compensate: bool = True
    act_order: bool = False
    refits: int = 0
    damp: float = 0.01
    block: int = 128
    mask: str = "shorter"

    def scheme(self) -> WeightScheme:
        return PartialBinary(self.salient, self.high_bits, self.group, self.mask)

    def stages(self) -> Sequence[Part]:
        full = PartialBinaryColumns(
            metric=self.metric, stats=self.stats, compensate=self.compensate, act_order=self.act_order, refits=self.refits,
            damp=self.damp, block=self.block,
        )
        without_data = self.metric == "magnitude" and not self.compensate and not self.refits
        return [PartialBinaryNearest(self.stats) if without_data else full]
