"""Training of partially binarized models (PB-LLM's quantization-aware training, arXiv 2310.00034, section 3.4).

    W_eff = salient ? w : alpha sgn(w),      alpha_o = mean over the row's binarised |w|,  sgn(0) = +1

Salient weights are rounded once to their 8-bit grid and then frozen. The others are *latent*: alpha, made anew at each step and taken as a
constant, is their least-squares scale, ``argmin_a ||w - a b||^2 = <w, b> / n = ||w||_1 / n`` for b = sgn(w); the gradient of W_eff goes to
the latent as it is (straight-through, no clipping), at binarised places only. Everything else of the model is frozen, but for biases of
the replaced layers.

Differences from the authors' code: alpha is one a row, not one a tensor; it is rounded to float16 in training too, so that the stored model computes
what was trained; the head stays float; the 8-bit grid has a true zero point (theirs wraps negative weights).

Time: 3 passes a token and a few passes over the weights a step; memory: 16 bytes a trained weight, and the activations.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dither import models
from dither.errors import ModelError, UsageError
from dither.formats import PartialBinary, QTensor, channel
from dither.formats.partial import half
from dither.models.source import tied_names
from dither.quant.assemble import assemble
from dither.quant.chain import block_chain
from dither.quant.checkpoint import quantization_config
from dither.quant.linear import QuantLinear
from dither.quant.outcome import LayerReport
from dither.quant.recipes.pb_llm import PBLLM
from dither.quant.saliency import saliency
from dither.quant.surroundings import Surroundings
from dither.quant.unit import Unit

CHOICES = ("signed", "magnitude")
WATCHED = 20  # times that sign flips are counted


class PartialLinear(nn.Module):
    """A linear layer in training: ``latent [O, I]`` and ``bias`` are trained, salient weights are ``frozen``."""

    binary: Tensor
    frozen: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, binary: Tensor, scheme: PartialBinary) -> None:
        """``weight [O, I]``, ``binary [O, I]`` bool: where there is one bit."""
        super().__init__()
        weight = weight.detach().float()
        self.scheme = scheme
        self.latent = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        grid = scheme.high @ channel()
        params = grid.fit(weight)
        codes = grid.encode(weight, params)
        self.register_buffer("binary", binary)
        self.register_buffer("codes", codes)
        self.register_buffer("frozen", grid.decode(codes, params))
        self.register_buffer("scale", params["scale"][:, 0])
        self.register_buffer("zero_point", params["zero_point"][:, 0])

    def alpha(self) -> Tensor:
        """``[O, 1]``, as it is stored."""
        magnitude = torch.where(self.binary, self.latent.detach().abs(), 0)
        return half(magnitude.sum(1, keepdim=True) / self.binary.sum(1, keepdim=True).clamp(min=1))

    def positive(self) -> Tensor:
        """``[O, I]`` bool: where sgn(latent) is +1."""
        return self.latent.detach() >= 0

    def effective(self) -> Tensor:
        """``W_eff [O, I]``; its gradient reaches ``latent`` where binarised, unchanged."""
        alpha = self.alpha()
        levels = torch.where(self.positive(), alpha, -alpha)
        through = self.latent - self.latent.detach()  # 0, with the gradient of the latent
        return torch.where(self.binary, levels + through, self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)

    def packed(self) -> QTensor:
        """As it is stored: mu is zero."""
        alpha = self.alpha()
        codes = torch.where(self.binary, self.positive().to(torch.uint8), self.codes)
        return self.scheme.pack(self.binary, codes, alpha, torch.zeros_like(alpha), self.scale, self.zero_point)


@dataclass
class Trained:
    """``model``: few-bit, stored as `PartialBinary`, saves itself. ``losses``: of each step. ``flips``: (step, share of binarised weights whose sign
    changed in a step), the mean since the count before."""

    model: nn.Module
    bits_per_weight: float
    losses: list[float] = field(default_factory=list)
    flips: list[tuple[int, float]] = field(default_factory=list)


@torch.enable_grad()
def train_partial_binary(
    model: str | Path | nn.Module,
    salient: float = 0.1,
    data: Any = None,
    steps: int = 500,
    lr: float = 1e-4,
    *,
    metric: str = "signed",
    masks: Mapping[str, Tensor] | None = None,
    high_bits: int = 8,
    batch: int = 4,
    accumulate: int = 1,
    samples: int = 512,
    length: int = 256,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    skip: Sequence[str] = (),
    compute: torch.dtype | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a causal language model whose linear layers inside its repeated blocks have one bit for most weights.

    ``model``: as for `quantize`; a module is copied. ``salient``: share of frozen ``high_bits``-bit weights a layer, chosen by ``metric``:
    "signed", the lowest and the highest, half each (the authors'), or "magnitude"; or ``masks``, layer name -> ``M [O, I]`` bool, True
    where binarised, from a quantized model (`masks_of`). ``data``: as for `quantize`, or tokens ``[N, L]``: ``samples`` windows of
    ``length`` tokens, ``batch`` x ``accumulate`` of them a step, in an order drawn under ``seed``. AdamW at ``lr`` with a cosine after a
    ``warmup`` share of the steps. ``skip``: patterns of layers that stay float. ``compute``: type of the products (None: float32).
    ``progress(step, loss)``.

    Runs where the model is. Raises ModelError where there is nothing to train, ValueError for values out of range and for masks that do not fit.
    """
    for name, value in (("steps", steps), ("batch", batch), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, not {value}")
    if not lr > 0 or not 0 <= warmup <= 1:
        raise ValueError(f"lr and warmup: must be positive and within 0 .. 1, not {lr} and {warmup}")
    scheme = PartialBinary(salient, high_bits)
    if scheme.salient == 1:
        raise ValueError("salient: 1 leaves no weight to train")
    if metric not in CHOICES:
        raise ValueError(f"metric must be one of {', '.join(CHOICES)}, not {metric!r}")
    if isinstance(model, str | Path):
        model, tokenizer = models.load(str(model))
    tokens = models.calibration_tokens(data, tokenizer, samples=samples, length=length, seed=seed)
    student = copy.deepcopy(model).float()
    layers = put_partial(student, scheme, metric, masks, skip)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        trained = _fit(student, layers, tokens, steps, lr, batch, accumulate, warmup, weight_decay, compute, seed, progress)
    trained.model, trained.bits_per_weight = few_bit(model, layers, scheme)
    return trained


def put_partial(
    model: nn.Module, scheme: PartialBinary, metric: str = "signed", masks: Mapping[str, Tensor] | None = None, skip: Sequence[str] = ()
) -> dict[str, PartialLinear]:
    """Freeze ``model`` and put `PartialLinear` in place of the linear layers of its blocks; returns them by name. Layers whose weight is tied to
    another stay."""
    shared = {name for pair in tied_names(model).items() for name in pair}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chain = block_chain(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Linear] = {}
    for prefix, block in [("", model)] if chain is None else chain:
        for name, module in block.named_modules():
            full = ".".join(part for part in (prefix, name) if part)
            skipped = module is head or any(fnmatch.fnmatchcase(full, pattern) for pattern in skip)
            if type(module) is nn.Linear and not skipped and f"{full}.weight" not in shared:
                found[full] = module
    if not found:
        raise ModelError(f"{type(model).__name__}: has no linear layer to train in its blocks")
    if masks is not None and (absent := sorted(found.keys() - masks.keys())):
        raise ValueError(f"masks: none for {absent[0]} ({len(absent)} layers without)")
    layers: dict[str, PartialLinear] = {}
    for name, linear in found.items():
        weight = linear.weight.detach().float()
        binary = masks[name].to(weight.device) if masks is not None else scheme.choose(_saliency(weight, metric))
        if binary.shape != weight.shape or int((~binary).sum()) != scheme.salient_count(*weight.shape):
            raise ValueError(f"masks: that of {name} is no choice of {scheme.salient:g} of {list(weight.shape)} weights")
        layers[name] = PartialLinear(weight, linear.bias, binary, scheme)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layers[name])
    return layers


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """``M [O, I]`` bool of every layer of a quantized model that is stored as `PartialBinary`, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and isinstance(module.scheme, PartialBinary):
            found[name] = module.scheme.binary_of(dict(module.named_buffers(recurse=False)), (module.out_features, module.in_features))
    return found


def few_bit(model: nn.Module, layers: Mapping[str, PartialLinear], scheme: PartialBinary) -> tuple[nn.Module, float]:
    """A copy of the float ``model`` with trained ``layers`` in their stored form, and its bits a weight."""
    source = models.MemorySource(model)
    unit = Unit("")
    with torch.no_grad():
        for name, layer in layers.items():
            row = LayerReport(name, 0, tuple(layer.latent.shape), str(scheme))
            tensor = layer.packed()
            moved = QTensor({k: v.cpu() for k, v in tensor.tensors().items()}, tensor.scheme, tensor.shape)
            unit.add(f"{name}.weight", "linear", moved, row)
            if layer.bias is not None:
                unit.keep(f"{name}.bias", layer.bias.detach().cpu().to(source.dtype_of(f"{name}.bias")))
        for name in source.names():
            if name not in unit.replaced and name not in unit.tensors and name not in source.tied:
                unit.keep(name, source.tensor(name))
    result = assemble(source, [unit])
    if source.config is not None and hasattr(result, "save_pretrained"):
        from dither.quant import hf  # transformers' quantizers are only needed here

        recipe = PBLLM(salient=scheme.salient, high_bits=scheme.high_bits, metric="magnitude", mask=scheme.mask).recipe()
        hf.adopt(result, quantization_config([unit], recipe, Surroundings()))
    return result, unit.stored_bits / unit.weights


def _saliency(weight: Tensor, metric: str) -> Tensor:
    """By magnitude; or, signed, how far a weight's rank is from the middle of all, so that both tails are taken alike."""
    if metric == "magnitude":
        return saliency(weight, metric="magnitude")
    ranks = torch.empty(weight.numel(), dtype=torch.float64, device=weight.device)
    ranks[weight.reshape(-1).argsort(stable=True)] = torch.arange(weight.numel(), dtype=torch.float64, device=weight.device)
    return (ranks - (weight.numel() - 1) / 2).abs().view(weight.shape)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at ``step`` = 0 .. steps - 1: a linear rise over ``warmup`` of the steps, then half a cosine to zero."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _fit(
    student: nn.Module, layers: Mapping[str, PartialLinear], tokens: Tensor, steps: int, lr: float, batch: int, accumulate: int,
    warmup: float, weight_decay: float, compute: torch.dtype | None, seed: int, progress: Callable[[int, float], None] | None,
) -> Trained:
    device = next(student.parameters()).device
    known = getattr(getattr(student, "config", None), "vocab_size", None)
    if isinstance(known, int) and int(tokens.max()) >= known:
        raise UsageError(f"data: holds token {int(tokens.max())}, but the model knows 0 to {known - 1}")
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    trained = Trained(student, 0.0)
    watched, since = {name: layer.positive() for name, layer in layers.items()}, 0
    binarised = sum(int(layer.binary.sum()) for layer in layers.values())
    student.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step, steps, warmup)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(accumulate):
            while len(order) < batch:
                order += torch.randperm(len(tokens), generator=generator).tolist()
            rows, order = order[:batch], order[batch:]
            ids = tokens[rows].to(device)
            with torch.autocast(device.type, compute or torch.float32, enabled=compute not in (None, torch.float32)):
                output = student(input_ids=ids, use_cache=False)
            logits = (output.logits if hasattr(output, "logits") else output[0]).float()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ArithmeticError(f"the loss is {total} at step {step}: lower lr ({lr:g})")
        optimizer.step()
        trained.losses.append(total)
        since += 1
        if since >= steps / WATCHED:
            now = {name: layer.positive() for name, layer in layers.items()}
            flipped = sum(int(((now[n] != watched[n]) & layers[n].binary).sum()) for n in layers)
            trained.flips.append((step, flipped / binarised / since))
            watched, since = now, 0
        if progress is not None:
            progress(step, total)
    student.eval()
    return trained
