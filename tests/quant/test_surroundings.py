"""What a run must not depend on: autocast around it, the content of padded positions; and what it says of layers without a proved site."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dither
import tiny_models
from dither.quant.recipes import AWQ, build

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
METHODS = pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq"])


def state(model: nn.Module, method: str, calibration: object, **options: object) -> dict[str, torch.Tensor]:
    recipe = build(method, {"bits": 3, "group": 16})
    return dither.quantize(model, recipe, calibration, **options).model.state_dict()  # type: ignore[arg-type]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@METHODS
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_a_run_changes_nothing(method: str, compute: torch.dtype) -> None:
    model, _ = tiny_models.build("llama")
    plain = state(model, method, TOKENS, compute=compute)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(state(model, method, TOKENS, compute=compute), plain)


@METHODS
def test_padded_positions_are_as_if_they_were_not_there(method: str) -> None:
    model, _ = tiny_models.build("llama")
    real = 16
    mask = torch.ones_like(TOKENS)
    mask[:, real:] = 0
    padded = [TOKENS.masked_fill(mask == 0, filler) for filler in (5, 90)]
    first, second = ([{"input_ids": ids, "attention_mask": mask}] for ids in padded)
    alone = state(model, method, [{"input_ids": TOKENS[:, :real]}], compute=torch.float32)
    assert same(state(model, method, first, compute=torch.float32), alone)
    assert same(state(model, method, second, compute=torch.float32), alone)
    if method != "rtn":  # where the mask is not given, the padding counts
        assert not same(state(model, method, [{"input_ids": padded[0]}], compute=torch.float32), alone)


def test_layers_without_a_proved_site_are_quantized_and_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    report = dither.quantize(net, AWQ(bits=4, group=16), [{"input": torch.randn(64, 32)}]).report
    assert [row.name for row in report.layers] == ["0", "2"] and report.sites == []
    assert [line.split(":")[0] for line in report.unproved] == ["0", "2"]
