"""``dither demo``: the main job, on the embedded model: four bits three ways, judged, exported, and loaded by somebody else's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dither.cli import options as o

# Runs without dither: transformers and compressed-tensors load the export and go on from a prompt.
FOREIGN = """
import sys
sys.modules["dither"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
folder, prompt = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="float32")
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))
"""
PROMPT = "The capital of France is"


def command(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for checkpoints, records and the report.")] = Path("demo-out"),
    samples: o.Samples = 32,
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows of 1024 tokens.")] = 4,
    json: o.Json = False,
) -> None:
    """SmolLM2-135M to four bits by RTN, GPTQ and AWQ+GPTQ; perplexity, size, time; a report with a picture; an export that
    transformers loads without dither. Uses only what is installed: the embedded model and CPython's own documentation as text.

    Example: dither demo
    """
    import dither
    from dither import report
    from dither.quant import compare

    arms = [compare.Arm(m, 4, 64) for m in ("rtn", "gptq", "awq+gptq")]
    setting = compare.Setting("smollm2", None, samples, 512, 0, None, "none", windows, 1024)
    data = compare.run(setting, arms, out, evaluation=o.evaluation_text(None, "none"), keep=True, tell=o.say)
    record = report.CompareRecord.model_validate(data)
    report.to_json(record, out / "compare.json")
    report.to_csv(record, out / "table.csv")
    report.html(record, out / "report.html")
    report.plot_svg(record, out / "plot.svg")
    best = out / "checkpoints" / arms[-1].name
    exported = out / "compressed-tensors"
    if not (exported / "config.json").is_file():
        dither.export(best, exported, to="compressed-tensors")
    o.say("loading the export in transformers, without dither")
    text = subprocess.run([sys.executable, "-c", FOREIGN, str(exported), PROMPT], capture_output=True, text=True)
    answer = text.stdout.strip().splitlines()[-1] if text.returncode == 0 and text.stdout.strip() else ""
    if json:
        o.emit({**data, "checkpoint": str(best), "export": str(exported), "foreign_text": answer})
    else:
        from rich.console import Console

        Console().print(report.terminal_table(record))
        print(f"checkpoint  {best}  (AutoModelForCausalLM.from_pretrained after import dither)")
        print(f"export      {exported}  (compressed-tensors; transformers says: {answer!r})")
        print(f"report      {out / 'report.html'}")
    if not answer:
        from dither.errors import DitherError

        raise DitherError(f"{exported}: transformers could not load the export ({text.stderr.strip().splitlines()[-1:]})")
