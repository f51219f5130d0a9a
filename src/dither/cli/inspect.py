"""``dither inspect``: what a model is made of, and where few bits will hurt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli import options as o
from dither.cli.compare import show

if TYPE_CHECKING:
    from dither.quant import Event


def command(
    model: o.Model,
    group: o.Group = "64",
    calibration: o.Calibration = None,
    samples: o.Samples = 8,
    length: o.Length = 512,
    seed: o.Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.", show_default=False)] = None,
    json: o.Json = False,
) -> None:
    """Layers, proved sites, outliers (max over median of the input channels, kurtosis), and each layer's error at 4, 3 and 2 bits.

    Example: dither inspect smollm2 --html smollm2.html
    """
    from dither import report
    from dither.quant.inspect import inspect

    data = Path(calibration) if calibration and Path(calibration).exists() else calibration
    size = o.group_size(group)
    with _progress(model) as progress:
        facts = inspect(model, data, group=size, samples=samples, length=length, seed=seed, progress=progress)
    record = report.InspectRecord.model_validate(facts)
    if html is not None:
        report.inspect_html(record, html)
    if json:
        print(record.model_dump_json(), flush=True)
        return
    show(record)
    if html is not None:
        print(f"{html}: the page")


@contextmanager
def _progress(model: str) -> Iterator[Callable[[Event], None]]:
    """The engine's progress without its errors and bits: those are of codes that nobody keeps."""
    label = f"inspect {model}"
    if not sys.stderr.isatty():
        yield lambda event: o.say(f"{label}: {event.what} [{event.done}/{event.blocks}]")
        return
    with o.block_progress(label) as show:
        yield lambda event: show(replace(event, error=None, bits=None))
