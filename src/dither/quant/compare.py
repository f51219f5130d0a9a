"""Many recipes on one model, with one calibration and one evaluation, so that the figures compare.

Each quantization runs in a process of its own: its time, CPU time and peak memory are then its own too. Finished rows are on disk; a rerun of
the same comparison goes on after them.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dither import models
from dither.errors import DitherError, UsageError
from dither.quant.checkpoint import load
from dither.quant.judge import perplexity
from dither.quant.outcome import Report
from dither.quant.recipes import build
from dither.quant.store import fingerprint, write_text


@dataclass(frozen=True)
class Arm:
    """One row to be: a method with its options, under a label."""

    method: str
    bits: int
    group: int | None
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def title(self) -> str:
        """What tables call the row's method."""
        return self.label or " ".join([self.method, *(f"{k}={v}" for k, v in self.options)])

    @property
    def name(self) -> str:
        tail = "".join(f"-{k}={v}" for k, v in self.options)
        return f"{self.method}-w{self.bits}g{self.group if self.group is not None else 'row'}{tail}"


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    model: str
    calibration: str | None
    samples: int
    length: int
    seed: int
    text: str | None
    join: str
    windows: int | None
    window_length: int

    def key(self) -> str:
        return fingerprint(vars(self))


def run(
    setting: Setting,
    arms: Sequence[Arm],
    out: Path,
    *,
    evaluation: str,
    keep: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The comparison as plain data (see `report.records.CompareRecord`). ``out`` holds finished rows and, while needed, checkpoints.

    Raises UsageError for unknown methods before anything runs, and where ``out`` holds another comparison.
    """
    for arm in arms:
        build(arm.method, {"bits": arm.bits, "group": arm.group, **dict(arm.options)})
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "setting.json"
    if stamp.is_file() and json.loads(stamp.read_text())["key"] != setting.key():
        raise UsageError(f"{out}: holds a comparison with other settings; choose another folder")
    write_text(stamp, json.dumps({"key": setting.key(), **vars(setting)}, indent=1))
    base = _base(setting, out, evaluation, tell)
    rows = [_row(setting, arm, out, evaluation, keep, tell) for arm in arms]
    return {
        **about(setting),
        "float_perplexity": base["perplexity"],
        "float_bits_per_weight": base["bits"],
        "rows": rows,
    }


def about(setting: Setting) -> dict[str, Any]:
    """Where and how a comparison was made."""
    return {
        "model": setting.model,
        "calibration": {"text": _name(setting.calibration), "windows": setting.samples, "length": setting.length},
        "evaluation": {
            "text": _name(setting.text) + (", rows joined by blank lines" if setting.join == "wikitext" else ""),
            "windows": setting.windows,
            "length": setting.window_length,
        },
        "seed": setting.seed,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What a figure was measured with: processor, threads, versions, date."""
    from importlib.metadata import version

    import dither

    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "machine": {
            "cpu": cpu,
            "threads": torch.get_num_threads(),
            "versions": {
                "dither": dither.__version__,
                "python": platform.python_version(),
                **{p: version(p) for p in ("torch", "transformers")},
            },
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _name(text: str | None) -> str:
    return "embedded text" if text is None else Path(text).name


def _base(setting: Setting, out: Path, evaluation: str, tell: Callable[[str], None]) -> dict[str, Any]:
    path = out / "float.json"
    if not path.is_file():
        tell(f"{setting.model}: float perplexity")
        model, tokenizer = models.load(setting.model)
        result = perplexity(model, evaluation, tokenizer, windows=setting.windows, length=setting.window_length)
        bits = 8 * models.open(setting.model).dtype.itemsize
        write_text(path, json.dumps({"perplexity": result.perplexity, "bits": bits, "seconds": result.seconds}))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _row(
    setting: Setting, arm: Arm, out: Path, evaluation: str, keep: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    path = out / "rows" / f"{arm.name}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    tell(f"{arm.name}: quantizing")
    folder = out / "checkpoints" / arm.name
    row: dict[str, Any] = {"method": arm.title, "bits": arm.bits, "group": arm.group}
    try:
        facts = _quantize(setting, arm, folder)
        report = Report.read(folder)
        tell(f"{arm.name}: perplexity")
        model, tokenizer = load(folder)
        result = perplexity(model, evaluation, tokenizer, windows=setting.windows, length=setting.window_length)
    except DitherError as error:
        row |= {"status": "failed", "reason": str(error)}
    else:
        row |= {
            "status": "ok",
            "scheme": report.layers[0].scheme,
            "bits_per_weight": report.bits_per_weight,
            "perplexity": result.perplexity,
            "seconds": facts["seconds"],
            "cpu_seconds": facts["cpu_seconds"],
            "peak_memory_bytes": facts["peak_memory_bytes"],
            "checkpoint_bytes": _size(folder),
            "notes": facts["notes"],
            "layers": [vars(layer) | {"shape": list(layer.shape)} for layer in report.layers],
        }
        del model
    if not keep and folder.exists():
        import shutil

        shutil.rmtree(folder)
    write_text(path, json.dumps(row, indent=1))
    return row


def _quantize(setting: Setting, arm: Arm, folder: Path) -> dict[str, Any]:
    """``dither quantize`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "dither.cli.main",
        "quantize",
        setting.model,
        "--method",
        arm.method,
        "--bits",
        str(arm.bits),
        "--group",
        "row" if arm.group is None else str(arm.group),
        "--samples",
        str(setting.samples),
        "--length",
        str(setting.length),
        "--seed",
        str(setting.seed),
        "-o",
        str(folder),
        "--json",
    ]
    if setting.calibration is not None:
        command += ["--calibration", setting.calibration]
    for key, value in arm.options:
        command += ["--set", f"{key}={json.dumps(value)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DitherError(last[0].removeprefix("dither: "))
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
