"""Few-bit inputs, keys and values, and float formats, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dither
import tiny_folder
from dither.cli.main import main
from dither.quant import arm, compare
from dither.quant.kv import KVRounding
from dither.quant.linear import QuantLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run-time")
    tiny_folder.save(root / "model")
    (root / "text.txt").write_text(tiny_folder.text(60))
    return root


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert done.value.code == code, printed.err
    return printed.out, printed.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(call(capsys, *arguments, "--json")[0], parse_constant=pytest.fail)


def test_from_quantize_to_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = folder / "w4a4kv4"
    made = answer(
        capsys, "quantize", folder / "model", "--method", "rtn", "--group", 16, "--act-bits", 4, "--act-group", 8, "--kv-bits", 3, "-o", out
    )
    assert (made["act_bits"], made["kv_bits"]) == (4, 3)
    model, _ = dither.load(out)
    inputs = {str(m.inputs.scheme) for m in model.modules() if isinstance(m, QuantLinear) and m.inputs is not None}
    assert inputs == {"int4 asymmetric group(8) dynamic"}
    assert {str(m.kv) for m in model.modules() if isinstance(m, KVRounding)} == {"int3 asymmetric token dynamic"}

    judge = ("--text", folder / "text.txt", "--length", 32, "--windows", 4)
    few, weights_only = answer(capsys, "eval", out, *judge)["perplexity"], folder / "w4"
    plain = answer(capsys, "quantize", folder / "model", "--method", "rtn", "--group", 16, "-o", weights_only)
    assert "act_bits" not in plain and "kv_bits" not in plain
    assert few != answer(capsys, "eval", weights_only, *judge)["perplexity"]
    assert answer(capsys, "run", out, "few bits", "--max-tokens", 8)["tokens"] == 8
    assert answer(capsys, "run", out, "few bits", "--max-tokens", 8, "--dtype", "bfloat16")["tokens"] == 8
    _, error = call(capsys, "export", out, "--to", "compressed-tensors", "-o", folder / "ct", code=1)
    assert "keys and values are rounded to int3" in error and error.count("\n") == 1


def test_export_names_the_inputs(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = folder / "a8"
    call(capsys, "quantize", folder / "model", "--method", "rtn", "--group", 16, "--act-bits", 8, "-o", out)
    _, error = call(capsys, "export", out, "--to", "compressed-tensors", "-o", folder / "ct8", code=1)
    assert "its inputs are rounded at run time" in error


@pytest.mark.parametrize(
    ("options", "scheme", "inputs"),
    [
        (["--format", "fp8", "--group", "row", "--act-format", "fp8"], "e4m3 channel", "e4m3 token dynamic"),
        (["--format", "nvfp4", "--act-format", "nvfp4"], "e2m1 e4m3 scales group(16)", "e2m1 e4m3 scales group(16) dynamic"),
        (["--format", "mxfp4"], "e2m1 e8m0 scales group(32)", None),
        (["--set", "format=e3m2", "--bits", "6", "--group", "8"], "e3m2 group(8)", None),
    ],
)
def test_formats_by_name(capsys: pytest.CaptureFixture[str], folder: Path, options: list[str], scheme: str, inputs: str | None) -> None:
    out = folder / ("-".join(options).replace("--", ""))
    made = answer(capsys, "quantize", folder / "model", "--method", "rtn", *options, "-o", out)
    assert made.get("act_bits") == (None if inputs is None else 8 if "e4m3 token" in inputs else 4)
    rows = json.loads((out / "dither.json").read_text())["report"]["layers"]
    assert {row["scheme"] for row in rows} == {scheme} and {row["inputs"] for row in rows} == {inputs}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "fp8", "--bits", "3"], "bits: fp8 has 8 bits, not 3; leave bits out"),
        (["--format", "nvfp4", "--group", "32"], "group: nvfp4 has groups of 16, not 32"),
        (["--format", "e9m9"], "format: a float of 1 sign, 9 exponent and 9 mantissa bits"),
        (["--format", "half"], "format: must be int, fp4, fp8, mxfp4, nvfp4 or like e3m2, not 'half'"),
        (["--format", "fp4", "--sym", "full"], "sym: is of integers"),
        (["--act-format", "fp8", "--act-bits", "4"], "act_bits: fp8 has 8 bits, not 4"),
        (["--act-group", "16"], "act_group: 16 is of few-bit inputs"),
        (["--act-bits", "9"], "--act-bits 9: must be 1 to 8"),
        (["--kv-bits", "0"], "--kv-bits 0: must be 1 to 8"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(capsys: pytest.CaptureFixture[str], folder: Path, options: list[str], words: str) -> None:
    _, error = call(capsys, "quantize", folder / "model", "--method", "rtn", *options, "-o", folder / "never", code=2)
    assert words in error and error.count("\n") == 1 and not (folder / "never").exists()


def test_a_recipe_file_has_them_as_fields(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text("{method: rtn, bits: 4, group: 16, act_bits: 8, kv_bits: 4}")
    made = answer(capsys, "quantize", folder / "model", "--recipe", recipe, "-o", folder / "from-file")
    assert (made["act_bits"], made["kv_bits"]) == (8, 4)
    _, error = call(capsys, "quantize", folder / "model", "--recipe", recipe, "--kv-bits", 4, "-o", folder / "never", code=2)
    assert "--kv-bits: goes into the recipe file, as kv_bits" in error


def test_methods_shows_the_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = answer(capsys, "methods", "gptq")["gptq"]["knobs"]
    assert {"act_bits", "act_group", "act_format", "kv_bits", "format"} <= set(knobs)
    assert "--set kv_bits=None" in call(capsys, "methods", "gptq")[0]


def test_a_comparison_says_it_in_the_scheme(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "start", lambda job, log, follow, costs: arm._work(job, lambda **message: None))  # here, not in a process
    out, text = folder / "compare", folder / "text.txt"
    judge = ["--text", text, "--windows", 2, "--window-length", 32, "--calibration", text, "--samples", 4, "--length", 32]
    methods = "rtn:act_bits=8:kv_bits=4,gptq:act_bits=8,rtn"
    record = answer(capsys, "compare", folder / "model", "--methods", methods, "--bits", 4, "--group", 16, *judge, "-o", out)
    schemes = [row["scheme"] for row in record["rows"]]
    plain = "int4 asymmetric group(16)"
    assert schemes == [f"{plain}, inputs int8 asymmetric token, kv int4 asymmetric token", f"{plain}, inputs int8 asymmetric token", plain]
    assert len({row["perplexity"] for row in record["rows"]}) == 3
    assert "kv int4 asymmetric token" in (out / "report.html").read_text()
    _, error = call(capsys, "compare", folder / "model", "--methods", "rtn:format=fp8", "--bits", 4, *judge, "-o", folder / "no", code=2)
    assert "its weights have 8 bits, not 4; compare it with --bits 8" in error
