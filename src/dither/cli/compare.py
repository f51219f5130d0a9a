"""``dither compare``: many methods and widths on one table and one plot."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli import options as o


def command(
    model: o.Model,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; '+' joins methods into one.")
    ] = "rtn,awq,gptq,awq+gptq",
    bits: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "4,3,2",
    group: Annotated[str, typer.Option(help="Group sizes, separated by commas; 'row' for one scale a row.")] = "64",
    out: Annotated[str, typer.Option("-o", "--out", help="Folder of the records and the report.")] = "dither-compare",
    calibration: o.Calibration = None,
    samples: o.Samples = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a calibration sequence.")] = 512,
    text: o.Text = None,
    windows: o.Windows = 4,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens an evaluation window.")] = 2048,
    join: o.Join = "none",
    seed: o.Seed = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints.")] = False,
    json: o.Json = False,
) -> None:
    """Quantize a model in many ways, judge each, and write table.csv, compare.json and report.html. Stopped, it resumes.

    Example: dither compare smollm2 --methods rtn,awq,gptq --bits 4,3 --windows 4 -o compare
    """
    from pathlib import Path

    from dither import report
    from dither.errors import UsageError
    from dither.quant import compare

    widths = [w.strip() for w in bits.split(",")]
    if not all(w.isdigit() for w in widths):
        raise UsageError(f"--bits {bits}: must be numbers separated by commas")
    arms = [
        compare.Arm(m.strip(), o.bits_of(int(w)), o.group_size(g.strip()))
        for m in methods.split(",")
        for w in widths
        for g in group.split(",")
    ]
    setting = compare.Setting(model, calibration, samples, length, seed, text, join, windows, window_length)
    folder = Path(out)
    data = compare.run(setting, arms, folder, evaluation=o.evaluation_text(text, join), keep=keep, tell=o.say)
    record = report.CompareRecord.model_validate(data)
    report.to_json(record, folder / "compare.json")
    report.to_csv(record, folder / "table.csv")
    report.html(record, folder / "report.html")
    if json:
        o.emit(data)
        return
    from rich.console import Console

    Console().print(report.terminal_table(record))
    print(f"{folder / 'report.html'}: the report; table.csv and compare.json beside it")
