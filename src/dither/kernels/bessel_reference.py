"""log I_v(x) and log K_v(x) in torch, on any device: what the C++ kernel must agree with, and what runs on CUDA.

With w = sqrt(v^2 + x^2), y = 1 / w, tau = (v y)^2, q = x^2 / 4:

    mu_K   v^2 << x       log I = x + log((1 + s)^2 / (2 pi x)) / 2,        s = sum c_k,  c_k = -c_{k-1} (4 v^2 - (2k-1)^2) / (8 k x)
                          log K = -x + log((1 + s)^2 pi / (2 x)) / 2,       the same with +
    U_K    w >> 1         log I = w - v asinh(v/x) + log((1 + s)^2 y / (2 pi)) / 2,    s = sum y^k p_k(tau)
                          log K = -(w - v asinh(v/x)) + log((1 + s)^2 pi y / 2) / 2,   s = sum (-y)^k p_k(tau)
    small  x <= 30        log I = v log(x/2) + log(S / Gamma(1 + v)),       S = sum q^k / (k! (v+1)_k)
           x <= 1         log K by Temme's series and the recurrence upwards
           x <= 30        log K = -x + log(sum' h exp(-x (cosh t_j - 1)) cosh(v t_j)),  h = 1/8  (trapezoidal rule: every bit, since the
                          integrand is analytic in a strip)

These are Hankel's, Debye's (whose two logarithms are merged here) and the power series, DLMF 10.40, 10.41, 10.25; the regions are those of
Plesner, Sorensen and Hauberg (arXiv 2409.08729), table 1. The main term of U_K is a difference of two numbers of size w, of which nothing may be
left: it is summed in pairs of doubles, the logarithm included (`_log`). All terms of the small series are positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dither.kernels import bessel_shapes as shapes
from dither.kernels.bessel_shapes import BesselTables

Pair = tuple[Tensor, Tensor]
HUGE = 2.0**500  # larger orders and arguments are scaled down before they are squared


def classify(v: Tensor, x: Tensor) -> Tensor:
    """The region of each pair, uint8: the paper's table 1 with more terms in Debye's expansions, until ratios too have full precision, and
    Hankel's expansion only where v^2 < 2 x."""
    square = v * v
    region = small_region(x)
    for where, code in (  # the last that holds wins
        (((x > 19.6931) & (v > 0.7)) | (v > 12.7), shapes.U_20),
        (((x > 35.9074) & (v > 0.6)) | (v > 30), shapes.U_13),
        (((x > 84.4153) & (v > 0.46)) | (v > 57), shapes.U_9),
        (((x > 274.2377) & (v > 0.3)) | (v > 164), shapes.U_7),
        ((x > 30) & (square < 2 * x), shapes.MU_20),
        (((x > 1400) & (v < 3.05)) | ((v > 3.1) & (square < 0.002 * x)), shapes.MU_3),
        (~((v >= 0) & (x > 0) & (v < math.inf) & (x < math.inf)), shapes.LIMIT),
    ):
        region.masked_fill_(where, code)
    return region


def small_region(x: Tensor) -> Tensor:
    """The region by x alone, for pairs that no expansion covers."""
    region = torch.full_like(x, shapes.SMALL_30, dtype=torch.uint8)
    for bound, code in ((8, shapes.SMALL_8), (3, shapes.SMALL_3), (1, shapes.SMALL_1)):
        region.masked_fill_(x <= bound, code)
    return region


def bessel_reference(kind: str, v: Tensor, x: Tensor, tables: BesselTables, regions: Tensor, ratio: bool, sort: bool) -> tuple[Tensor, Tensor | None]:
    """Arguments as `dither.kernels.log_bessel`."""
    value = torch.full_like(v, math.nan)
    second = torch.full_like(v, math.nan) if ratio else None
    for code, run in _expressions(kind, tables).items():
        where = regions == code
        if sort:
            places = where.nonzero().squeeze(1)
            if places.numel():
                value[places], found = run(v[places], x[places], ratio)
                if second is not None:
                    second[places] = found
        else:  # 1 and 40 are harmless arguments everywhere
            found_value, found = run(torch.where(where, v, 1.0), torch.where(where, x, 40.0), ratio)
            value = torch.where(where, found_value, value)
            if second is not None:
                second = torch.where(where, found, second)
    return value, second


def _expressions(kind: str, tables: BesselTables) -> dict[int, Callable[[Tensor, Tensor, bool], Pair]]:
    small = _small_i if kind == "I" else _small_k
    made: dict[int, Callable[[Tensor, Tensor, bool], Pair]] = {}
    for code in shapes.HANKEL:
        made[code] = partial(_hankel, kind, shapes.HANKEL[code])
    for code in shapes.DEBYE:
        made[code] = partial(_debye, kind, shapes.DEBYE[code], tables)
    for code in shapes.SERIES:
        made[code] = partial(small, code, tables)
    made[shapes.LIMIT] = lambda v, x, ratio: _limit(kind, v, x)
    return made


# -- large arguments, large orders -----------------------------------------------------------------------------------------------


def hankel_sums(kind: str, terms: int, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sum c_k``, ``sum k c_k`` and ``sum k^2 c_k`` over k = 1 .. ``terms``."""
    y, mu = (-1.0 if kind == "I" else 1.0) / x, 4 * v * v
    c = torch.ones_like(x)
    s, d, e = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for k in range(1, terms + 1):
        c = c * (mu - (2 * k - 1) ** 2) * (y * (1 / (8 * k)))
        s, d, e = s + c, d + k * c, e + k * k * c
    return s, d, e


def _hankel(kind: str, terms: int, v: Tensor, x: Tensor, ratio: bool) -> Pair:
    y = 1 / x
    s, d, _ = hankel_sums(kind, terms, v, x)
    sign, constant = (1.0, 0.5 / math.pi) if kind == "I" else (-1.0, 0.5 * math.pi)
    value = sign * x + 0.5 * torch.log((1 + s) * (1 + s) * y * constant)
    return value, 1 - (sign * (0.5 * y + y * d / (1 + s)) + v * y)


def _debye(kind: str, terms: int, tables: BesselTables, v: Tensor, x: Tensor, ratio: bool) -> Pair:
    large = torch.maximum(v, x) > HUGE
    scale = torch.ones_like(v).masked_fill_(large, 2.0**-600)
    p = v * scale
    w, w_low = _hypot(p, x * scale)
    y, inverse = scale / w, 1 / w
    tau = (p * inverse) ** 2
    sign = 1.0 if kind == "I" else -1.0
    s = double_horner(tables.u, terms, tau, sign * y) * (sign * y)
    # asinh(v/x) = log((v + w) / x), in two parts
    top, top_low = _two_sum(p, w)
    high, low = _log_quotient(top, top_low + w_low, x, torch.where(large, 600, 0), tables.logs)
    product, product_low = _two_product(v, high)
    w, w_low = w / scale, w_low / scale
    main, main_low = _two_sum(w, -product)
    main_low = main_low + (w_low - product_low - v * low)
    constant = 0.5 / math.pi if kind == "I" else 0.5 * math.pi
    value = sign * main + (sign * main_low + 0.5 * torch.log((1 + s) * (1 + s) * y * constant))
    if not ratio:
        return value, value
    shifted = double_horner(tables.w, terms, tau, sign * y) * (sign * y)
    return value, x / (v + w) + x / w * (shifted / (1 + s))


def double_horner(table: Tensor, terms: int, tau: Tensor, y: Tensor) -> Tensor:
    """``sum_k y^(k-1) sum_j table[k-1, j] tau^j`` over ``terms`` rows."""
    total = torch.zeros_like(tau)
    for k in range(terms, 0, -1):
        row = table[k - 1]
        inner = row[k].expand_as(tau)
        for j in range(k - 1, -1, -1):
            inner = torch.addcmul(row[j], inner, tau)
        total = torch.addcmul(inner, total, y)
    return total


# -- small arguments and orders ----------------------------------------------------------------------------------------------------


def _small_i(code: int, tables: BesselTables, v: Tensor, x: Tensor, ratio: bool) -> Pair:
    half = 0.5 * x
    q = half * half
    # N_k / P_k = 1 + q/a_k (1 + q/a_{k+1} (...)), a_k = k (k + v): no division until the end; M = dN/dq
    n, p, m = torch.ones_like(x), torch.ones_like(x), torch.zeros_like(x)
    for k in range(shapes.SERIES[code], 1, -1):
        p = p * (k * v + k * k)
        m = n + q * m
        n = p + q * n
    p = p * (v + 1)
    m = n + q * m
    rest = q * n
    n = p + rest
    # 1 / Gamma(1 + v) = (1 + g) / ((1 + f) ... (n + f)) with v = n + f, |f| <= 1/2
    whole = torch.round(v)
    f = v - whole
    g = f * _horner(tables.gamma[1:], f)
    product = torch.ones_like(v)
    for j in range(1, 14):
        product = torch.where(whole >= j, product * (f + j), product)
    excess = rest / p
    small = torch.log1p(g + excess + g * excess)
    value = torch.where(whole == 0, small, torch.log((1 + g) * n / (p * product)))
    log_half = torch.where(x < 1e-300, torch.log(x) - math.log(2), torch.log(half))  # x / 2 may lose digits
    return v * log_half + value, half * m / n


def _small_k(code: int, tables: BesselTables, v: Tensor, x: Tensor, ratio: bool) -> Pair:
    return _temme(v, x, tables) if code == shapes.SMALL_1 else _trapezoid(shapes.TRAPEZOID[code], v, x, tables)


def _temme(v: Tensor, x: Tensor, tables: BesselTables) -> Pair:
    """K for x <= 1: Temme's series for orders a and 1 - a, a <= 1/2 (J. Comput. Phys. 19, 1975), in K scaled by powers of x/2, which stay in
    range; then K_{v+1} = K_{v-1} + (2 v / x) K_v, all of it positive."""
    log_half = torch.log(x) - math.log(2)  # x / 2 may underflow
    half = (0.5 * x).clamp_min(torch.finfo(x.dtype).tiny)
    whole = torch.floor(v)
    f = v - whole
    a = torch.minimum(f, 1 - f)
    power = torch.exp(2 * a * log_half)  # (x/2)^(2 a)
    even, odd = _horner(tables.gamma[0::2], a * a), _horner(tables.gamma[1::2], a * a)
    upper, lower = even + a * odd, even - a * odd  # 1 / Gamma(1 + a), 1 / Gamma(1 - a)
    growth = torch.where(a > 1e-290, -torch.expm1(2 * a * log_half) / (2 * a), -log_half)
    # f, p and q of the series, times (x/2)^a
    term = (growth * even - 0.5 * (1 + power) * odd) / (upper * lower)
    p, q = 0.5 * power / lower, 0.5 / upper
    square, c = half * half, torch.ones_like(x)
    first, second = term, p
    for k in range(1, shapes.TEMME + 1):
        inverse = 1 / (k * k - a * a)
        term = (k * term + p + q) * inverse
        p = p * ((k - a) * inverse)
        q = q * ((k + a) * inverse)
        c = c * (square * (1 / k))
        first = first + c * term
        second = second + c * (p - k * term)
    mirrored = f > 0.5  # first is (x/2)^a K_a, second is (x/2)^(1+a) K_(1-a)
    g = torch.where(mirrored, second / power, first)  # (x/2)^f K_f
    below = torch.where(mirrored, first * (half / power), second / half)  # (x/2)^f K_(f-1)
    for j in range(13):
        going = whole > j
        below, g = torch.where(going, half * g, below), torch.where(going, half * below + (f + j) * g, g)
    return torch.log(g) - v * log_half, below / g


def _trapezoid(count: int, v: Tensor, x: Tensor, tables: BesselTables) -> Pair:
    """K for 1 < x <= 30: h = 1/8 leaves an error of exp(x - 8 pi^2) or less, and the nodes end where terms are below 2^-54 of the sum."""
    h = tables.nodes[1, 0]
    same, below = _Cosines(v * h), _Cosines((v - 1) * h)
    total, shifted = torch.full_like(x, 0.5), torch.full_like(x, 0.5)
    for j in range(1, count):
        falling = torch.exp(-x * tables.nodes[j, 1])
        total = torch.addcmul(total, falling, same.next())
        shifted = torch.addcmul(shifted, falling, below.next())
    return torch.log(total * h) - x, shifted / total


class _Cosines:
    """cosh(j s) for j = 1, 2, ..., from cosh s - 1, so that small s keep their digits (Reinsch)."""

    def __init__(self, s: Tensor) -> None:
        grown = torch.expm1(s)
        self.twice = grown * grown / (1 + grown)  # 2 (cosh s - 1)
        self.step, self.value = -0.5 * self.twice, torch.ones_like(s)

    def next(self) -> Tensor:
        self.step = torch.addcmul(self.step, self.twice, self.value)
        self.value = self.value + self.step
        return self.value


# -- limits ----------------------------------------------------------------------------------------------------------------------


def _limit(kind: str, v: Tensor, x: Tensor) -> Pair:
    value, ratio = torch.full_like(v, math.nan), torch.full_like(v, math.nan)
    zero, far, last = (x == 0) & (v >= 0), (x == math.inf) & (v >= 0) & (v < math.inf), (v == math.inf) & (x >= 0) & (x < math.inf)
    cases: tuple[tuple[Tensor, float, float], ...]
    if kind == "I":
        cases = ((zero & (v > 0), -math.inf, 0.0), (zero & (v == 0), 0.0, 0.0), (far, math.inf, 1.0), (last, -math.inf, 0.0))
    else:
        cases = (
            (zero & (v < 0.5), math.inf, math.inf), (zero & (v == 0.5), math.inf, 1.0), (zero & (v > 0.5), math.inf, 0.0),
            (far, -math.inf, 1.0), (last, math.inf, 0.0),
        )  # fmt: skip
    for where, limit, quotient in cases:
        value.masked_fill_(where, limit)
        ratio.masked_fill_(where, quotient)
    return value, ratio


# -- sums of two doubles ---------------------------------------------------------------------------------------------------------


def _two_sum(a: Tensor, b: Tensor) -> Pair:
    """``a + b`` and its rounding error (Knuth)."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


def _split(a: Tensor) -> Pair:
    """Two halves of 26 bits (Veltkamp)."""
    c = a * 134217729.0
    high = c - (c - a)
    return high, a - high


def _two_product(a: Tensor, b: Tensor) -> Pair:
    """``a b`` and its rounding error (Dekker)."""
    p = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _hypot(a: Tensor, b: Tensor) -> Pair:
    """sqrt(a^2 + b^2)."""
    (aa, a_low), (bb, b_low) = _two_product(a, a), _two_product(b, b)
    s, s_low = _two_sum(aa, bb)
    w = torch.sqrt(s)
    ww, w_low = _two_product(w, w)
    return w, (((s - ww) - w_low) + (s_low + a_low + b_low)) * 0.5 / w


def _log_quotient(a: Tensor, a_low: Tensor, b: Tensor, shift: Tensor, logs: Tensor) -> Pair:
    """``log((a + a_low) 2^shift / b)`` to 2^-70 or so: of the quotient m 2^k, log m = log(1 + (m c - 1)) - log c with c from the table."""
    (ma, ka), (mb, kb) = torch.frexp(a), torch.frexp(b)
    m = ma / mb
    back, back_low = _two_product(m, mb)
    rest = (((ma - back) - back_low) + torch.ldexp(a_low, -ka)) / ma
    small, large = m < 0.75, m > 1.5
    m = torch.where(small, m + m, torch.where(large, 0.5 * m, m))
    k = (ka - kb + shift - small.int() + large.int()).to(m.dtype)
    c, high, low = logs[:, torch.round(m * shapes.LOG_STEPS).long() % shapes.LOG_STEPS]
    product, r_low = _two_product(m, c)
    r = product - 1
    tail = torch.full_like(r, -1 / 12)
    for n in range(11, 2, -1):
        tail = torch.addcmul(_like((-1) ** (n + 1) / n, r), tail, r)
    two = logs[:, shapes.LOG_STEPS]
    square, square_low = _two_product(r, r)
    s, s_low = _two_sum(k * two[1] + high, r)
    s, more = _two_sum(s, -0.5 * square)
    s_low = (s_low + more) + (k * two[2] + low + (r_low - r_low * r) + rest + tail * (r * square) - 0.5 * square_low)
    total = s + s_low
    return total, (s - total) + s_low


def _like(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _horner(coefficients: Tensor, x: Tensor) -> Tensor:
    total = coefficients[-1].expand_as(x)
    for k in range(coefficients.shape[0] - 2, -1, -1):
        total = torch.addcmul(coefficients[k], total, x)
    return total
