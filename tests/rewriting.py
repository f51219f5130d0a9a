"""Tiny models as model stages see them, and random rewrites of them: shared by the tests of rotations and of what is learned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import tiny_models
from dither.graph.exact import randomize, run_exactly
from dither.quant.parts import ModelView
from dither.quant.recipe import as_recipe
from dither.quant.recipes import QuaRot
from dither.quant.transforms.rotate import Plan, Turnings, random_stream

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))


def view_of(name: str, method: Any = None, dtype: torch.dtype = torch.float64) -> ModelView:
    """A tiny model in float64 with random weights throughout (norms and biases too), as model stages see it."""
    model, sample = tiny_models.build(name)
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    randomize(model, torch.Generator().manual_seed(1))
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    recipe = as_recipe(method or QuaRot(kv_bits=None))
    batch = {k: v[:2] for k, v in sample.items()}
    return ModelView(model, [batch], recipe, dtype, 0, lambda _, make: make(), lambda what: None, sample=batch)


def output(view: ModelView) -> list[Tensor]:
    return run_exactly(view.model, [((), dict(view.batches[0]))])


def random_turnings(plan: Plan, seed: int = 0) -> Turnings:
    """Random rotations and scalings at every place there is."""
    g = torch.Generator().manual_seed(seed)
    heads = {
        key: torch.linalg.qr(torch.randn(h.heads, h.size, h.size, generator=g, dtype=torch.float64))[0] for key, h in plan.heads.items()
    }
    scales = {key: (torch.randn(s.site.channels, generator=g, dtype=torch.float64) / 2).exp() for key, s in plan.scales.items()}
    keys = {key: (torch.randn(one.values, generator=g, dtype=torch.float64) / 2).exp() for key, one in plan.keys.items()}
    return Turnings([random_stream(r, seed) for r in plan.whole.residuals], heads, scales, keys)
