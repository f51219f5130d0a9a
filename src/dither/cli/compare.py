"""``dither compare``: many methods and widths on one table and one plot."""

from __future__ import annotations

import json as js
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli import options as o

if TYPE_CHECKING:
    from dither.quant.arm import Follow
    from dither.quant.compare import Arm
    from dither.report import CompareRecord, InspectRecord

METHODS_HELP = """Methods, separated by commas; '+' joins methods into one. Knobs follow a method after colons, as in
gptq:clip=output:damp=0.05,awq+gptq:gqa=true ('dither methods' lists them); bits and group there stand in place of --bits and --group."""


def command(
    model: o.Model,
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "rtn,awq,gptq,awq+gptq",
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
    """Quantize a model in many ways, judge each, and write table.csv, compare.json, plot.svg and report.html. Stopped, it resumes.
    A way that fails is a row that says why.

    Example: dither compare smollm2 --methods rtn,gptq:clip=output,awq+gptq --bits 4,3 --windows 4 -o compare
    """
    from dither import report
    from dither.errors import DitherError
    from dither.quant import compare

    chosen = arms(methods, bits, group)
    setting = compare.Setting(model, calibration, samples, length, seed, text, join, windows, window_length)
    folder = Path(out)
    with progress(f"compare {model}") as (say, follow):
        data = compare.run(
            setting, chosen, folder, evaluation=o.evaluation_text(text, join), keep=keep, say=say, follow=follow
        )
    record = report.CompareRecord.model_validate(data)
    write(record, folder)
    if json:
        print(record.model_dump_json(), flush=True)
    else:
        show(record)
        print(f"{folder / 'report.html'}: the report; table.csv, compare.json and plot.svg beside it")
    if all(row.status == "failed" for row in record.rows):
        raise DitherError(f"every row failed; the first: {record.rows[0].reason}")


def write(record: CompareRecord, folder: Path) -> None:
    """The record, its table, its picture and its page, into ``folder``."""
    from dither import report

    report.to_json(record, folder / "compare.json")
    report.to_csv(record, folder / "table.csv")
    report.plot_svg(record, folder / "plot.svg")
    report.html(record, folder / "report.html")


def show(record: CompareRecord | InspectRecord) -> None:
    """The record's table on standard output; in a file or a pipe as wide as it needs to be, not the 80 columns that rich assumes there."""
    from rich.console import Console

    from dither import report

    table, console = report.terminal_table(record), Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, Console(width=1000).measure(table).maximum))
    console.print(table)


def arms(methods: str, bits: str, group: str) -> list[Arm]:
    """Every method at every width and group size, methods first; one that names a width or a group size of its own has only that. Raises
    UsageError for what cannot be read."""
    from dither.errors import UsageError
    from dither.quant import recipes
    from dither.quant.compare import Arm

    widths = [w.strip() for w in bits.split(",")]
    if not all(w.isdigit() for w in widths):
        raise UsageError(f"--bits {bits}: must be numbers separated by commas")
    found = []
    for name, knobs in (method(spec) for spec in split(methods, ",")):
        last = recipes.find(name.split("+")[-1].strip())  # its own, where it has no such knob
        own = dict(knobs)
        chosen = [str(own.pop("bits"))] if "bits" in own else widths
        groups = str(own.pop("group", group))
        if not all(w.isdigit() for w in chosen):
            raise UsageError(f"--methods: bits={chosen[0]} of {name} must be a number")
        bits_each = [o.bits_of(int(width)) for width in chosen] if recipes.has(name, "bits") else [last.bits]
        sizes = [o.group_size(size.strip()) for size in groups.split(",")] if recipes.has(name, "group") else [last.group]
        found += [Arm(name, width, size, tuple(own.items())) for width in bits_each for size in sizes]
    return found


def method(spec: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """``"gptq:clip=output:damp=0.05"`` -> ``("gptq", (("clip", "output"), ("damp", 0.05)))``."""
    from dither.errors import UsageError

    name, *items = (part.strip() for part in split(spec, ":"))
    knobs: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--methods {spec}: {item!r} must be KNOB=VALUE, as in gptq:damp=0.05")
        if key == "weights":
            raise UsageError(f"--methods {spec}: 'weights' is no knob of the command line; use bits, group and format")
        try:
            knobs[key] = js.loads(value)
        except ValueError:
            knobs[key] = value
    return name, tuple(knobs.items())


def split(text: str, at: str) -> list[str]:
    """``text`` cut at a character, but not inside of brackets: values may be JSON lists."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == at and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


@contextmanager
def progress(label: str) -> Iterator[tuple[Callable[[str], None], Follow]]:
    """What a comparison tells: a bar over the blocks of the row at work on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield o.say, lambda done, blocks: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def say(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.reset(task, description=line.partition(":")[0])

        yield say, lambda done, blocks: bar.update(task, total=blocks, completed=done)
