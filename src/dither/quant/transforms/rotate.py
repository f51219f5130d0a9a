"""Rotations of a whole model: the residual stream, the heads of values, and Hadamard turns of what is left. (QuaRot: Ashkboos et al., NeurIPS
2024, arXiv 2404.00456; R1 to R4 of SpinQuant, arXiv 2405.16406.)

Rows are tokens. With R [D, D] one orthogonal matrix for the net, R_g [d, d] one a head of values, H normalised Hadamard matrices:

    norms     W_in <- W_in diag(gamma),  gamma <- 1                                   (tied embedding and head become two)
    stream    E <- E R;   W_in <- W_in R;   W_out <- R^T W_out,  b <- R^T b;   W_head <- W_head R
    heads     W_v[g] <- R_g^T W_v[g];   W_o[:, h] <- W_o[:, h] R_g(h)
    turns     at run time x <- x H in front of the other few-bit layers of a block (the down projection); W <- W H          `quant.online`
    q, k      at run time q <- q H, k <- k H after their rotary embedding, where keys are cached in few bits                `quant.kv`

LayerNorm models rotate in the complement of the vector of ones, where RMSNorm and LayerNorm agree (`graph.fix_ones`), so they keep their
architecture. Everything is folded in float64 and rounded once to the model's type. What rotates is proved (`graph.discover_whole`); at the end
the outputs on a few tokens are compared with those before.

Scalings S > 0 may be folded along (OSTQuant, `transforms.learn`): those between two weights, and of keys against queries, before the rotations, those
of norms after, in the rotated basis; W_down <- (W_down diag(S)) H, in this order: diag(S) and H do not commute.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dither.errors import SiteError, UsageError
from dither.formats import group
from dither.graph import (
    BlockSites,
    HeadRotation,
    KeyScaling,
    Layer,
    Residual,
    Site,
    Whole,
    apply_key_scaling,
    apply_scale,
    discover_whole,
    fix_ones,
    rotate_heads,
    rotate_residual,
)
from dither.graph.exact import execute, float_outputs, relative_difference, run_exactly
from dither.graph.structure import matrix_view
from dither.quant.inputs import InputQuant
from dither.quant.online import turn
from dither.quant.parts import ModelStage, ModelView
from dither.quant.transforms.heads import start_heads
from dither.special import apply_hadamard, factors, random_rotation

SAME = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative change of outputs that rounding explains, by the type of the weights


@dataclass(frozen=True)
class Rotate(ModelStage):
    """Random Hadamard matrices (uniformly random ones where no order is known) on the stream and on heads; see the module.

    ``online``: turn the inputs that no fold rotates; off leaves nothing to do at run time but for keys. ``head_groups``: few-bit inputs of
    the layers behind rotated heads get one scale a head instead of one a token.
    """

    online: bool = True
    head_groups: bool = True

    def apply(self, view: ModelView) -> None:
        """Raises SiteError where no stream provably rotates, UsageError where the model needs calibration data to be seen."""
        plan = Plan.of(view, online=self.online, head_groups=self.head_groups)
        streams = [random_stream(r, view.seed + i) for i, r in enumerate(plan.whole.residuals)]
        heads = {key: start_heads(block_of(view.model, key), h, "hadamard", view.seed + i) for i, (key, h) in enumerate(plan.heads.items())}
        plan.fold(view, Turnings(streams, heads))


@dataclass(frozen=True)
class Turnings:
    """``streams``: R ``[D, D]`` of each stream; ``heads``: ``[G, d, d]`` by key; ``scales``: S ``[C]`` by key; ``keys``: S_qk by key. All
    float64."""

    streams: list[Tensor]
    heads: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """A scale site of a block. ``rotated``: it belongs to a norm of a rotated stream, so its channels are those of the rotated basis."""

    site: Site
    rotated: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a model may be rewritten. Keys are ``"BLOCK:NUMBER"``; ``layers``: few-bit linear layers of the blocks by full name; ``turns``:
    those of them that are to be turned, and the order."""

    whole: Whole
    heads: dict[str, HeadRotation]
    scales: dict[str, ScaleSite]
    keys: dict[str, KeyScaling]
    layers: dict[str, Layer]
    turns: dict[str, int]
    inputs: dict[str, InputQuant]

    @classmethod
    def of(cls, view: ModelView, *, online: bool, head_groups: bool) -> Plan:
        """Raises SiteError, UsageError as `Rotate.apply`, ModelError where keys and values cannot be rounded as the recipe asks."""
        if view.sample is None:
            raise UsageError("calibration: is needed to see what may be rotated in a model that reads anything but tokens; give some")
        if view.recipe.kv is not None:
            from dither.quant.kv import attention_modules

            attention_modules(view.model)  # better now than after an hour
        view.say("looking for what may be rotated")
        whole = discover_whole(view.model, view.sample)
        if not whole.residuals:
            why = "; ".join(f"{name}: {reason}" for name, reason in whole.refused) or "it has no chain of blocks"
            raise SiteError(f"{type(view.model).__name__}: no residual stream provably rotates ({why}); use a method without rotations")
        view.notes += [f"{name}: {reason}" for name, reason in whole.refused]
        plan = cls(whole, {}, {}, {}, {}, {}, {})
        for block in whole.blocks:
            plan._add(block, view, online=online, head_groups=head_groups)
        return plan

    def _add(self, block: BlockSites, view: ModelView, *, online: bool, head_groups: bool) -> None:
        reads = {w.parameter for r in self.whole.residuals for w in r.readers}
        writes = {w.parameter for r in self.whole.residuals for w in r.writers}
        norms = {s.producer.parameter for r in self.whole.residuals for s in r.norms}
        rotated: dict[str, int] = {}
        for i, one in enumerate(block.heads):
            self.heads[f"{block.name}:{i}"] = one
            rotated |= {c.parameter: one.size for c in one.site.consumers}
        for i, scaling in enumerate(block.keys):
            self.keys[f"{block.name}:{i}"] = scaling
        for i, site in enumerate(s for s in block.structure.sites if s.kind == "scale"):
            producer, consumers = f"{block.name}.{site.producer.parameter}", {f"{block.name}.{c.parameter}" for c in site.consumers}
            if producer in norms or not (producer in writes or consumers & reads):
                self.scales[f"{block.name}:{i}"] = ScaleSite(site, producer in norms)
        for layer in block.structure.layers:
            name = f"{block.name}.{layer.name}"
            if layer.kind != "linear" or view.recipe.scheme_of(name, layer) is None:
                continue
            self.layers[name] = layer
            if layer.parameter in rotated:
                inputs = view.recipe.inputs
                if head_groups and inputs is not None and inputs.blocks.kind == "token":
                    self.inputs[name] = InputQuant(replace(inputs, blocks=group(rotated[layer.parameter])))
            elif online and f"{block.name}.{layer.parameter}" not in reads:
                order = turn_order(layer.in_features)
                if order > 1:
                    self.turns[name] = order

    def fold(self, view: ModelView, turnings: Turnings) -> None:
        """Rewrite the model and fill in what happens at run time. Raises SiteError where its outputs on the sample change."""
        model = view.model
        before = _outputs(view)
        for key, scale in turnings.scales.items():
            if not self.scales[key].rotated:
                apply_scale(block_of(model, key), self.scales[key].site, scale)
        for key, s_qk in turnings.keys.items():
            apply_key_scaling(block_of(model, key), self.keys[key], s_qk)
        for residual, rotation in zip(self.whole.residuals, turnings.streams, strict=True):
            rotate_residual(model, residual, rotation)
        for key, rotations in turnings.heads.items():
            rotate_heads(block_of(model, key), self.heads[key], rotations)
        for key, scale in turnings.scales.items():
            if self.scales[key].rotated:
                apply_scale(block_of(model, key), self.scales[key].site, scale)
        for name, order in self.turns.items():
            _turn(model, name, self.layers[name], order)
        error = relative_difference(_outputs(view), before)
        if not error <= SAME[_dtype(model)]:
            raise SiteError(f"{type(model).__name__}: rotating it changed its outputs by {error:.1e}; use a method without rotations")
        view.turns |= self.turns
        view.inputs |= self.inputs
        if view.recipe.kv is not None:
            view.rotate_heads = self.rotates_heads
            if not view.rotate_heads:
                view.notes.append("queries and keys stay as they are: no Hadamard matrix of the heads' size is known")

    @property
    def rotates_heads(self) -> bool:
        """Whether queries and keys can be turned at run time, judged by the heads of values."""
        return all(turn_order(h.size) == h.size for h in self.heads.values())


@functools.cache
def turn_order(inputs: int) -> int:
    """The largest order of a known Hadamard matrix that divides ``inputs``."""
    for order in range(inputs, 1, -1):
        if inputs % order == 0:
            try:
                factors(order)
            except ValueError:
                continue
            return order
    return 1


def random_stream(residual: Residual, seed: int) -> Tensor:
    """A random rotation ``[D, D]`` that the stream allows: Hadamard where an order is known."""
    return fix_ones(random_rotation(residual.width - 1, seed)) if residual.centred else random_rotation(residual.width, seed)


def block_of(model: nn.Module, key: str) -> nn.Module:
    """The block that a key is of."""
    return model.get_submodule(key.rpartition(":")[0])


@torch.no_grad()
def _turn(model: nn.Module, name: str, layer: Layer, order: int) -> None:
    """W <- W H, and x H in front of it."""
    block = name.removesuffix(f".{layer.name}")
    matrix = matrix_view(model.get_submodule(block).get_parameter(layer.parameter), layer.kind, layer.swapped)
    matrix.copy_(apply_hadamard(matrix.double(), order).to(matrix.dtype))
    turn(model, name, order)


def _dtype(model: nn.Module) -> torch.dtype:
    return torch.float64 if all(p.dtype == torch.float64 for p in model.parameters()) else torch.float32


def _outputs(view: ModelView) -> list[Tensor]:
    """What the model returns on the sample, in its own type (float64 throughout where that is float64)."""
    assert view.sample is not None
    call = ((), dict(view.sample))
    if _dtype(view.model) == torch.float64:
        return run_exactly(view.model, [call])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return float_outputs(execute(view.model, [call]))
