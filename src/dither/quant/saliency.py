"""Saliency: how much each weight of a layer matters, for methods that treat a few of them better (PB-LLM, sparse and mixed formats).

    magnitude   v_oc = |W_oc|
    hessian     v_oc = W_oc^2 / U_cc^2,   U_cc^2 = [(H_{c:,c:})^-1]_cc

the second being what the loss ``(w - q) H (w - q)^T / 2`` gains (doubled) by leaving weight c out while all later ones adapt: optimal brain surgeon
(Hassibi & Stork, 1993) with the variance of input c *given the inputs before it*, which is what a column loop meets (GPTQ, SparseGPT).
"""

from __future__ import annotations

from torch import Tensor

METRICS = ("magnitude", "hessian")


def saliency(weight: Tensor, factor: Tensor | None = None, metric: str = "hessian") -> Tensor:
    """``weight [O, I]`` -> ``v [O, I]``, in its type. ``factor [I, I]``: ``U`` upper triangular with ``H^-1 = U^T U``, its inputs in the
    order of the weight's columns. Raises ValueError for an unknown metric, and for "hessian" without a factor."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    if metric == "magnitude":
        return weight.abs()
    if factor is None:
        raise ValueError("metric: 'hessian' needs calibration data; without it only 'magnitude' can be had")
    if factor.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"factor: shape {tuple(factor.shape)}, but the weight has {weight.shape[1]} inputs")
    return (weight / factor.diagonal().to(weight.dtype)).square()
