"""Which expression computes which pair (v, x): the paper's table 1 as it stands, beside our own (`dither.kernels.bessel_reference.classify`).

    mu_3   (x > 1400 and v < 3.05) or (v > 3.1 and 0.6229 log x - 3.2318 > log v)        the first that holds
    mu_20  (x > 30 and v < 15.3919) or (x > 59.6925 and 0.5113 log x + 0.7939 > log v)
    U_4    (x > 274.2377 and v > 0.3) or v > 163.6993
    U_6    (x > 84.4153 and v > 0.46) or v > 56.9971
    U_9    (x > 35.9074 and v > 0.6) or v > 20.1534
    U_13   (x > 19.6931 and v > 0.7) or v > 12.6964
    else   the fallback

Plesner, Sorensen and Hauberg, ICS 2024, arXiv 2409.08729.
"""

from __future__ import annotations

from torch import Tensor

from dither.kernels.bessel_reference import classify, small_region
from dither.kernels.bessel_shapes import LIMIT, MU_3, MU_20, U_4, U_6, U_9, U_13

TABLES = ("tight", "paper")


def regions_of(v: Tensor, x: Tensor, table: str) -> Tensor:
    """``[N]`` uint8, indices into `dither.kernels.bessel.REGIONS`. ValueError for an unknown table."""
    if table not in TABLES:
        raise ValueError(f"table: must be {' or '.join(map(repr, TABLES))}, not {table!r}")
    ours = classify(v, x)
    if table == "tight":
        return ours
    log_v, log_x = v.log(), x.log()
    region = small_region(x)
    for where, code in (  # the last that holds wins, so the paper's order is turned round
        (((x > 19.6931) & (v > 0.7)) | (v > 12.6964), U_13),
        (((x > 35.9074) & (v > 0.6)) | (v > 20.1534), U_9),
        (((x > 84.4153) & (v > 0.46)) | (v > 56.9971), U_6),
        (((x > 274.2377) & (v > 0.3)) | (v > 163.6993), U_4),
        (((x > 30) & (v < 15.3919)) | ((x > 59.6925) & (0.5113 * log_x + 0.7939 > log_v)), MU_20),
        (((x > 1400) & (v < 3.05)) | ((v > 3.1) & (0.6229 * log_x - 3.2318 > log_v)), MU_3),
    ):
        region.masked_fill_(where, code)
    return region.masked_fill_(ours == LIMIT, LIMIT)
