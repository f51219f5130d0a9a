"""Block reconstruction, alone and in the engine: what is minimised, what is kept, on which models, and that runs repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_folder
import tiny_models
from dither import graph
from dither.errors import UsageError
from dither.formats import Int, Params, Scheme, group
from dither.quant.parts import BlockView
from dither.quant.recipe import Recipe
from dither.quant.recipes import METHODS, AdaRound, FlexRound, build
from dither.quant.rounding.adaround import UpOrDown
from dither.quant.rounding.flexround import Division
from dither.quant.rounding.reconstruct import Reconstruct, _Work
from dither.quant.rounding.soft import Diverged
from dither.quant.walker import Call, run

torch.set_num_threads(1)
TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"bits": 3, "group": 16, "steps": 12, "lr": 1e-2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def block(mask: Tensor | None = None, rows: int = 6) -> tuple[BlockView, list[Call], list[Tensor], dict[str, Params]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = Net(), torch.randn(2, rows, 10, 16)
    scheme = Int(3) @ group(16)
    with torch.enable_grad():
        structure = graph.discover_block(net, [((x[0],), {})])
    schemes: dict[str, Any] = {layer.name: scheme for layer in structure.layers}
    view = BlockView(3, "net", net, structure, {}, schemes, torch.float32, {}, 0)
    calls = [Call((one,), {}, mask) for one in x]
    with torch.no_grad():
        targets = run(net, calls)
    return view, calls, targets, {n: scheme.fit(structure.layer(n).flat(net)) for n in schemes}


@torch.no_grad()
def block_loss(view: BlockView, calls: list[Call], targets: list[Tensor], weights: dict[str, Tensor]) -> float:
    """mean over sequences and features of sum_t (f(x) - y)^2, written out."""
    net = Net()
    net.load_state_dict(view.module.state_dict())
    for name, w in weights.items():
        net.get_submodule(name).weight.copy_(w)  # type: ignore[union-attr, operator]
    out = torch.cat([net(call.args[0]) for call in calls])
    squares = (out - torch.cat(targets)).square()
    if calls[0].mask is not None:
        squares = squares * torch.cat([call.mask for call in calls]).unsqueeze(-1)  # type: ignore[misc]
    return float(squares.sum(1).mean())


@pytest.mark.parametrize("soft", [Division(), UpOrDown(penalty=3.0)], ids=["flexround", "adaround"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_stored_codes_have_the_loss_that_is_told(soft: Any, masked: bool) -> None:
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7], [10], [2], [9]])) if masked else None
    view, calls, targets, params = block(mask)
    before = {n: p.clone() for n, p in view.module.named_parameters()}
    told: list[str] = []
    view.say = told.append
    found = Reconstruct(soft, steps=60, lr=2e-2).reconstruct(view, calls, targets, params)
    assert found.keys() == {"a", "b"} and len(told) == 5
    loss = block_loss(view, calls, targets, {n: r.tensor.dequantize() for n, r in found.items()})
    scheme = Int(3) @ group(16)
    rtn = block_loss(view, calls, targets, {n: scheme.quantize(getattr(view.module, n).weight) for n in found})
    facts = found["a"].facts
    assert facts["block_loss"] == pytest.approx(loss, rel=1e-4)
    assert facts["block_loss_nearest"] == pytest.approx(rtn, rel=1e-4)
    assert loss < (0.6 if isinstance(soft, Division) else 0.95) * rtn and facts["step"] > 0
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


@torch.no_grad()
def test_the_best_is_kept_and_divergence_is_told() -> None:
    view, calls, targets, params = block()
    wild = Reconstruct(steps=20, lr=5.0)
    found = wild.reconstruct(view, calls, targets, params)
    assert found["a"].facts["block_loss"] <= found["a"].facts["block_loss_nearest"]
    last = Reconstruct(steps=20, lr=5.0, keep_best=False).reconstruct(view, calls, targets, params)
    assert last["a"].facts["block_loss"] > found["a"].facts["block_loss_nearest"]
    broken = [t.clone() for t in targets]
    broken[0][0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="net: the loss is not finite at step 0"):
        Reconstruct(steps=20).reconstruct(view, calls, broken, params)
    part = Reconstruct(steps=20, judged=1)  # judges the first row only
    broken = [t.clone() for t in targets]
    broken[1][-1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"net: the loss is not finite at step \d+") as caught:
        part.reconstruct(view, calls, broken, params)
    assert caught.value.kept.states.keys() == {"a", "b"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="net: has no layer to reconstruct"):
        part.reconstruct(view, calls, targets, {})


@torch.no_grad()
def test_every_row_comes_once_an_epoch_in_runs_of_the_batch() -> None:
    view, calls, targets, params = block(rows=5)
    work = _Work(Reconstruct(batch=2), view, calls, targets, params)
    assert not work.whole
    batches = work._batches()
    for _ in range(3):
        seen: list[tuple[int, int]] = []
        while len(seen) < 10:
            pieces = next(batches)
            assert sum(len(rows) for _, rows in pieces if rows is not None) <= 2
            seen += [(i, int(r)) for i, rows in pieces if rows is not None for r in rows]
        assert sorted(seen) == [(i, r) for i in range(2) for r in range(5)]


@torch.no_grad()
def test_rows_that_depend_on_each_other_stay_together() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    view, calls, _, params = block()
    mixed = Mixed()
    mixed.load_state_dict(view.module.state_dict())
    view.module = mixed
    work = _Work(Reconstruct(), view, calls, run(mixed, calls), params)
    assert work.whole and all(rows is None for _, rows in next(work._batches()))


# -- in the engine ----------------------------------------------------------------------------------------------------------


def calibration(name: str, sample: Any) -> Any:
    return TOKENS if name in tiny_models.LANGUAGE else [sample] if isinstance(sample, dict) else [{"input": sample}]


@pytest.mark.parametrize("method", ["flexround", "adaround"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "mixtral"])
def test_on_every_kind_of_model(name: str, method: str) -> None:
    model, sample = tiny_models.build(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = dither.quantize(model, build(method, QUICK), calibration(name, sample))
    rows = result.report.layers
    learned = [row for row in rows if row.fallback is None]
    assert learned and all(row.facts["block_loss"] <= row.facts["block_loss_nearest"] for row in learned)
    experts = [row for row in rows if row.fallback is not None]
    assert bool(experts) == (name == "mixtral")
    assert all(row.fallback == "rounded to nearest: it is not called as a module of its block" for row in experts)
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(**sample)[0]).all())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_better_than_nearest_through_the_model() -> None:
    model, _ = tiny_models.build("llama")
    with torch.no_grad():
        truth = model(input_ids=TOKENS)[0]
        error = {}
        for label, recipe in {
            "rtn": build("rtn", {"bits": 3, "group": 16}),
            "block": build("flexround", QUICK | {"steps": 30}),
            "layer": build("flexround", QUICK | {"steps": 30, "level": "layer"}),
            "chain": build("awq+flexround", QUICK),
            "gptq start": build("flexround", QUICK | {"start": "gptq", "clip": "output"}),
        }.items():
            error[label] = float((dither.quantize(model, recipe, TOKENS).model(input_ids=TOKENS)[0] - truth).square().mean())
    assert all(error[label] < error["rtn"] for label in error if label != "rtn"), error


def test_after_a_rotation() -> None:
    model, _ = tiny_models.build("llama")
    result = dither.quantize(model, build("quarot+flexround", QUICK), TOKENS)
    rows = [row for row in result.report.layers if row.facts]
    assert rows and all(row.facts["block_loss"] < row.facts["block_loss_nearest"] for row in rows)


def test_resumed_runs_give_the_same_bytes(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    recipe = FlexRound(**QUICK)
    whole = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 1 and event.error is not None:
            raise Stop

    with pytest.raises(Stop):
        dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "parts", progress=stop)
    resumed = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "parts")
    assert resumed.report.resumed_blocks == 1 and whole.report.resumed_blocks == 0
    for file in ("model.safetensors", "config.json", "dither.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_what_padding_holds_does_not_matter() -> None:
    model, _ = tiny_models.build("llama")
    mask = (torch.arange(24) < torch.randint(8, 25, (8, 1), generator=torch.Generator().manual_seed(1))).long()
    losses = []
    for filler in (3, 7):
        batch = {"input_ids": TOKENS.where(mask.bool(), filler), "attention_mask": mask}
        report = dither.quantize(model, FlexRound(**QUICK), [batch], compute=torch.float32).report
        losses.append([row.facts["block_loss"] for row in report.layers])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_budgets_and_knobs() -> None:
    def part(method: str, **options: Any) -> Any:
        recipe = build(method, options).recipe()
        assert isinstance(recipe, Recipe)
        return recipe.rounding

    steps = {b: part("flexround", budget=b).steps for b in ("quick", "normal", "paper")}
    assert steps == {"quick": 80, "normal": 500, "paper": 5000}
    assert part("adaround", budget="paper").steps == 20000 and part("adaround", budget="paper").lr == 1e-3
    assert part("flexround", budget="paper", steps=7).steps == 7
    assert part("flexround").lr == 3e-3 and part("flexround", level="layer").lr == 5e-3 and part("flexround", lr=0.1).lr == 0.1
    scheme = build("flexround", {"blocks": "tensor", "bits": 4}).recipe().weights
    assert isinstance(scheme, Scheme) and scheme.blocks.kind == "tensor"
    for method in ("flexround", "adaround"):
        assert method in METHODS
        for options, said in (
            ({"budget": "large"}, "budget must be one of quick, normal, paper, not 'large'"),
            ({"level": "model"}, "level must be 'block' or 'layer', not 'model'"),
            ({"clip": "all"}, "clip must be one of none, power, output, not 'all'"),
            ({"blocks": "row"}, "blocks must be 'group' or 'tensor', not 'row'"),
            ({"lr": -1.0}, "lr must be positive, not -1.0"),
            ({"steps": 0}, "steps must be at least 1, not 0"),
            ({"batch": 0}, "batch must be at least 1, not 0"),
            ({"bits": 1}, "bits must be 2 to 8"),
        ):
            with pytest.raises(UsageError, match=said):
                build(method, options)


def test_recipes_are_plain_data() -> None:
    import json

    stages = json.loads(json.dumps(AdaRound(bits=3).recipe().to_json()))["stages"]
    assert stages[1]["part"] == "Reconstruct" and stages[1]["soft"]["kind"] == "UpOrDown" and stages[1]["soft"]["penalty"] == 3.0
    assert FlexRound(rank=3).recipe().to_json() != FlexRound().recipe().to_json()
