"""``dither demo``: the main job, on the embedded model: four bits three ways, judged, exported, and loaded by somebody else's code."""

from __future__ import annotations

import json as js
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli import compare as compare_verb
from dither.cli import options as o

if TYPE_CHECKING:
    from dither.quant.arm import Follow
    from dither.quant.compare import Say
    from dither.report import CompareRecord

# Runs without dither: transformers and compressed-tensors alone load the export and go on from a prompt.
FOREIGN = """
import json, sys
sys.modules["dither"] = None  # any import of dither fails from here on
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
print("\\n" + json.dumps(tokenizer.decode(new, skip_special_tokens=True)))
"""
FOREIGN_SECONDS = 300
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Work:
    """What the demo measures. Sized to end within 3.5 minutes on two quiet cores."""

    model: str = "smollm2"
    methods: tuple[str, ...] = ("rtn", "gptq", "awq+gptq")
    bits: int = 4
    group: int = 64
    samples: int = 32
    length: int = 512
    windows: int = 4
    window_length: int = 1024
    calibration: str | None = None  # the embedded text
    text: str | None = None


def command(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for checkpoints, records and the report.")
    ] = Path("demo-out"),
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences of 512 tokens.")] = 32,
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows of 1024 tokens.")] = 4,
    json: o.Json = False,
) -> None:
    """SmolLM2-135M to four bits by RTN, GPTQ and AWQ+GPTQ; perplexity, size, time; a report with a picture; an export that
    transformers loads without dither. Uses only what is installed: the embedded model and CPython's own documentation as text.

    Example: dither demo
    """
    with compare_verb.progress("demo") as (say, follow):
        record, facts = demo(Work(samples=samples, windows=windows), out, say, follow)
    if json:
        o.emit(record.model_dump(mode="json") | facts)
        return
    compare_verb.show(record)
    print(f"picture     {out / 'plot.svg'}; report with all layers: {out / 'report.html'}")
    print(f"checkpoint  {facts['checkpoint']} (transformers loads it after 'import dither')")
    print(f"export      {facts['export']} (compressed-tensors); transformers loads it without dither and says:")
    print(f"            {PROMPT}{' '.join(['', *facts['foreign_text'].split()])}")


def demo(work: Work, out: Path, say: Say, follow: Follow) -> tuple[CompareRecord, dict[str, Any]]:
    """The comparison, its files in ``out``, and ``{"checkpoint", "export", "prompt", "foreign_text"}``. What is finished is not done again.

    Raises DitherError where a row failed, or where the export does not load.
    """
    from dither import report
    from dither.errors import DitherError
    from dither.quant import compare

    arms = [compare.Arm(method, work.bits, work.group) for method in work.methods]
    setting = compare.Setting(
        work.model,
        work.calibration,
        work.samples,
        work.length,
        0,
        work.text,
        "none",
        work.windows,
        work.window_length,
    )
    text = o.evaluation_text(work.text, "none")
    record = report.CompareRecord.model_validate(
        compare.run(setting, arms, out, evaluation=text, keep=True, say=say, follow=follow)
    )
    compare_verb.write(record, out)
    failed = [row for row in record.rows if row.status == "failed"]
    if failed:
        raise DitherError(f"{failed[0].title}: {failed[0].reason}")
    best, exported = out / "checkpoints" / arms[-1].name, out / "compressed-tensors"
    answer = export_and_load(best, exported, say)
    return record, {"checkpoint": str(best), "export": str(exported), "prompt": PROMPT, "foreign_text": answer}


def export_and_load(checkpoint: Path, exported: Path, say: Say) -> str:
    """Export a checkpoint unless that was done, and what the export says to the prompt in a process that cannot import dither."""
    import dither
    from dither.quant.store import write_text

    told = exported.with_name(exported.name + ".says.json")  # written last: this export was loaded once
    if told.is_file():
        answer: str = js.loads(told.read_text(encoding="utf-8"))[PROMPT]
        return answer
    if exported.exists():
        shutil.rmtree(exported)
    dither.export(checkpoint, exported, to="compressed-tensors")
    say("export: loading it in transformers, without dither")
    answer = foreign_text(exported)
    write_text(told, js.dumps({PROMPT: answer}))
    return answer


def foreign_text(exported: Path) -> str:
    """The model's continuation of the prompt. Raises DitherError where transformers cannot load the folder."""
    from dither.errors import DitherError

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-c", FOREIGN, str(exported), PROMPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=FOREIGN_SECONDS)
    except subprocess.TimeoutExpired:
        raise DitherError(f"{exported}: transformers did not load the export within {FOREIGN_SECONDS} s") from None
    if done.returncode != 0 or not done.stdout.strip():
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DitherError(f"{exported}: transformers could not load the export ({why})")
    answer: str = js.loads(done.stdout.strip().splitlines()[-1])
    return answer
