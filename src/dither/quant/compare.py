"""Many recipes on one model, with one calibration and one evaluation, so that the figures compare.

Each row is made in a process of its own (`quant.arm`). Finished rows are on disk, so the same comparison started again goes on after them,
in the middle of a row too; rows that failed are tried again. A comparison is the same if the *contents* of its model, calibration and evaluation
are, wherever they lie.

    OUT/setting.json            what all rows share, with the hashes of its contents
    OUT/float.json              the float model's perplexity
    OUT/rows/NAME.json          one finished row, and the machine that made it
    OUT/rows/NAME.costs.json    what quantizing cost, while the row is not yet judged
    OUT/checkpoints/NAME/       removed when the row is finished, unless kept
    OUT/logs/NAME.txt           what the row's process said
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dither import models
from dither.errors import CheckpointError, DitherError, UsageError
from dither.formats import Float, Scheme, WeightScheme
from dither.quant.arm import ArmFailed, Follow, Job, start
from dither.quant.recipes import build, has
from dither.quant.store import explained, fingerprint, write_text
from dither.quant.strict import dumps

_MESSAGES = {"model": "the model", "calibration": "the calibration text", "text": "the evaluation text"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One row to be: a method with its knobs at one width. ``group`` None means one scale a row."""

    method: str
    bits: int
    group: int | None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """What tables call the row's method: ``"gptq clip=output"``."""
        return " ".join([self.method, *(f"{k}={_plain(v)}" for k, v in self.options)])

    @property
    def name(self) -> str:
        """A file name of its own: ``"gptq-w4g64-clip=output"``."""
        size = "row" if self.group is None else self.group
        whole = f"{self.method}-w{self.bits}g{size}" + "".join(f"-{k}={_plain(v)}" for k, v in self.options)
        safe = re.sub(r"[^\w.=+-]", "_", whole)
        return safe if safe == whole and len(safe) <= 100 else f"{safe[:80]}-{fingerprint(whole)}"

    def recipe_options(self) -> dict[str, Any]:
        size = {"bits": self.bits, "group": self.group}
        return {knob: value for knob, value in size.items() if has(self.method, knob)} | dict(self.options)


@dataclass(frozen=True)
class Setting:
    """What all rows share. ``calibration``: a text file, a folder of text, a hub data set, or None (the embedded text)."""

    model: str
    calibration: str | None
    samples: int
    length: int
    seed: int
    text: str | None
    join: str
    windows: int | None
    window_length: int


def run(
    setting: Setting,
    arms: Sequence[Arm],
    out: Path,
    *,
    evaluation: str,
    keep: bool = False,
    say: Say = print,
    follow: Follow = lambda done, blocks: None,
) -> dict[str, Any]:
    """The comparison as plain data (see `report.records.CompareRecord`). ``evaluation``: the text to judge on, joined as asked.

    A row that fails is a row with status "failed" and a reason. Raises UsageError for unknown methods and knobs before anything runs, and
    where ``out`` holds another comparison; DitherError where the float model cannot be judged.
    """
    arms = list({arm.name: arm for arm in arms}.values())
    for arm in arms:
        _check_width(arm, build(arm.method, arm.recipe_options()).recipe().weights)
    _claim(setting, out, evaluation)
    base = _base(setting, out, evaluation, say)
    rows = [_row(setting, arm, out, evaluation, keep, say, follow) for arm in arms]
    where = base["machine"]
    strangers = [arm.name for arm, row in zip(arms, rows, strict=True) if row["machine"] != where]
    return {
        "model": setting.model,
        "calibration": {"text": _name(setting.calibration), "windows": setting.samples, "length": setting.length},
        "evaluation": {
            "text": _name(setting.text) + (", rows joined by blank lines" if setting.join == "wikitext" else ""),
            "windows": setting.windows,
            "length": setting.window_length,
        },
        "seed": setting.seed,
        "machine": where,
        "date": max([base["date"], *(row["date"] for row in rows)]),
        "float_perplexity": base["perplexity"],
        "float_bits_per_weight": base["bits"],
        "notes": [f"measured on another machine, or with other versions: {', '.join(strangers)}"] if strangers else [],
        "rows": [row["row"] for row in rows],
    }


def _check_width(arm: Arm, weights: WeightScheme) -> None:
    """Raises UsageError where a format of its own width stands in a row of another: the table would be wrong."""
    if isinstance(weights, Scheme) and isinstance(weights.format, Float) and (bits := weights.format.bits) != arm.bits:
        raise UsageError(f"--methods {arm.title}: its weights have {bits} bits, not {arm.bits}; compare it with --bits {bits}")


def identity(setting: Setting, evaluation: str) -> dict[str, Any]:
    """The setting, and a hash of each content that it names."""
    return {
        "setting": {k: v for k, v in asdict(setting).items() if k not in ("model", "calibration", "text")},
        "names": {k: getattr(setting, k) for k in _MESSAGES},
        "contents": {
            "model": models.open(setting.model).fingerprint(),
            "calibration": _content(setting.calibration),
            "text": _hash(evaluation),
        },
    }


def _content(calibration: str | None) -> str:
    """A hash of the calibration text; a hub data set is known by its name."""
    if calibration is None:
        return _hash(models.embedded_text("calibration"))
    return _hash(models.read_text(calibration)) if Path(calibration).exists() else f"data set {calibration}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _claim(setting: Setting, out: Path, evaluation: str) -> None:
    """Make ``out`` the folder of this comparison. Raises UsageError, saying what differs, where it is another one's."""
    stamp, new = out / "setting.json", identity(setting, evaluation)
    if stamp.is_file():
        old = _read(stamp)
        changes = [
            f"{key}: {old['setting'].get(key)} -> {value}"
            for key, value in new["setting"].items()
            if old["setting"].get(key) != value
        ]
        for key, what in _MESSAGES.items():
            if old["contents"].get(key) != new["contents"][key]:
                a, b = old["names"].get(key) or "embedded text", new["names"][key] or "embedded text"
                changes.append(f"{what}: {a} -> {b}" if a != b else f"{what}: the content of {a} changed")
        if changes:
            raise UsageError(f"{out}: holds a comparison with other settings ({'; '.join(changes)}); choose another folder")
        return
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(stamp, dumps(new, 1))


def _read(path: Path) -> dict[str, Any]:
    """A file that this module wrote. Raises CheckpointError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); remove it and run again") from None


def _name(text: str | None) -> str:
    return "embedded text" if text is None else Path(text).name


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _base(setting: Setting, out: Path, evaluation: str, say: Say) -> dict[str, Any]:
    path = out / "float.json"
    if path.is_file():
        return _read(path)
    say(f"float: perplexity of {setting.model}")
    job = Job(setting.model, evaluation, setting.windows, setting.window_length)
    try:
        found = start(job, out / "logs" / "float.txt", lambda done, blocks: None, lambda costs: None)
    except ArmFailed as error:
        raise DitherError(f"{setting.model}: the float model cannot be judged ({error})") from None
    with explained(out):
        write_text(path, dumps(found, 1))
    return found


def _row(
    setting: Setting, arm: Arm, out: Path, evaluation: str, keep: bool, say: Say, follow: Follow
) -> dict[str, Any]:
    """``{"row", "machine", "date"}`` of one arm, from disk where it is finished."""
    path, spent = out / "rows" / f"{arm.name}.json", out / "rows" / f"{arm.name}.costs.json"
    folder = out / "checkpoints" / arm.name
    if path.is_file():
        found = _read(path)
        if found["row"]["status"] == "ok" and not (keep and not (folder / "config.json").is_file()):
            return found
    say(f"{arm.name}: quantizing and judging")
    job = Job(
        setting.model,
        evaluation,
        setting.windows,
        setting.window_length,
        arm.method,
        arm.recipe_options(),
        str(folder),
        setting.calibration,
        setting.samples,
        setting.length,
        setting.seed,
    )
    with explained(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"method": arm.title, "bits": arm.bits, "group": arm.group}
    where = {key: _read(out / "float.json")[key] for key in ("machine", "date")}
    try:
        result = start(job, out / "logs" / f"{arm.name}.txt", follow, lambda costs: write_text(spent, dumps(costs, 1)))
    except ArmFailed as error:
        row |= {"status": "failed", "reason": str(error)}
        say(f"{arm.name}: failed: {error}")
    else:
        where = {key: result.pop(key) for key in where}
        row |= {"status": "ok", **result}
        if spent.is_file():
            row |= _read(spent)
        else:
            row["notes"] = [*row["notes"], "quantized in several runs, so time and memory were not measured"]
        say(f"{arm.name}: perplexity {float(row['perplexity']):.2f} at {row['bits_per_weight']:.2f} bits a weight")
    with explained(out):
        found = {"row": row, **where}
        write_text(path, dumps(found, 1))
        spent.unlink(missing_ok=True)
        if (row["status"] == "failed" or not keep) and folder.exists():
            shutil.rmtree(folder)
    return found
