"""Training with frozen salient weights: what the gradient reaches, what stays, that it learns, and that the result is what is stored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither.errors import ModelError
from dither.formats import Int, PartialBinary, channel
from dither.quant.linear import QuantLinear
from dither.quant.recipes import PBLLM
from dither.quant.train_partial import PartialLinear, learning_rate, masks_of, put_partial, train_partial_binary


def counting(rows: int = 32, length: int = 24) -> Tensor:
    """Sequences that count in a circle of 16: easy to learn."""
    starts = torch.randint(0, 16, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(length)) % 16 + 5


def layer(salient: float = 0.3, bias: bool = True) -> PartialLinear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 32, generator=g)
    scheme = PartialBinary(salient)
    return PartialLinear(weight, torch.randn(20, generator=g) if bias else None, scheme.choose(weight.abs()), scheme)


def test_6_the_gradient_reaches_exactly_the_binarised_entries() -> None:
    """And is the gradient of the effective weight, unchanged and unclipped."""
    own = layer()
    with torch.no_grad():
        own.latent *= 5  # beyond any clipping range of +-1
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    y = own(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * upstream).sum().backward()
    assert own.latent.grad is not None and own.bias is not None and own.bias.grad is not None
    torch.testing.assert_close(own.latent.grad, torch.where(own.binary, upstream.T @ x, 0))
    assert torch.equal(own.latent.grad != 0, own.binary)
    torch.testing.assert_close(own.bias.grad, upstream.sum(0))
    assert {n for n, p in own.named_parameters()} == {"latent", "bias"}


def test_3_alpha_is_the_least_squares_scale() -> None:
    """``alpha* = <w, b> / n``: it beats its neighbours, and changes with the latent."""
    own = layer()
    w = own.latent.detach()
    b = torch.where(w >= 0, 1.0, -1.0)
    alpha = own.alpha()
    torch.testing.assert_close(alpha, torch.where(own.binary, w * b, 0).sum(1, keepdim=True) / own.binary.sum(1, keepdim=True), rtol=1e-3, atol=0)

    def error(a: Tensor) -> Tensor:
        return torch.where(own.binary, (w - a * b).square(), 0).sum(1)

    assert bool((error(alpha) <= error(alpha * 1.01)).all()) and bool((error(alpha) <= error(alpha * 0.99)).all())
    with torch.no_grad():
        own.latent *= 2
    torch.testing.assert_close(own.alpha(), 2 * alpha, rtol=1e-3, atol=0)
    assert not own.alpha().requires_grad


def test_effective_is_what_is_stored() -> None:
    for salient in (0.0, 0.1, 0.3):
        own = layer(salient)
        with torch.no_grad():
            own.latent[0, :4] = 0  # sgn(0) = +1
        assert torch.equal(own.packed().dequantize(), own.effective())
        frozen = (Int(8) @ channel()).quantize(layer(salient).latent.detach())
        assert torch.equal(own.effective()[~own.binary], frozen[~own.binary])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_models.build("llama")[0]


def test_the_loss_falls_and_the_frozen_stay(model: nn.Module, tmp_path: Path) -> None:
    tokens, before = counting(), {n: p.clone() for n, p in model.named_parameters()}
    seen: list[int] = []
    trained = train_partial_binary(model, 0.3, tokens, steps=60, lr=3e-3, length=24, progress=lambda step, loss: seen.append(step))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the caller's model is left alone
    assert seen == list(range(60)) and len(trained.losses) == 60
    assert sum(trained.losses[-5:]) / 5 < sum(trained.losses[:5]) / 5 - 0.3
    assert trained.flips and all(0 < rate < 0.5 for _, rate in trained.flips)

    fine = {n: m for n, m in trained.model.named_modules() if isinstance(m, QuantLinear)}
    assert len(fine) == 14 and "lm_head" not in fine
    for name, module in fine.items():
        weight = before[f"{name}.weight"]
        binary = masks_of(trained.model)[name]
        frozen = (Int(8) @ channel()).quantize(weight)
        assert torch.equal(module.weight[~binary], frozen[~binary])
        assert int((~binary).sum()) == PartialBinary(0.3).salient_count(*weight.shape)
        assert all(len(row[own].abs().unique()) <= 1 for row, own in zip(module.weight, binary, strict=True))
    with torch.no_grad():
        logits = trained.model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) < trained.losses[0] - 0.3  # the stored model has learnt, not only its latents
    others = {n: p for n, p in trained.model.named_parameters() if n in before}
    assert others and all(torch.equal(p, before[n]) for n, p in others.items())

    trained.model.save_pretrained(tmp_path / "saved")
    again, _ = dither.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, logits)
    stored = sum(8 * m.qtensor().nbytes for m in fine.values())
    assert trained.bits_per_weight == pytest.approx(stored / sum(m.out_features * m.in_features for m in fine.values()))


def test_runs_repeat_and_seeds_differ(model: nn.Module) -> None:
    runs = [train_partial_binary(model, 0.1, counting(), steps=4, seed=s, batch=2, accumulate=2).losses for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_accumulated_batches_are_one_batch(model: nn.Module) -> None:
    tokens = counting(8)
    one = train_partial_binary(model, 0.1, tokens, steps=2, batch=8, lr=1e-3)
    four = train_partial_binary(model, 0.1, tokens, steps=2, batch=2, accumulate=4, lr=1e-3)
    assert four.losses[0] == pytest.approx(one.losses[0], rel=1e-5)


def test_signed_masks_take_both_tails_alike(model: nn.Module) -> None:
    skewed = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        skewed[0].weight.copy_(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).exp())
    weight = skewed[0].weight.detach().clone()
    own = put_partial(skewed, PartialBinary(0.2))["0"]
    low, high = weight[~own.binary].sort().values.tensor_split(2)
    inside = weight[own.binary]
    assert float(low.max()) <= float(inside.min()) and float(high.min()) >= float(inside.max())
    assert not torch.equal(own.binary, PartialBinary(0.2).choose(weight.abs()))


def test_masks_of_a_quantized_model(model: nn.Module) -> None:
    """The variant that is salient by the Hessian: its masks come from the method without training."""
    tokens = counting()
    found = dither.quantize(model, PBLLM(salient=0.2), tokens).model
    masks = masks_of(found)
    trained = train_partial_binary(model, 0.2, tokens, steps=2, masks=masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(trained.model).items())
    with pytest.raises(ValueError, match=r"^masks: that of"):
        train_partial_binary(model, 0.3, tokens, steps=2, masks=masks)
    with pytest.raises(ValueError, match=r"^masks: none for"):
        train_partial_binary(model, 0.2, tokens, steps=2, masks={})


def test_biases_are_trained() -> None:
    model = tiny_models.build("qwen2")[0]
    trained = train_partial_binary(model, 0.1, counting(), steps=3, lr=1e-2)
    old = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.bias"]
    new = dict(trained.model.named_parameters())["model.layers.0.self_attn.q_proj.bias"]
    assert not torch.equal(old, new)


def test_learning_rate() -> None:
    rates = [learning_rate(s, 100, 0.05) for s in range(100)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]) and rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.001
    assert rates[52] == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert learning_rate(0, 1, 0) == 1


def test_wrong_values(model: nn.Module) -> None:
    for name, wrong in (("steps", 0), ("batch", 0), ("accumulate", 0), ("lr", 0.0), ("salient", 1.0), ("salient", 2.0), ("metric", "size")):
        with pytest.raises(ValueError, match=name):
            train_partial_binary(model, **{"data": counting(), name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no linear layer"):
        train_partial_binary(model, 0.1, counting(), skip=("*",))
