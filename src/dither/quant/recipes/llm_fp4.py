"""LLM-FP4: 4-bit floating-point weights and inputs by search, with exponents that are shifted beforehand a channel.

Liu, Liu, Huang, Dong, Cheng; EMNLP 2023; arXiv 2310.16836. The search is `rounding.fp4`. What the paper compares with are knobs of the same method,
all with one static scale a tensor of inputs:

    rounds=0, preshift=False, formats="e1m2"   MinMax INT4 (e1m2 is the symmetric integer of 7 steps)
    rounds=0, preshift=False, formats="e2m1"   MinMax FP4
    preshift=False                             the "FPQ baseline": formats and clipping searched
    LLMFP4()                                   FPQ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.formats import Clip, Scheme, WeightScheme, channel, group
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.fp4 import FormatSearch, float_format, start_format


@dataclass(frozen=True, kw_only=True)
class LLMFP4(Method):
    """``formats``: "search" or one format such as "e2m1", of weights and inputs; ``act_formats``: another one for inputs. ``embed``: bits of
    embedding tables (and of a head tied to one); the paper rounds them too. The other knobs are those of `FormatSearch`."""

    name: ClassVar[str] = "llm-fp4"
    source: ClassVar[str] = "arXiv 2310.16836"
    unused: ClassVar[frozenset[str]] = frozenset({"sym", "format", "act_format", "act_group"})  # one scale a tensor of inputs, ``formats``

    group: int | None = None  # section 3.1: a scale an output channel
    act_bits: int | None = 4
    formats: str = "search"
    act_formats: str | None = None  # None: as ``formats``
    preshift: bool = True  # section 3.3
    rounds: int = 3  # the code's search_round; 0: absolute maxima
    search: str = "maxval"  # "bias": the code's multiples of the bias
    low: float = 0.1  # smallest and largest multiple of the absolute maximum that is tried, and how many
    high: float = 1.0
    candidates: int = 91
    shortlist: int | None = 8
    max_rows: int = 512
    codes: str = "nearest"
    sequential: bool = False
    embed: int | None = None

    def scheme(self) -> WeightScheme:
        if self.weights is not None:
            return self.weights
        fmt = start_format(self.bits, self.scale) if self.formats == "search" else float_format(self.formats, self.scale)
        if fmt.bits != self.bits:
            raise ValueError(f"formats: {self.formats} has {fmt.bits} bits, not {self.bits}")
        return fmt @ (channel() if self.group is None else group(self.group))

    def inputs(self) -> Scheme | None:
        """None: the search chooses them."""
        return None

    def embeddings(self) -> Scheme | None:
        """One bias a row, searched on the error of the weights over the same multiples of the maximum as all else."""
        if self.embed is None:
            return None
        clip = Clip(p=2, grid=100, shrink=0.91)  # 1, 0.99, .. 0.1
        return (start_format(self.embed, self.scale) @ channel()).with_clip(clip if self.rounds else None)

    def stages(self) -> Sequence[Part]:
        searched = self.formats == "search"
        same = "search" if searched else self.formats if self.act_bits == self.bits else "start"
        return [
            FormatSearch(
                formats=searched,
                act_bits=self.act_bits,
                act_formats=same if self.act_formats is None else self.act_formats,
                preshift=self.preshift,
                rounds=self.rounds,
                search=self.search,
                grid=(self.low, self.high, self.candidates),
                shortlist=self.shortlist,
                max_rows=self.max_rows,
                codes=self.codes,
                sequential=self.sequential,
            )
        ]
