"""Losses between the logits of a float model (the teacher) and of its quantized copy (the student).

KL-Top of OSTQuant (Hu et al., ICLR 2025, arXiv 2501.13987, section 4.3): with I the k largest teacher logits a of a token, c the student's,

    official scripts (softmax first):     p = softmax(a)[I],   l = log_softmax(c)[I]
    text of the paper (softmax over I):   p = softmax(a[I]),   l = log_softmax(c[I])
    loss = mean over tokens of sum_I p (log p - l)

Both are KL(teacher || student) for k = V. For k < V the first is no divergence and can be slightly negative: the tail's share is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_top(student_logits: Tensor, teacher_logits: Tensor, k: int = 1000, after_softmax: bool = True) -> Tensor:
    """The mean over tokens, a scalar of at least float32. Both logits ``[..., V]``; only the student gets a gradient.

    ``after_softmax``: the official scripts' form, else the text's. ValueError for k outside 1 .. V and for logits of unequal shapes.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 1:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, not {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    vocabulary = teacher_logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be within 1 .. {vocabulary}, the size of the vocabulary, not {k}")
    student = _at_least_float32(student_logits)
    teacher = _at_least_float32(teacher_logits.detach())
    top, index = teacher.topk(k, dim=-1)  # [..., k]
    chosen = student.gather(-1, index)
    # log_softmax at I alone: the full [..., V] of it is never made
    log_p = top - (teacher if after_softmax else top).logsumexp(-1, keepdim=True)
    log_q = chosen - (student if after_softmax else chosen).logsumexp(-1, keepdim=True)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))  # 0 log 0 = 0
    return terms.sum(-1).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
