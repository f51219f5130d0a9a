"""Options that several verbs share, and how results are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dither.quant import Event

Model = Annotated[
    str, typer.Argument(help="A hub id, a folder, a GGUF file, or 'smollm2' (the embedded model).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text file, folder of text, or hub data set to calibrate on.", show_default="the embedded text"),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Group = Annotated[
    str,
    typer.Option(
        help="Weights along the input that share a scale; 'row' for one scale a row. A ragged last group is fine."
    ),
]
Text = Annotated[str | None, typer.Option(help="Text file to judge on.", show_default="the embedded text")]
Windows = Annotated[int | None, typer.Option(min=1, help="Windows of the text to read.", show_default="all")]
WindowLength = Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")]
Join = Annotated[
    str,
    typer.Option(
        help="'none': the file is one string. 'wikitext': rows joined by blank lines, as papers do with the raw files."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method ('dither methods' lists them); may repeat."),
]


def group_size(text: str) -> int | None:
    """``"64"`` -> 64, ``"row"`` or ``"-1"`` -> None. Raises UsageError."""
    from dither.errors import UsageError

    if text in ("row", "-1", "channel"):
        return None
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UsageError(f"--group {text}: must be a positive number or 'row'")
    return value


def bits_of(value: int, option: str = "--bits") -> int:
    from dither.errors import UsageError

    if not 1 <= value <= 8:
        raise UsageError(f"{option} {value}: must be 1 to 8")
    return value


def knob_values(items: list[str] | None) -> dict[str, Any]:
    """``["damp=0.05"]`` -> ``{"damp": 0.05}``; values are read as JSON where they are, else as text."""
    from dither.errors import UsageError

    found: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item}: must be KNOB=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def evaluation_text(text: str | None, join: str) -> str:
    """The text to judge on, joined as asked."""
    from dither import models
    from dither.errors import UsageError

    if join not in ("none", "wikitext"):
        raise UsageError(f"--join {join}: must be 'none' or 'wikitext'")
    content = models.embedded_text("evaluation") if text is None else models.read_text(Path(text))
    return models.wikitext_join(content) if join == "wikitext" else content


def emit(record: dict[str, Any]) -> None:
    """The machine's answer: one line of strict JSON, the last of standard output."""
    from dither.quant.strict import dumps

    print(dumps(record), flush=True)


def say(text: str) -> None:
    """A line for people, kept off standard output so that ``--json`` stays clean."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def block_progress(label: str) -> Iterator[Callable[[Event], None]]:
    """A bar on a terminal (block, error, bits, memory, time left), plain lines elsewhere."""
    if not sys.stderr.isatty():

        def line(event: Event) -> None:
            if not event.blocks:  # a stage that works on the whole model
                say(f"{label}: {event.what}")
            if event.error is not None:
                bits = f", {event.bits:.2f} bits" if event.bits else ""
                say(
                    f"{label}: {event.what} [{event.done}/{event.blocks}] error {event.error:.2e}{bits}, {event.memory / 1e6:.0f} MB"
                )

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, facts="")

        def update(event: Event) -> None:
            facts = f"{event.memory / 1e6:.0f} MB"
            if event.error is not None:
                facts = f"error {event.error:.1e}, " + facts
            what = f"{label}: {event.what}" if event.error is None else label
            bar.update(task, total=event.blocks or None, completed=event.done, facts=facts, description=what)

        yield update


@contextmanager
def window_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress over evaluation windows."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, total=total, completed=done)
