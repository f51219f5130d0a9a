"""Recipes as YAML and JSON files: what they mean, and that a wrong one names the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_folder
from dither.cli.main import main
from dither.errors import UsageError
from dither.formats import Float, Int, channel, group
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, RTN, read

GOOD: list[tuple[str, Any]] = [
    ("method: gptq\nbits: 3\ngroup: 64\nclip: output\n", GPTQ(bits=3, group=64, clip="output")),
    (
        "method: gptq\ngroup: null\nact_order: false\nstatic_groups: false\n",
        GPTQ(group=None, act_order=False, static_groups=False),
    ),
    ("method: rtn\nskip: ['*.o_proj', '*.k_proj']\n", RTN(skip=("*.o_proj", "*.k_proj"))),
    (
        "method: rtn\nweights: {format: {kind: float, exponent: 2, mantissa: 1}, blocks: {kind: group, height: 1, width: 16}}\n",
        RTN(weights=Float(2, 1) @ group(16)),
    ),
    (
        "method: gptq\noverrides:\n  '*.down_proj': {format: {kind: int, bits: 8}, blocks: {kind: channel, height: 1, width: -1}}\n",
        GPTQ(overrides={"*.down_proj": Int(8) @ channel()}),
    ),
    ('{"method": "awq", "bits": 4, "group": 64, "gqa": true}', AWQ(bits=4, group=64, gqa=True)),
    (
        "chain:\n  - {method: awq, bits: 3, group: 16, round: false}\n  - {method: gptq, bits: 3, group: 16}\n",
        Chain(AWQ(bits=3, group=16, round=False), GPTQ(bits=3, group=16)),
    ),
    ("method: awq+gptq\nbits: 3\ngroup: 16\n", Chain(AWQ(bits=3, group=16, round=False), GPTQ(bits=3, group=16))),
]


def write(folder: Path, text: str) -> Path:
    path = folder / ("recipe.json" if text.startswith("{") else "recipe.yaml")
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "expected"), GOOD, ids=lambda v: v.split("\n")[0] if isinstance(v, str) else "")
def test_files_say_what_records_say(text: str, expected: Any, tmp_path: Path) -> None:
    assert read(write(tmp_path, text)).recipe() == expected.recipe()


BAD = [
    ("method: gptq\nbits: nine\n", "bits: 'nine'"),
    ("method: gptq\nbits: 9\n", "bits must be 1 to 8, not 9"),
    ("method: gptq\ngroup: 0\n", "group size must be positive"),
    ("method: gptq\ndamp: -1\n", "damp must be positive, not -1"),
    ("method: gptq\nclip: sideways\n", "clip must be one of none, power, output, not 'sideways'"),
    ("method: gptq\nact_order: true\nstatic_groups: false\n", "act_order needs static_groups"),
    ("method: rtn\nsym: sideways\n", "sym must be False or one of"),
    ("method: rtn\nscale: float99\n", "scale must be one of"),
    ("method: rtn\nskip: 3\n", "skip: 3"),
    ("method: rtn\nbit: 3\n", "bit: rtn has no such field; did you mean 'bits'?"),
    (
        "method: rtn\nweights: {format: {kind: int, bits: 9}, blocks: {kind: channel, height: 1, width: -1}}\n",
        "weights: format: bits must be 1 to 8",
    ),
    ("method: rtn\nweights: {format: {kind: int, bits: 4}}\n", "weights: scheme: has fields ['format']"),
    (
        "method: rtn\noverrides: {'*': {format: {kind: int}, blocks: {kind: channel, height: 1, width: -1}}}\n",
        "overrides: format:",
    ),
    ("method: gpqt\n", "method 'gpqt': is unknown; did you mean 'gptq'?"),
    ("method: awq+gpqt\n", "method 'gpqt': is unknown"),
    ("method: awq+gptq\nbitz: 3\n", "option 'bitz'"),
    ("bits: 3\n", "method: is missing"),
    ("- 3\n", "a recipe is a mapping"),
    ("chain: []\n", "chain: must be a list"),
    ("chain: [{method: rtn}]\nbits: 3\n", "chain: must be a list of recipes, and stand alone"),
    ("chain:\n  - {method: awq, round: false}\n  - {method: gptq, bits: three}\n", "chain[1].bits: 'three'"),
    (
        "chain:\n  - {method: awq, bits: 3, round: false}\n  - {method: gptq, bits: 4}\n",
        "chain: chain awq+gptq: the methods ask for",
    ),
    ("chain:\n  - {method: awq}\n  - {method: gptq}\n", "chain: a recipe has one rounding"),
    ("chain:\n  - {method: awq+gptq}\n  - {method: rtn}\n", "chain: each item is one method"),
    ("chain:\n  - {chain: [{method: awq, round: false}]}\n  - {method: rtn}\n", "chain: each item is one method"),
    ("method: [\n", "is no valid YAML"),
    ('{"method": ', "is no valid JSON"),
]


@pytest.mark.parametrize(("text", "says"), BAD, ids=lambda v: v.replace("\n", " ")[:50])
def test_wrong_files_name_the_file_and_the_field(text: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        read(tmp_path / "none.yaml")


def test_the_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder.save(tmp_path / "model")
    eight = "{format: {kind: int, bits: 8}, blocks: {kind: channel, height: 1, width: -1}}"
    recipe = write(tmp_path, f"method: rtn\nbits: 3\ngroup: 16\noverrides: {{'*.down_proj': {eight}}}\n")

    def call(code: int) -> tuple[str, str]:
        with pytest.raises(SystemExit) as done:
            main(["quantize", str(tmp_path / "model"), "--recipe", str(recipe), "--json", "-o", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert done.value.code == code, printed.err
        return printed.out, printed.err

    out, _ = call(0)
    assert json.loads(out)["method"] == "rtn"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    bits = {name: config["schemes"][entry["scheme"]]["format"]["bits"] for name, entry in config["layers"].items()}
    assert {width for name, width in bits.items() if "down_proj" in name} == {8}
    assert {width for name, width in bits.items() if "down_proj" not in name} == {3}
    recipe.write_text("method: rtn\nbits: nine\n")
    out, err = call(2)
    assert out == "" and err.startswith(f"dither: {recipe}: bits: 'nine'") and err.count("\n") == 1
