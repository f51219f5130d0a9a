"""Where per-head rotations start: KLT then Hadamard, or a random Hadamard matrix. (R_ov of OSTQuant, R2 of SpinQuant.)

A head g of values is rotated by R_g, W_v[g] <- R_g^T W_v[g], and undone in the columns of the query heads h that read it,
W_o[:, h] <- W_o[:, h] R_g(h) (`dither.graph.heads`, where the heads are found and proved). With flag use_klt of OSTQuant (Hu et al.,
arXiv 2501.13987),

    R_g = V_g H,    V_g: eigenvectors of the covariance of the mean-removed rows [., d] of all W_o[:, h] with g(h) = g

KLT makes the channels uncorrelated, H gives all of them the same variance; H has random signs (`dither.special.random_hadamard`).
Where no Hadamard matrix of order d is known, H is uniformly random. Cost: d^2 O for each query head, and d^3 for each g.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dither.graph import HeadRotation
from dither.graph.structure import matrix_view
from dither.special import random_rotation

Start = Literal["klt+hadamard", "hadamard"]


def klt(rows: Tensor) -> Tensor:
    """``V [d, d]`` float64: eigenvectors, as columns by ascending eigenvalue, of the covariance of ``rows [N, d]`` less their mean."""
    x = rows.detach().double()
    x = x - x.mean(0)
    vectors: Tensor = torch.linalg.eigh(x.mT @ x / max(len(x), 1))[1]
    return vectors


def start_heads(module: nn.Module, rotation: HeadRotation, start: Start = "klt+hadamard", seed: int = 0) -> Tensor:
    """Rotations ``[G, d, d]`` float64 for `dither.graph.rotate_heads`; each head has its own signs. ValueError for another ``start``."""
    if start not in ("klt+hadamard", "hadamard"):
        raise ValueError(f'start must be "klt+hadamard" or "hadamard", not {start!r}')
    mixing = [random_rotation(rotation.size, seed * rotation.heads + g) for g in range(rotation.heads)]
    if start == "hadamard":
        return torch.stack(mixing)
    return torch.stack([klt(head_rows(module, rotation, g)).cpu() @ h for g, h in enumerate(mixing)])


def head_rows(module: nn.Module, rotation: HeadRotation, head: int) -> Tensor:
    """``[N, d]`` float64: the rows of all column runs, of all consumers, that read producer head ``head``."""
    found = []
    for consumer in rotation.site.consumers:
        matrix = (
            matrix_view(module.get_parameter(consumer.parameter), consumer.kind, consumer.swapped).detach().double()
        )
        runs = matrix.reshape(len(matrix), -1, rotation.size)  # [O, H, d]
        found.append(runs[:, rotation.heads_of(consumer).to(runs.device) == head].reshape(-1, rotation.size))
    return torch.cat(found)
