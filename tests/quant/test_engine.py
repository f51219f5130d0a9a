"""The engine from end to end on tiny models: what is quantized, what it costs in bits, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dither
import tiny_folder
import tiny_models
from dither.errors import CalibrationError, CheckpointError, UsageError
from dither.formats import Int, channel, group
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, RTN, build

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
METHODS = ["rtn", "gptq", "awq", "awq+gptq"]


def calibration(sample: Any) -> Any:
    return [sample] if isinstance(sample, dict) else [{"input_ids": sample}]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "whisper", "vit"])
def test_every_method_on_every_kind_of_model(name: str, method: str) -> None:
    model, sample = tiny_models.build(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = dither.quantize(model, build(method, {"bits": 4, "group": 16}), calibration(sample))
    assert len(result.report.layers) > 0 and 4 < result.bits_per_weight < 8
    with torch.no_grad():
        out = result.model(**(sample if isinstance(sample, dict) else {"input_ids": sample}))[0]
    assert bool(torch.isfinite(out).all())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the caller's model is left alone


def test_gptq_is_better_than_rtn_through_the_layers() -> None:
    model, _ = tiny_models.build("llama")
    errors = {}
    for recipe in (RTN(bits=3, group=16), GPTQ(bits=3, group=16)):
        copy_ = dither.quantize(model, recipe, TOKENS, seed=0).model
        with torch.no_grad():
            errors[recipe.name] = float((copy_(input_ids=TOKENS)[0] - model(input_ids=TOKENS)[0]).square().mean())
    assert errors["gptq"] < errors["rtn"]


def test_memory_and_disk_agree_and_runs_repeat(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    chain = Chain(AWQ(bits=3, group=16, round=False), GPTQ(bits=3, group=16))
    results = [dither.quantize(tmp_path / "model", chain, TOKENS, out) for out in (tmp_path / "a", tmp_path / "b", None)]
    assert results[0].bits_per_weight == results[2].bits_per_weight
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    on_disk, held = results[0].model.state_dict(), results[2].model.state_dict()
    assert on_disk.keys() == held.keys() and all(torch.equal(on_disk[k], held[k]) for k in held)
    again = dither.quantize(tmp_path / "model", chain, TOKENS, tmp_path / "a")
    assert "already complete: nothing was done" in again.report.notes


def test_bits_are_the_bytes_on_disk(tmp_path: Path) -> None:
    from safetensors import safe_open

    tiny_folder.save(tmp_path / "model")
    result = dither.quantize(tmp_path / "model", RTN(bits=3, group=16), TOKENS, tmp_path / "out")
    stored = weights = 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.rpartition(".")[2] in ("codes", "scale", "zero_point"):
                tensor = file.get_tensor(name)
                stored += tensor.numel() * tensor.element_size()
    weights = sum(row.shape[0] * row.shape[1] for row in result.report.layers)
    assert result.bits_per_weight == pytest.approx(8 * stored / weights)


def test_skip_override_and_ragged_groups_are_told() -> None:
    model, _ = tiny_models.build("llama")
    recipe = RTN(bits=4, group=24, skip=("*.o_proj",), overrides={"*.down_proj": Int(8) @ channel()})
    report = dither.quantize(model, recipe, TOKENS).report
    names = [row.name for row in report.layers]
    assert not any(n.endswith("o_proj") for n in names) and not any("lm_head" in n for n in names)
    assert all(row.scheme.startswith("int8") for row in report.layers if row.name.endswith("down_proj"))
    assert any("the last group of each row is shorter" in note for note in report.notes)


def test_user_modules_without_blocks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 32), nn.ReLU(), nn.Linear(32, 16))
    images = torch.randn(64, 3, 8, 8)
    result = dither.quantize(net, GPTQ(bits=4, group=8), [{"input": images}])
    assert {row.name for row in result.report.layers} == {"0", "3", "5"}
    with torch.no_grad():
        error = (result.model(images) - net(images)).square().mean() / net(images).square().mean()
    assert float(error) < 0.1


def test_folded_scales_leave_float_outputs_alone(tmp_path: Path) -> None:
    """AWQ with a grid as fine as float: what is left is the rewrite, which must change nothing."""
    model, _ = tiny_models.build("llama")
    model = model.float()
    fine = AWQ(weights=Int(8, scale="float32") @ group(1), clip=False)
    rewritten = dither.quantize(model, fine, TOKENS, compute=torch.float32)
    with torch.no_grad():
        a, b = rewritten.model(input_ids=TOKENS)[0], model(input_ids=TOKENS)[0]
    assert float((a - b).abs().max() / b.abs().max()) < 1e-4


def test_other_settings_on_the_same_folder_are_refused(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    dither.quantize(tmp_path / "model", RTN(bits=4, group=16), TOKENS, tmp_path / "out")
    with pytest.raises(UsageError, match=r"bits: 4 -> 3"):
        dither.quantize(tmp_path / "model", RTN(bits=3, group=16), TOKENS, tmp_path / "out")
    dither.quantize(tmp_path / "model", RTN(bits=3, group=16), TOKENS, tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError):
        dither.quantize(tmp_path / "model", RTN(bits=3, group=16), TOKENS, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").exists()


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dither.cli.main", *arguments], capture_output=True, text=True, **options)


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("dither: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_faults_are_one_line(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    one_line(run("quantize", str(tmp_path / "nowhere"), "-o", out), 1, "nowhere")
    one_line(run("quantize", model, "--method", "gtpq", "-o", out), 2, "gtpq", "gptq")
    one_line(run("quantize", model, "--bits", "9", "-o", out), 2, "9")
    one_line(run("quantize", model, "--set", "damping=3", "-o", out), 2, "damping")
    (tmp_path / "short.txt").write_text("too short")
    one_line(run("quantize", model, "--method", "gptq", "--calibration", str(tmp_path / "short.txt"), "-o", out), 1, "tokens")
    weights = tmp_path / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    one_line(run("quantize", model, "-o", out), 1, "model.safetensors")
    assert not Path(out, "config.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs file size limits")
def test_no_space_left_loses_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the run fails in one line, and resumes when there is room."""
    import resource

    tiny_folder.save(tmp_path / "model")
    arguments = ["quantize", str(tmp_path / "model"), "--method", "rtn", "--bits", "4", "--group", "16", "-o", str(tmp_path / "out")]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    failed = run(*arguments, preexec_fn=limit)
    one_line(failed, 1, "out")
    assert not (tmp_path / "out/config.json").exists()
    assert run(*arguments).returncode == 0


def test_nan_weights_are_named() -> None:
    model, _ = tiny_models.build("llama")
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*\[3, 4\]"):
        dither.quantize(model, GPTQ(bits=4, group=16), TOKENS)


def test_empty_calibration_is_refused() -> None:
    model, _ = tiny_models.build("llama")
    with pytest.raises(CalibrationError):
        dither.quantize(model, GPTQ(bits=4, group=16), [])
