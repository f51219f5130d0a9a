"""OSTQuant's learning: orthogonal and scaling transformations of the whole network, trained so that the few-bit model answers as the float one.

Hu, Cheng, Yang, et al., OSTQuant, ICLR 2025, arXiv 2501.13987, sections 4.1 to 4.3. Learned are (one where learning starts, W_in etc. as in
`transforms.rotate`)

    R_res  [D, D] orthogonal, one a stream        starts at V H: V eigenvectors of the covariance of all W_in's rows less their mean, H Hadamard
    R_ov   [d, d] orthogonal, one a value head    starts likewise from the columns of W_o that read the head (`transforms.heads`)
    S      [C] > 0, S = exp(theta), from 1        at every proved scale site of few-bit layers: S_n of norms (rotated basis), S_ov, S_ud;
                                                  where keys are cached in few bits S_qk too (`graph.keys`: one a rotary pair)

under a student whose inputs of few-bit layers, keys and values are rounded straight-through (`quant.straight`) and whose weights are rebuilt at every
step (`transforms.rebuild`); weights are rounded only where inputs and keys stay float. The teacher is the float model. Loss: `losses.kl_top`, or the
cross-entropy of the next token (SpinQuant's). R by Riemannian Adam, S by Adam, rates falling linearly to 0. Afterwards everything is folded in
float64; what rounds the weights comes after it.

Cost of a step on T tokens, W weights: 4 T W multiply-adds for teacher and student forward and the student's backward pass (another T W for its
gradient by the weights), and 2 D W for the rebuild and its gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dither import models
from dither.errors import UsageError
from dither.formats import Scheme, WeightScheme
from dither.graph import Residual, fix_ones, fold_norms, ones_reflection
from dither.graph.structure import matrix_view
from dither.quant.losses import kl_top
from dither.quant.parts import ModelStage, ModelView
from dither.quant.qsur import gaussian_qsur
from dither.quant.stiefel import CayleySGD, RiemannianAdam, nearest_orthogonal
from dither.quant.streams import padding_mask
from dither.quant.transforms.heads import start_heads
from dither.quant.transforms.rebuild import Student
from dither.quant.transforms.rotate import Plan, Turnings, block_of
from dither.special import random_rotation

BUDGETS = {"quick": (40, 2, 512), "normal": (100, 8, 2048), "paper": (100, 32, 2048)}  # steps, sequences a step, tokens of them at most
RATES = {"quick": (0.2, 0.01), "normal": (0.0169, 0.00179), "paper": (0.0169, 0.00179)}  # of R and S; the scripts', but few steps have to be large
STARTS = ("klt+hadamard", "hadamard")
LOSSES = ("kl_top", "cross_entropy")
OPTIMIZERS = ("riemannian_adam", "cayley_sgd")
LEARNED = ("R_res", "R_ov", "S")
AT_ONCE = 2048  # tokens that run through the student together; a step's sequences beyond that are summed up piece by piece
SEEN, LOOKED_AT = 4096, 4  # tokens, and blocks, that QSUR is measured on


@dataclass(frozen=True)
class LearnTransforms(ModelStage):
    """See the module. ``budget``: "quick", "normal" or "paper" says how many steps, sequences a step and tokens of a sequence; ``steps`` and
    ``batch`` say it themselves. ``k_top``: teacher logits that the loss looks at; ``learn``: what is learned, of "R_res", "R_ov", "S" (rotations
    that are not stay where they start, scalings 1). ``init``: "klt+hadamard" or "hadamard". ``optimizer`` of the rotations: "cayley_sgd" is
    SpinQuant's. ``lr``, ``lr_scale``: of rotations and scalings; None takes the budget's (`RATES`; 1.5 of cayley_sgd). ``weights``: what weights
    are rounded to while nothing else is, where the recipe stores them as something else than a grid. ``online``, ``head_groups``: as
    `Rotate`'s.
    """

    budget: str = "quick"
    steps: int | None = None
    batch: int | None = None
    k_top: int = 1000
    loss: str = "kl_top"
    learn: tuple[str, ...] = LEARNED
    init: str = "klt+hadamard"
    optimizer: str = "riemannian_adam"
    lr: float | None = None
    lr_scale: float | None = None
    weights: WeightScheme | None = None
    online: bool = True
    head_groups: bool = True
    needs_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "learn", tuple(self.learn))
        for knob, allowed in (("budget", tuple(BUDGETS)), ("loss", LOSSES), ("init", STARTS), ("optimizer", OPTIMIZERS)):
            if getattr(self, knob) not in allowed:
                raise ValueError(f"{knob} must be one of {', '.join(allowed)}, not {getattr(self, knob)!r}")
        unknown = [name for name in self.learn if name not in LEARNED]
        if unknown:
            raise ValueError(f"learn must be some of {', '.join(LEARNED)}, not {unknown[0]!r}")
        for knob in ("steps", "batch", "k_top"):
            value = getattr(self, knob)
            if value is not None and value < 1:
                raise ValueError(f"{knob} must be at least 1, not {value}")
        for knob in ("lr", "lr_scale"):
            value = getattr(self, knob)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{knob} must be positive, not {value}")

    @property
    def size(self) -> tuple[int, int, int]:
        """(steps, sequences a step, tokens of a sequence at most)."""
        steps, batch, length = BUDGETS[self.budget]
        return self.steps or steps, self.batch or batch, length

    def apply(self, view: ModelView) -> None:
        """Raises SiteError and UsageError as `Rotate.apply`; UsageError too where nothing would be rounded; ValueError where ``k_top`` is
        more than there are logits."""
        if not view.batches:
            raise UsageError("calibration: is needed to learn transforms; give some")
        plan = Plan.of(view, online=self.online, head_groups=self.head_groups)
        found = view.remember("transforms", lambda: self._learned(view, plan))
        before = view.remember("spread-before", lambda: spread(view, plan))
        heads, scales, keys = ({k.partition(":")[2]: v for k, v in found.items() if k.startswith(kind)} for kind in ("heads:", "scale:", "keys:"))
        plan.fold(view, Turnings([found[f"stream:{i}"] for i in range(len(plan.whole.residuals))], heads, scales, keys))
        after = view.remember("spread-after", lambda: spread(view, plan))
        self._tell(view, found, before, after)

    def _learned(self, view: ModelView, plan: Plan) -> dict[str, Tensor]:
        work = _Work(self, view, plan)
        try:
            return work.learn()
        finally:
            models.empty(work.student.model)

    def _tell(self, view: ModelView, found: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        losses = [float(x) for x in found["losses"]]
        stopped = int(found["stopped"])
        if stopped >= 0:
            view.notes.append(f"learning transforms: the loss of step {stopped} was not finite; those of the step before it are used")
        sites = sorted(before.keys() & after.keys())
        view.findings.append(
            {
                "site": "whole model: learned transforms",
                "learned": list(self.learn),
                "steps": len(losses),
                "loss": losses,
                "orthogonality": float(found["orthogonality"]),
                "scale_min": min((float(v.min()) for k, v in found.items() if k.startswith("scale:")), default=1.0),
                "scale_max": max((float(v.max()) for k, v in found.items() if k.startswith("scale:")), default=1.0),
                "qsur_before": _mean([before[s] for s in sites]),
                "qsur_after": _mean([after[s] for s in sites]),
                "qsur_sites": len(sites),
            }
        )


class _Work:
    """One model's learning."""

    def __init__(self, part: LearnTransforms, view: ModelView, plan: Plan) -> None:
        self.part, self.view, self.plan = part, view, plan
        self.steps, self.batch, self.length = part.size
        recipe = view.recipe
        scheme: WeightScheme | None = None
        if recipe.inputs is None and recipe.kv is None:
            scheme = next((s for s in (recipe.weights, part.weights) if isinstance(s, Scheme)), None)
            if scheme is None:
                raise UsageError(
                    f"learning transforms: nothing is rounded while learning, since inputs are float and {recipe.weights} is no grid; "
                    "give act_bits, or weights to learn on"
                )
        self.generator = torch.Generator().manual_seed(view.seed)
        model = copy.deepcopy(view.model).requires_grad_(False)
        for stream in plan.whole.residuals:
            fold_norms(model, stream)
        self.streams = nn.ParameterList(self._start_stream(model, s, view.seed + i) for i, s in enumerate(plan.whole.residuals))
        self.heads = {
            key: nn.Parameter(start_heads(block_of(model, key), h, "hadamard" if part.init == "hadamard" else "klt+hadamard", view.seed + i))
            for i, (key, h) in enumerate(plan.heads.items())
        }
        rounds_inputs = recipe.inputs is not None or scheme is not None
        self.thetas = {
            key: nn.Parameter(torch.zeros(scale.site.channels, dtype=torch.float64))
            for key, scale in plan.scales.items()
            if "S" in part.learn and rounds_inputs and self._is_read(key)
        }
        self.key_thetas = {
            key: nn.Parameter(torch.zeros(one.values, dtype=torch.float64))
            for key, one in plan.keys.items()
            if "S" in part.learn and recipe.kv is not None
        }
        inputs = {name: quant.scheme for name, quant in plan.inputs.items()}
        model = model.to(view.compute)
        seen = replace(plan, scales={k: plan.scales[k] for k in self.thetas}, keys={k: plan.keys[k] for k in self.key_thetas})
        rounded = scheme if isinstance(scheme, Scheme) else None
        self.student = Student(model, seen, lambda name: inputs.get(name, recipe.inputs), rounded, recompute=self._tight())
        if recipe.kv is not None:
            from dither.quant.kv import few_bit_attention
            from dither.quant.straight import straight_rows

            few_bit_attention(model, recipe.kv, plan.rotates_heads, lambda x, kv: straight_rows(x, kv) if self.student.on else x)

    def _is_read(self, key: str) -> bool:
        """Whether few-bit linear layers read the site: what else is scaled would be moved by rounding noise alone."""
        block = key.rpartition(":")[0]
        return any(c.layer is not None and f"{block}.{c.layer}" in self.plan.layers for c in self.plan.scales[key].site.consumers)

    def _tight(self) -> bool:
        """Whether the rebuilt weights and the activations of a step would take more than half of the memory that is free."""
        layers = self.plan.layers.values()
        size = torch.empty(0, dtype=self.view.compute).element_size()
        weights = 3 * size * sum(layer.in_features * layer.out_features for layer in layers)  # a rebuilt one and what it came from
        tokens = min(AT_ONCE, self.batch * self.length)
        activations = tokens * size * sum(2 * layer.in_features + 3 * layer.out_features for layer in layers)
        free: int = psutil.virtual_memory().available
        return weights + activations > free // 2

    # -- where learning starts ----------------------------------------------------------------------------------------------

    def _start_stream(self, model: nn.Module, stream: Residual, seed: int) -> nn.Parameter:
        """R, or what acts in the complement of the vector of ones, which is all that a centred stream lets turn."""
        size = stream.width - 1 if stream.centred else stream.width
        mixing = random_rotation(size, seed)
        if self.part.init == "hadamard":
            return nn.Parameter(mixing)
        basis = ones_reflection(stream.width)[:, 1:] if stream.centred else None
        gram, total, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
        inside = {f"{name.removesuffix(layer.name)}{layer.parameter}" for name, layer in self.plan.layers.items()}
        for reader in stream.readers:
            if reader.parameter not in inside:
                continue
            matrix = matrix_view(model.get_parameter(reader.parameter), reader.kind, reader.swapped).detach().double()
            rows = matrix.reshape(-1, stream.width) if basis is None else matrix.reshape(-1, stream.width) @ basis
            gram, total, count = gram + rows.mT @ rows, total + rows.sum(0), count + len(rows)
        mean = total / max(count, 1)
        vectors: Tensor = torch.linalg.eigh(gram / max(count, 1) - torch.outer(mean, mean))[1]
        return nn.Parameter(vectors @ mixing)

    # -- the loop -------------------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """Rotations and scalings, float64, by the keys that `Student` reads; differentiable."""
        found: dict[str, Tensor] = {}
        for i, (p, stream) in enumerate(zip(self.streams, self.plan.whole.residuals, strict=True)):
            found[f"stream:{i}"] = fix_ones(p) if stream.centred else p
        found |= {f"heads:{key}": p for key, p in self.heads.items()}
        found |= {f"scale:{key}": p.exp() for key, p in self.thetas.items()}
        return found | {f"keys:{key}": p.exp() for key, p in self.key_thetas.items()}

    def learn(self) -> dict[str, Tensor]:
        """Everything that was learned, and how it went."""
        rotations = [*(self.streams if "R_res" in self.part.learn else ()), *(self.heads.values() if "R_ov" in self.part.learn else ())]
        thetas = [*self.thetas.values(), *self.key_thetas.values()]
        optimizers = self._optimizers(rotations, thetas)
        rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        learned = [*rotations, *thetas]
        for p in [*self.streams, *self.heads.values()]:
            p.requires_grad_(any(p is one for one in rotations))
        losses: list[float] = []
        stopped, good = -1, [p.detach().clone() for p in learned]
        draws = self._draws()
        for step in range(self.steps if learned else 0):
            for optimizer, starts in zip(optimizers, rates, strict=True):
                optimizer.zero_grad()
                for group, rate in zip(optimizer.param_groups, starts, strict=True):
                    group["lr"] = rate * (1 - step / self.steps)
            loss = self._backward(next(draws))
            if not math.isfinite(loss) or any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in learned):
                stopped = step
                break
            losses.append(loss)
            good = [p.detach().clone() for p in learned]
            self.view.say(f"learning transforms: step {step + 1} of {self.steps}, loss {loss:.4f}")
            for optimizer in optimizers:
                optimizer.step()
        with torch.no_grad():
            if stopped >= 0:
                for p, kept in zip(learned, good, strict=True):
                    p.copy_(kept)
            eyes = [(p.mT @ p - torch.eye(p.shape[-1], dtype=p.dtype)).abs().max() for p in [*self.streams, *self.heads.values()]]
            for p in [*self.streams, *self.heads.values()]:
                p.copy_(nearest_orthogonal(p))
            found = {k: self._exact(k, v.detach()).clone() for k, v in self.values().items()}
        found["losses"] = torch.tensor(losses, dtype=torch.float64)
        found["stopped"] = torch.tensor(stopped)
        found["orthogonality"] = torch.stack(eyes).max()
        return found

    def _exact(self, key: str, value: Tensor) -> Tensor:
        """Scalings of norms so that their factor 1 / S is a number of bfloat16: it is stored in few bits, unlike the weights it is undone in."""
        if key.startswith("scale:") and self.plan.scales[key.partition(":")[2]].rotated:
            return 1 / (1 / value).to(torch.bfloat16).double()
        return value

    def _optimizers(self, rotations: list[nn.Parameter], thetas: list[nn.Parameter]) -> list[Optimizer]:
        found: list[Optimizer] = []
        if rotations and self.part.optimizer == "cayley_sgd":
            found.append(CayleySGD(rotations, lr=self.part.lr or 1.5, seed=self.view.seed))
        elif rotations:
            found.append(RiemannianAdam(rotations, lr=self.part.lr or RATES[self.part.budget][0]))
        if thetas:
            found.append(RiemannianAdam(thetas, lr=self.part.lr_scale or RATES[self.part.budget][1], orthogonal=False))
        return found

    def _draws(self) -> Iterator[list[dict[str, Any]]]:
        """The sequences of each step, without end: all of the data in random order, then again in another."""
        places = [(b, i) for b, batch in enumerate(self.view.batches) for i in range(_rows(batch))]
        waiting: list[tuple[int, int]] = []
        while True:
            while len(waiting) < self.batch:
                waiting += [places[i] for i in torch.randperm(len(places), generator=self.generator)]
            yield self._gathered(waiting[: self.batch])
            waiting = waiting[self.batch :]

    def _gathered(self, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The sequences, cut to length, joined to batches of about `AT_ONCE` tokens where their shapes agree."""
        found: list[dict[str, Any]] = []
        for b, i in places:
            batch = self.view.batches[b]
            one = {k: self._cut(v[i : i + 1]) if isinstance(v, Tensor) and v.dim() and len(v) == _rows(batch) else v for k, v in batch.items()}
            last = found[-1] if found else None
            if last is None or _tokens(last) + _tokens(one) > AT_ONCE or not _alike(last, one):
                found.append(one)
            else:
                found[-1] = {k: torch.cat([last[k], v]) if isinstance(v, Tensor) and v.dim() and len(v) == 1 else v for k, v in one.items()}
        return found

    def _cut(self, value: Tensor) -> Tensor:
        """A row of token ids or of a mask at most ``length`` long; floating inputs (images) in the compute type."""
        if value.is_floating_point():
            return value.to(self.view.compute)
        return value[:, : self.length] if value.dim() == 2 else value

    def _backward(self, pieces: list[dict[str, Any]]) -> float:
        """The mean loss over the tokens of a step; adds its gradient."""
        total, whole = 0.0, sum(_tokens(piece) for piece in pieces)
        for piece in pieces:
            teacher = self.student.teacher(piece) if self.part.loss == "kl_top" else None
            with torch.enable_grad():
                share = self._loss(self.student(piece, self.values()), teacher, piece) * (_tokens(piece) / whole)
                total += float(share.detach())
                if not math.isfinite(total):
                    return total
                share.backward()  # type: ignore[no-untyped-call]
        return total

    def _loss(self, student: Tensor, teacher: Tensor | None, piece: dict[str, Any]) -> Tensor:
        mask = padding_mask(piece)
        if teacher is not None:
            if mask is not None and student.shape[:-1] == mask.shape:
                student, teacher = student[mask], teacher[mask]
            if self.part.k_top > student.shape[-1]:
                raise ValueError(f"k_top: must be at most {student.shape[-1]}, the number of logits, not {self.part.k_top}")
            return kl_top(student, teacher, self.part.k_top)
        if "input_ids" not in piece or student.dim() != 3:
            raise UsageError("loss: cross_entropy is that of the next token, so it needs a causal language model; use kl_top")
        targets = piece["input_ids"][:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~mask[:, 1:], -100)
        return F.cross_entropy(student[:, :-1].flatten(0, 1).float(), targets.flatten())


def _rows(batch: dict[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)


def _tokens(batch: dict[str, Any]) -> int:
    mask = padding_mask(batch)
    if mask is not None:
        return int(mask.sum())
    first = next(v for v in batch.values() if isinstance(v, Tensor) and v.dim())
    return first.numel() if not first.is_floating_point() else len(first)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two batches can be joined."""
    return a.keys() == b.keys() and all(
        isinstance(v, Tensor) and isinstance(b[k], Tensor) and v.dim() > 0 and v.shape[1:] == b[k].shape[1:] for k, v in a.items()
    )


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack(values).mean()) if values else None


# -- QSUR of what few-bit layers read ---------------------------------------------------------------------------------------


@torch.no_grad()
def spread(view: ModelView, plan: Plan) -> dict[str, Tensor]:
    """(1/d) log QSUR (`quant.qsur`, exact form) of the inputs of few-bit layers in a few blocks, by layer: before or after folding.

    Layers with fewer than two tokens an input are left out: their covariance has no volume.
    """
    blocks = plan.whole.blocks
    chosen = [blocks[i] for i in sorted({round(k * (len(blocks) - 1) / max(LOOKED_AT - 1, 1)) for k in range(LOOKED_AT)})]
    sums: dict[str, list[Any]] = {}
    handles = []

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            held = sums.setdefault(name, [0.0, 0.0, 0])
            held[0], held[1], held[2] = held[0] + rows.mT @ rows, held[1] + rows.sum(0), held[2] + len(rows)

        return add

    for block in chosen:
        for group in block.structure.groups():
            name = next((full for n in group if (full := f"{block.name}.{n}") in plan.layers), None)
            if name is not None:
                place = f"{name}.layer" if name in view.turns else name
                handles.append(view.model.get_submodule(place).register_forward_pre_hook(hook(name)))
    try:
        seen = 0
        for batch in view.batches:
            if seen >= SEEN:
                break
            view.model(**batch)
            seen += _tokens(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (gram, total, count) in sums.items():
        if count >= 2 * len(total):
            mean = total / count
            value = gaussian_qsur(gram / count - torch.outer(mean, mean)).exact
            if math.isfinite(value):
                found[name] = torch.tensor(value, dtype=torch.float64)
    return found

