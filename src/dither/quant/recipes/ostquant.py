"""OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting.

Hu, Cheng, Yang, et al.; ICLR 2025; arXiv 2501.13987. Rotations and scalings of the whole network are learned (`transforms.learn`) so that the few-bit
model's likeliest logits are the float model's; then everything is folded and the weights are rounded by GPTQ.

    OSTQuant(learn=("R_res", "R_ov"), loss="cross_entropy", init="hadamard")        what SpinQuant (arXiv 2405.16406) learns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.parts import Part
from dither.quant.recipes.quarot import Rotating
from dither.quant.transforms.learn import LEARNED, LearnTransforms


@dataclass(frozen=True, kw_only=True)
class OSTQuant(Rotating):
    """``budget``: "quick" (40 steps of 2 sequences of up to 512 tokens), "normal" (100 of 8, 2048) or "paper" (100 of 32, 2048); ``steps`` and
    ``batch`` replace its own. The other knobs are those of `LearnTransforms` and `Rotating`."""

    name: ClassVar[str] = "ostquant"
    source: ClassVar[str] = "arXiv 2501.13987"

    budget: str = "quick"
    steps: int | None = None  # the scripts: 100
    batch: int | None = None  # the scripts: 4 on each of 8 GPUs
    k_top: int = 1000  # section 4.3
    loss: str = "kl_top"  # section 4.3
    learn: tuple[str, ...] = LEARNED
    init: str = "klt+hadamard"  # the code's --use_klt
    optimizer: str = "riemannian_adam"
    lr: float | None = None  # None: 0.2 in the quick budget, else the scripts' 0.0169; SpinQuant's, of cayley_sgd: 1.5
    lr_scale: float | None = None  # None: 0.01 in the quick budget, else the scripts' 0.00179

    def stages(self) -> Sequence[Part]:
        learning = LearnTransforms(
            budget=self.budget,
            steps=self.steps,
            batch=self.batch,
            k_top=self.k_top,
            loss=self.loss,
            learn=tuple(self.learn),
            init=self.init,
            optimizer=self.optimizer,
            lr=self.lr,
            lr_scale=self.lr_scale,
            weights=self.scheme(),
            online=self.online,
            head_groups=self.head_groups,
        )
        return [learning, *self.weight_stages()]
