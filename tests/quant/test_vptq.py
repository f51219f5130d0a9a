"""VPTQ from end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
import tiny_folder
import tiny_models
from dither.cli.main import main
from dither.errors import ExportError, UsageError
from dither.formats import Codebook, Int, group
from dither.quant import Recipe
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, VPTQ, build, read
from dither.quant.recipes import knobs as knobs_of
from dither.quant.rounding.columns import Columns

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"centroids": 16, "kmeans_iters": 10}


def inputs(sample: Any) -> Any:
    return sample if isinstance(sample, dict) else {"input_ids": sample}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit", "swin"])
@pytest.mark.parametrize("v", [4, 5])  # 5 divides no layer: the last vectors are padded
def test_on_every_kind_of_model(name: str, v: int) -> None:
    model, sample = tiny_models.build(name)
    result = dither.quantize(model, VPTQ(vector_len=v, refine=1, **SMALL), [inputs(sample)])
    assert result.report.layers and all(row.scheme.startswith("codebook of 16") for row in result.report.layers)
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(**inputs(sample))[0]).all())


def test_better_than_its_parts_through_the_layers() -> None:
    model, _ = tiny_models.build("llama")
    found = []
    for arm in ({"weighted": False, "compensate": False}, {}, {"refine": 3}):
        rows = dither.quantize(model, VPTQ(**SMALL, **arm), TOKENS).report.layers
        found.append(sum(row.output_error or 0 for row in rows))
    assert found[2] < found[1] < found[0]


def test_disk_memory_and_resume_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder.save(tmp_path / "model")
    recipe = VPTQ(vector_len=3, centroids=16, residual=4, groups=2, outlier_percent=4.0, outlier=(2, 8), norm=True, refine=1, kmeans_iters=8)
    whole = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "whole")
    held = dither.quantize(tmp_path / "model", recipe, TOKENS).model.state_dict()
    loaded = whole.model.state_dict()
    assert loaded.keys() == held.keys() and all(torch.equal(loaded[k], held[k]) for k in held)

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 1:
            raise Stop

    with pytest.raises(Stop):
        dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "parts", progress=stop)
    resumed = dither.quantize(tmp_path / "model", recipe, TOKENS, tmp_path / "parts")
    assert resumed.report.resumed_blocks == 1
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()

    from safetensors import safe_open

    own = ("codes", "centroids", "residuals", "groups", "outlier_columns", "outlier_codes", "outlier_centroids", "column_scale", "column_bias")
    with safe_open(tmp_path / "whole/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[2] in own)
    weights = sum(row.shape[0] * row.shape[1] for row in whole.report.layers)
    assert whole.bits_per_weight == pytest.approx(8 * stored / weights)

    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    with torch.no_grad():
        a, b = reloaded(input_ids=TOKENS)[0], whole.model(input_ids=TOKENS)[0]
    assert float((a - b).abs().max()) < 1e-2 * float(b.abs().max())
    with pytest.raises(ExportError, match="codebook"):
        dither.export(tmp_path / "whole", tmp_path / "export")


def test_layers_without_traffic_are_plain() -> None:
    model, sample = tiny_models.build("mixtral")
    report = dither.quantize(model, VPTQ(**SMALL), [sample]).report
    plain = [row for row in report.layers if row.fallback]
    assert plain and all("plain vector quantization" in (row.fallback or "") for row in plain)


def test_bits_make_the_books() -> None:
    assert VPTQ().scheme() == Codebook(4, 256) and VPTQ(bits=3).scheme() == Codebook(4, 256, 16)
    assert VPTQ(bits=1).scheme() == Codebook(4, 16) and VPTQ(bits=4).scheme() == Codebook(4, 256, 256)
    assert VPTQ(bits=3, centroids=512).scheme() == Codebook(4, 512)
    assert VPTQ(weights=Codebook(8, 64)).scheme() == Codebook(8, 64)
    with pytest.raises(ValueError, match="residual"):
        VPTQ(residual=16).scheme()


def test_recipes_are_data(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: vptq\nvector_len: 6\ncentroids: 64\nresidual: 8\noutlier_percent: 1.5\noutlier: [4, 128]\nrefine: 2\n")
    recipe = read(tmp_path / "r.yaml").recipe()
    assert recipe.weights == Codebook(6, 64, 8, 1, 1.5, (4, 128)) and recipe.needs_data
    assert json.loads(json.dumps(recipe.to_json()))["weights"]["vector"] == 6
    assert "refine" in knobs_of("vptq") and not {"group", "sym", "scale", "format"} & set(knobs_of("vptq"))
    wrong: list[dict[str, Any]] = [{"group": 64}, {"centroids": 100}, {"residual": 1, "centroids": 16}, {"init": "x"}]
    for options in wrong:
        with pytest.raises(UsageError, match=next(iter(options))):
            build("vptq", options)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Columns rounds to grids of numbers, not to codebook"):
        GPTQ(weights=Codebook()).recipe()
    with pytest.raises(UsageError, match=r"VectorColumns rounds to codebooks of vectors"):
        VPTQ(weights=Int(4) @ group(64)).recipe()
    with pytest.raises(UsageError, match=r"OutputClip chooses a grid of numbers"):
        Chain(AWQ(round=False), VPTQ()).recipe()
    with pytest.raises(UsageError):
        Recipe((Columns(),), Codebook())
    model, _ = tiny_models.build("llama")
    with pytest.raises(UsageError, match=r"layers\.0\.\S+: vector: 64 weights of a column, but the matrix has only \d+ rows"):
        dither.quantize(model, VPTQ(vector_len=64, centroids=2), TOKENS)


def test_after_awq_scales() -> None:
    """AWQ searches its scales on a grid that stands in for the codebook, and folds them: the float function stays the same."""
    model, _ = tiny_models.build("llama")
    result = dither.quantize(model, build("awq+vptq", {"clip": False, **SMALL, "bits": 3, "search_tokens": 64}), TOKENS)
    assert any(site.get("r", 0) > 0 for site in result.report.sites)
    assert all(row.scheme.startswith("codebook") for row in result.report.layers)
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(input_ids=TOKENS)[0]).all())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_folder.text())
    shared = ["quantize", str(tmp_path / "model"), "--method", "vptq", "--calibration", str(tmp_path / "text.txt")]
    shared += ["--samples", "4", "--length", "32"]
    knobs = ["--set", "vector_len=4", "--set", "centroids=16", "--set", "residual=4", "--json"]
    with pytest.raises(SystemExit) as end:
        main([*shared, *knobs, "-o", str(tmp_path / "out")])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["method"] == "vptq"
