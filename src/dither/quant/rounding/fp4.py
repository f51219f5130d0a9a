"""Float formats, scales and per-channel exponents of weights and inputs, searched together on the layer's output.

Liu, Liu, Huang, Dong, Cheng: LLM-FP4, EMNLP 2023, arXiv 2310.16836. For inputs X [T, I] and layers W [O, I] that read them,

    C = sum_layers ||X_hat W_hat^T - X W^T||^2 / ||X W^T||^2        with both sides rounded

    Q(x; b) = 2^(e - M - b) round(clip(x) 2^-(e - M - b)),  e = max(1, floor(log2 |x|) + b)        E exponent, M mantissa bits, real bias b

A real bias is a scale: Q(x; b) = s q(x / s) with s = 2^(b0 - b) and q the grid of `formats.Float`, whose bias is b0. Weights have one b
an output channel (or group), inputs one b a tensor plus a whole number beta_j >= 0 an input channel ("pre-shifted exponent bias"):

    b~_j = 2^E - log2 max_t |X_tj| + log2(2 - 2^-M) - 1        rho = min_j b~_j
    beta_j = clip(round(b~_j), round(rho), round(rho) + 2^E - 1) - round(rho)

X_j is rounded with bias rho + beta_j; as X_j W_oj = (X_j 2^beta_j)(W_oj 2^-beta_j), the inner product needs one scale only. Both roundings
together may clip a channel to half its maximum, which at 8 bits costs more than the shift gains, so our search of rho goes on up to twice the
largest value (the paper's stops at it). `rounds` times:

    1 for every weight format, each channel's best scale, X_hat as it is     3 the best weight format of each layer
    2 for every input format, the best scale, W_hat as it is                 4 the best input format

Each choice may stay where it was, so C never rises. Layers that read one tensor share the input's format, scale and beta, which are judged by the
sum of their errors: then a norm in front of them could hold 2^beta.

Cost. With D = W_hat - W and R = (X_hat - X) W^T fixed, a channel's error is d G d + 2 d (X_hat^T R) + const, G = X_hat^T X_hat. All candidates
(91 a format) are ranked with the diagonal of G in place of G, O I operations each; the ``shortlist`` best are compared exactly, which takes
O I min(T, I) each: by rows where T < I, by G where not. Inputs alike, with A = W_hat^T W_hat and O. Both rankings are made in the first round.
``shortlist=None`` compares all candidates exactly, ten times slower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dither.formats import Float, Params, Scheme, WeightScheme, tensor
from dither.formats import scales as storage
from dither.quant.inputs import InputQuant
from dither.quant.parts import Rounded, Rounding, Task
from dither.quant.rounding.columns import Columns
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import HESSIAN, MAX_ABS, ROWS, Statistics

PIECE = 1 << 18  # values that are rounded at once: they stay in a processor's cache


def float_format(name: str, scale: str = "float16") -> Float:
    """``"e2m1"`` -> `Float` of 2 exponent and 1 mantissa bits, without NaN codes. ValueError where that is no format."""
    found = re.fullmatch(r"e(\d)m(\d)", name)
    if found is None:
        raise ValueError(f"format must be like e2m1 or e4m3, not {name!r}")
    exponent, mantissa = int(found[1]), int(found[2])
    return Float(exponent, mantissa, scale=scale, nan=exponent + mantissa != 7)


def start_format(bits: int, scale: str = "float16") -> Float:
    """Where a search starts: e2m1 at 4 bits (the paper's command line), e4m3 at 8; two exponent bits below 6 bits, else three or four."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits of a float must be 2 to 8, not {bits}")
    exponent = max(1, min(bits - 1, {6: 3, 7: 3, 8: 4}.get(bits, 2)))
    return float_format(f"e{exponent}m{bits - 1 - exponent}", scale)


def search_formats(bits: int, scale: str = "float16") -> tuple[Float, ...]:
    """All formats of ``bits`` bits with one to five exponent bits: M = 0, 1, 2 at 4 bits and 2 .. 6 at 8 (the paper's lists)."""
    return tuple(float_format(f"e{bits - 1 - m}m{m}", scale) for m in range(max(0, bits - 6), bits - 1))


def chosen_formats(formats: str, bits: int, scale: str = "float16") -> tuple[Float, ...]:
    """The formats that ``formats`` names: ``"search"``, ``"start"``, or one of them; the one to start from comes first. ValueError for a format
    of another width."""
    first = start_format(bits, scale)
    if formats == "search":
        return (first, *(f for f in search_formats(bits, scale) if f != first))
    found = first if formats == "start" else float_format(formats, scale)
    if found.bits != bits:
        raise ValueError(f"format {formats} has {found.bits} bits, not {bits}")
    return (found,)


def bias_of(fmt: Float, peak: Tensor) -> Tensor:
    """The real bias ``b`` under which ``peak`` is the largest value: ``2^E - log2 peak + log2(2 - 2^-M) - 1``; inf for 0."""
    largest = 2.0**fmt.exponent - 1 + math.log2(2 - 2.0**-fmt.mantissa)  # log2 of the largest value at bias 0
    return largest - torch.log2(peak.double())


def scale_of(fmt: Float, bias: Tensor) -> Tensor:
    """``s = 2^(b0 - b)``: the scale of `Float`'s grid that is the paper's grid of bias ``b``."""
    return torch.exp2(2.0 ** (fmt.exponent - 1) - 1 - bias)


def preshift(fmt: Float, peaks: Tensor) -> Tensor:
    """``beta [I]`` int8 of channels whose largest magnitudes are ``peaks [I]``: 0 for the largest, up to ``2^E - 1``, which is also that of a
    channel that is always zero."""
    bias = bias_of(fmt, peaks)
    if not bool((peaks > 0).any()):
        return torch.full(peaks.shape, 2**fmt.exponent - 1, dtype=torch.int8, device=peaks.device)
    low = float(bias.min().round())
    return (bias.round().clamp(low, low + 2**fmt.exponent - 1) - low).to(torch.int8)


@dataclass(frozen=True)
class FormatSearch(Rounding):
    """The search as a part.

    ``formats``: whether weights may leave the format of their scheme for another of its width. ``act_bits``: bits of the inputs (None: they
    stay float, and weights alone are searched). ``act_formats``: "search", "start" (e2m1, e4m3) or one format ("e1m2" is the symmetric
    integer). ``preshift``: exponents a channel of the inputs. ``rounds``: 0 = absolute maxima and
    start formats, no search. ``search``: "maxval" tries ``grid`` = (low, high, count) multiples of the absolute maximum; "bias" the
    paper's c b, c = 0.01 + 0.0119 i for i < 100 and 1, which mean other things at other scales of the same weights. ``shortlist``:
    candidates compared exactly (None: all). ``max_rows``: inputs judged by. ``codes``: "nearest", or "columns" = GPTQ on the grids found.
    ``sequential``: inputs of the model as rounded so far, rather than the float model's as in the paper.
    """

    act_bits: int | None = 4
    formats: bool = True
    act_formats: str = "search"
    preshift: bool = True
    rounds: int = 3
    search: str = "maxval"
    grid: tuple[float, float, int] = (0.1, 1.0, 91)
    shortlist: int | None = 8
    max_rows: int = 512
    codes: str = "nearest"
    sequential: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        low, high, count = self.grid
        if self.search not in ("maxval", "bias"):
            raise ValueError(f"search must be 'maxval' or 'bias', not {self.search!r}")
        if self.codes not in ("nearest", "columns"):
            raise ValueError(f"codes must be 'nearest' or 'columns', not {self.codes!r}")
        if not 0 < low <= high or count < 1:
            raise ValueError(f"grid must be (low, high, count) with 0 < low <= high and count >= 1, not {self.grid}")
        if self.rounds < 0 or self.max_rows < 1 or (self.shortlist is not None and self.shortlist < 1):
            raise ValueError(
                f"rounds must be at least 0, max_rows and shortlist at least 1, not {self.rounds}, {self.max_rows}, {self.shortlist}"
            )
        if self.act_bits is not None:
            chosen_formats(self.act_formats, self.act_bits)
        needs = {ROWS, MAX_ABS} | ({HESSIAN} if self.codes == "columns" else set())
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def own_grid(self) -> bool:
        return True

    @property
    def float_inputs(self) -> bool:
        return not self.sequential

    def refuses(self, scheme: WeightScheme) -> str | None:
        if not isinstance(scheme, Scheme) or not isinstance(scheme.format, Float):
            return super().refuses(scheme)  # integers stay on their min-max grid
        if scheme.blocks.height != 1:
            return f"a format search needs blocks of one output channel (channel, group), not {scheme.blocks}"
        if scheme.format.scale == "e4m3":
            return "a format search has no second scale for e4m3 scales"
        return None

    def candidates(self, fmt: Float, start: Tensor, stretch: float = 1.0) -> Tensor:
        """``[C, *start.shape]``: the scales to try, as stored; ``start`` is that of the absolute maximum. ``stretch``: go on in
        steps four times as wide up to this multiple of the grid's upper end."""
        if self.search == "maxval":
            low, high, count = self.grid
            parts = torch.linspace(low, high, count)
            if stretch > 1 and count > 1:
                step = 4 * (high - low) / (count - 1)
                parts = torch.cat([parts, torch.arange(high + step, stretch * high + step / 2, step)])
            wide = start * parts.to(start.device).view(-1, *[1] * start.dim())
        else:
            c = torch.cat([0.01 + 0.0119 * torch.arange(100), torch.ones(1)]).to(start.device)
            wide = scale_of(fmt, c.view(-1, *[1] * start.dim()) * bias_of(fmt, start * fmt.largest)).to(start.dtype)
        return storage.stored(wide, fmt.scale)

    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        return self.round_together([Task(weight, scheme, params)], statistics)[0]

    def round_together(self, tasks: Sequence[Task], statistics: Statistics | None) -> list[Rounded]:
        if statistics is None or statistics.tokens == 0:
            why = "rounded to nearest, input left float: no calibration tokens"
            return [Rounded(nearest(t.weight, t.scheme, t.params), fallback=why) for t in tasks]
        inputs = Inputs(self, statistics, all(task.is_linear for task in tasks))
        layers = [Layer(self, task, inputs.x) for task in tasks]
        started = [layer.error(inputs.rounded()) for layer in layers]
        taken = self._search(inputs, layers)
        x_hat = inputs.rounded()
        shared = inputs.facts()
        found = []
        for layer, task, start in zip(layers, tasks, started, strict=True):
            done = self._codes(layer, task, statistics)
            errors = {"start_error": start, "error": layer.error(x_hat, done.tensor.dequantize(torch.float32))}
            facts = {"weights": str(layer.format), **shared, "rounds": taken, **errors}
            left = "input left float: only linear layers round theirs" if self.act_bits and not inputs.formats else None
            found.append(Rounded(done.tensor, done.loss, done.damp, left or done.fallback, inputs.quant(), facts))
        return found

    def _search(self, inputs: Inputs, layers: Sequence[Layer]) -> int:
        """Returns the number of rounds after which nothing changed any more, at most ``rounds``."""
        for done in range(self.rounds):
            before = [layer.choice() for layer in layers], inputs.choice()
            x_hat = inputs.rounded()
            for layer in layers:
                layer.search_scales(x_hat, inputs.choice())
            if inputs.formats:
                inputs.search_scales(layers)
            x_hat = inputs.rounded()
            for layer in layers:
                layer.search_format(x_hat)
            if inputs.formats:
                inputs.search_format(layers)
            if before == ([layer.choice() for layer in layers], inputs.choice()):
                return done
        return self.rounds

    def _codes(self, layer: Layer, task: Task, statistics: Statistics) -> Rounded:
        scheme, params = layer.grid()
        if self.codes == "columns":
            return Columns().round(task.weight, scheme, params, statistics)
        return Rounded(nearest(task.weight, scheme, params))


@dataclass
class Inputs:
    """How the rows that some layers read are rounded: a format, and for each format a scale and the shift beta."""

    part: FormatSearch
    statistics: Statistics
    rounds: bool  # whether the layers can round their input at run time
    x: Tensor = field(init=False)  # [T, I]
    formats: tuple[Float, ...] = field(init=False)
    format: Float | None = field(init=False)  # None: the inputs stay float

    def __post_init__(self) -> None:
        rows, part = self.statistics.rows, self.part
        self.x = rows[:: -(-len(rows) // part.max_rows)].contiguous()
        self.formats = () if part.act_bits is None or not self.rounds else chosen_formats(part.act_formats, part.act_bits, "float32")
        self.format = self.formats[0] if self.formats else None
        peaks = self.statistics.max_abs
        self._shift: dict[Float, Tensor | None] = {}
        self._start: dict[Float, Tensor] = {}
        self._short: dict[Float, Tensor] = {}
        for fmt in self.formats:
            self._shift[fmt] = preshift(fmt, peaks) if part.preshift else None
            top = peaks.amax()
            self._start[fmt] = storage.stored(torch.where(top > 0, top / fmt.largest, torch.ones_like(top)), fmt.scale)
        self.scale = dict(self._start)
        self._rounded: tuple[Any, Tensor] | None = None
        self._seen: Any = None

    def choice(self) -> tuple[Any, ...]:
        return self.format, tuple(float(s) for s in self.scale.values())

    def rounded(self, fmt: Float | None = None) -> Tensor:
        """``X_hat [T, I]`` in ``fmt`` (default: the chosen one)."""
        fmt = fmt or self.format
        if fmt is None:
            return self.x
        key = fmt, float(self.scale[fmt])
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = key, self._round(fmt)(self.scale[fmt][None])[0]
        return self._rounded[1]

    def _round(self, fmt: Float) -> Callable[[Tensor], Tensor]:
        """scales ``[c]`` -> ``X_hat [c, T, I]``."""
        shift = self._shift[fmt]
        lifted = self.x if shift is None else torch.ldexp(self.x, shift.int())
        down = None if shift is None else torch.exp2(-shift.float())

        def rounded(scales: Tensor) -> Tensor:
            s = scales.view(-1, 1, 1)
            found = fmt.nearest(lifted / s).mul_(s)
            return found if down is None else found.mul_(down)

        return rounded

    def search_scales(self, layers: Sequence[Layer]) -> None:
        """Each format's best scale for the weights as they are rounded now.

        error(scale) = ||E W_hat^T||^2 + 2 <E, (X D^T) W_hat> + const,  E = X_hat - X,  D = W_hat - W, rows weighed by 1 / ||X W^T||^2.
        """
        if self._seen == (seen := [layer.choice() for layer in layers]):
            return
        self._seen = seen
        w_hat = torch.cat([layer.rounded() * layer.root for layer in layers])  # [O, I]
        target = torch.cat([layer.target * layer.root for layer in layers], 1)  # [T, O]
        linear = 2 * (self.x @ w_hat.T - target) @ w_hat  # [T, I]
        diagonal, exact = w_hat.square().sum(0), quadratic_form(w_hat)
        many = max(1, PIECE // max(self.x.numel(), 1))

        def costs_of(scales: Tensor, rounding: Callable[[Tensor], Tensor], form: Callable[[Tensor], Tensor]) -> Tensor:
            costs = []
            for at in range(0, len(scales), many):
                e = rounding(scales[at : at + many]).sub_(self.x)  # (c, T, I)
                costs.append(form(e).sum(-1) + e.mul_(linear).sum((-1, -2)))
            return torch.cat(costs)

        for fmt in self.formats:
            rounding = self._round(fmt)
            if fmt not in self._short:
                shift = self._shift[fmt]
                shifts = shift is not None and bool(shift.any())
                tried = self.part.candidates(fmt, self._start[fmt], 2.0 if shifts else 1.0)
                if self.part.shortlist is not None and len(tried) > self.part.shortlist:
                    costs = costs_of(tried, rounding, lambda e: e.square() @ diagonal)
                    tried = tried[costs.topk(self.part.shortlist, largest=False).indices.sort().values]
                self._short[fmt] = torch.cat([self._start[fmt][None], tried])
            tried = torch.cat([self.scale[fmt][None], self._short[fmt]])
            self.scale[fmt] = tried[int(costs_of(tried, rounding, exact).argmin())]

    def search_format(self, layers: Sequence[Layer]) -> None:
        costs = {fmt: sum(layer.error(self.rounded(fmt)) for layer in layers) for fmt in self.formats}
        best = min(costs.values())
        if self.format is None or costs[self.format] > best:
            self.format = next(fmt for fmt, cost in costs.items() if cost == best)

    def quant(self) -> InputQuant | None:
        if self.format is None:
            return None
        scale = self.scale[self.format].reshape(1, 1)
        return InputQuant(self.format @ tensor(), {"scale": scale}, self._shift[self.format])

    def facts(self) -> dict[str, Any]:
        """How the inputs are rounded, and how much their channels differ: ``between`` is the standard deviation of log2 max_t |X_tj| over
        channels, ``within`` the mean of log2(max_t |X_tj| / rms_t X_tj): how far a channel's largest value lies above its own size."""
        peaks, power = self.statistics.max_abs, self.x.square().mean(0)
        alive = (peaks > 0) & (power > 0)
        between = float(torch.log2(peaks[alive]).std()) if int(alive.sum()) > 1 else 0.0
        within = float(torch.log2(peaks[alive] / power[alive].sqrt()).mean()) if bool(alive.any()) else 0.0
        found: dict[str, Any] = {"inputs": None if self.format is None else str(self.format), "between": between, "within": within}
        if self.format is not None:
            shift = self._shift[self.format]
            lifted = self.x if shift is None else torch.ldexp(self.x, shift.int())
            top = self.format.largest * self.scale[self.format]
            found["clipped"] = float((lifted.abs() > top * (1 + 2.0**-20)).float().mean())
            found["shift"] = 0.0 if shift is None else float(shift.float().mean())
        return found


@dataclass
class Layer:
    """A weight ``[O, I]``, and for each format a scale a block. Weights whose scheme is no float stay on the grid that they came with."""

    part: FormatSearch
    task: Task
    x: Tensor  # [T, I]
    target: Tensor = field(init=False)  # X W^T, [T, O]
    root: float = field(init=False)  # 1 / ||X W^T||

    def __post_init__(self) -> None:
        scheme, weight = self.task.scheme, self.task.weight
        self.target = self.x @ weight.T
        power = float(self.target.double().square().sum())
        self.root = power**-0.5 if power > 0 else 1.0
        self.format, size = scheme.format, scheme.blocks.columns(weight.shape[1])
        self.blocks = [slice(at, at + size) for at in range(0, weight.shape[1], size)]
        self.formats: tuple[Float, ...] = ()
        if isinstance(self.format, Float):
            others = search_formats(self.format.bits, self.format.scale) if self.part.formats else ()
            self.formats = (self.format, *(f for f in others if f != self.format))
        peaks = [weight[:, block].abs().amax(1) for block in self.blocks]
        self.start = {f: torch.stack([f.params(-peak, peak)["scale"] for peak in peaks], 1) for f in self.formats}  # [O, K]
        self.scale = {f: start.clone() for f, start in self.start.items()}
        self.changes = 0
        self._seen: Any = None
        self._short: dict[tuple[Float, int], Tensor] = {}
        self._rounded: dict[Any, Tensor] = {}

    def choice(self) -> tuple[Any, ...]:
        return self.format, self.changes

    def grid(self) -> tuple[Scheme, Params]:
        """The scheme and the parameters that were chosen."""
        if not self.formats:
            return self.task.scheme, self.task.params
        return self.format @ self.task.scheme.blocks, {"scale": self.scale[self.format]}

    def rounded(self, fmt: Any = None) -> Tensor:
        """``W_hat [O, I]`` in ``fmt`` (default: the chosen one)."""
        fmt = fmt or self.format
        if fmt not in self._rounded:
            params = {"scale": self.scale[fmt]} if self.formats else self.task.params
            self._rounded[fmt] = (fmt @ self.task.scheme.blocks).quantize(self.task.weight, params)
        return self._rounded[fmt]

    def error(self, x_hat: Tensor, w_hat: Tensor | None = None) -> float:
        """``||X_hat W_hat^T - X W^T||^2 / ||X W^T||^2``."""
        w_hat = self.rounded() if w_hat is None else w_hat
        return float((x_hat @ w_hat.T).sub_(self.target).square_().sum()) * self.root**2

    def search_scales(self, x_hat: Tensor, seen: Any) -> None:
        """Each channel's best scale in each format, block after block of its inputs, for inputs as they are rounded now (``seen`` says how: a
        search for the same ones would find the same)."""
        if seen == self._seen:
            return
        self._seen = seen
        weight = self.task.weight
        for fmt in self.formats:
            missed = (x_hat @ self.rounded(fmt).T).sub_(self.target)  # [T, O]
            found = self.scale[fmt].clone()
            for k, block in enumerate(self.blocks):
                w, x = weight[:, block], x_hat[:, block].contiguous()
                missed -= x @ (self.rounded(fmt)[:, block] - w).T  # what the other blocks and X_hat - X miss
                linear = 2 * missed.T @ x  # [O, n]
                found[:, k] = self._search_block(fmt, k, w, x, linear)
                if len(self.blocks) > 1:
                    s = found[:, k, None]
                    missed += x @ fmt.nearest(w / s).mul_(s).sub_(w).T
            if not torch.equal(found, self.scale[fmt]):
                self.scale[fmt] = found
                self.changes += 1
                self._rounded.pop(fmt)

    def _search_block(self, fmt: Float, k: int, w: Tensor, x: Tensor, linear: Tensor) -> Tensor:
        """``[O]``: the scales of least ``d G d + d linear``, d = w_hat - w, among the one there is, that of the maximum, and the candidates."""
        start = self.start[fmt][:, k]
        if (fmt, k) not in self._short:
            tried = self.part.candidates(fmt, start)  # [C, O]
            if self.part.shortlist is not None and len(tried) > self.part.shortlist:
                diagonal = x.square().sum(0)
                costs = channel_costs(fmt, w, tried, linear, lambda d: d.square() @ diagonal)
                tried = tried.gather(0, costs.topk(self.part.shortlist, dim=0, largest=False).indices.sort(0).values)
            self._short[fmt, k] = torch.cat([start[None], tried])
        tried = torch.cat([self.scale[fmt][None, :, k], self._short[fmt, k]])
        best = channel_costs(fmt, w, tried, linear, quadratic_form(x)).argmin(0)
        return tried.gather(0, best[None])[0]

    def search_format(self, x_hat: Tensor) -> None:
        costs = {fmt: self.error(x_hat, self.rounded(fmt)) for fmt in self.formats}
        if costs and costs[self.format] > (best := min(costs.values())):
            self.format = next(fmt for fmt, cost in costs.items() if cost == best)


def quadratic_form(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """``d -> ||factor d||^2`` of vectors ``d [..., n]``, ``factor [m, n]``: through its Gram matrix where that is the smaller one."""
    if len(factor) < factor.shape[1]:
        return lambda d: (d @ factor.T).square_().sum(-1)
    gram = factor.T @ factor
    return lambda d: (d @ gram).mul_(d).sum(-1)


def channel_costs(
    fmt: Float, w: Tensor, scales: Tensor, linear: Tensor, quadratic: Callable[[Tensor], Tensor]
) -> Tensor:
    """``quadratic(d) + d . linear`` of ``w [O, n]`` rounded with each of ``scales [C, O]``, d = w_hat - w: ``[C, O]``."""
    costs = torch.empty_like(scales)
    tall = max(1, PIECE // max(w.shape[1], 1))  # rows at once
    for top in range(0, len(w), tall):
        rows = slice(top, top + tall)
        some = w[rows]
        many = max(1, PIECE // max(some.numel(), 1))  # candidates at once
        for at in range(0, len(scales), many):
            s = scales[at : at + many, rows, None]
            d = fmt.nearest(some / s).mul_(s).sub_(some)  # (c, r, n)
            costs[at : at + many, rows] = quadratic(d) + d.mul_(linear[rows]).sum(-1)
    return costs
