"""``dither export``: a checkpoint for other people's runtimes."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli import options as o


def command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that dither made.", show_default=False)],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="The format: compressed-tensors.")] = "compressed-tensors",
    json: o.Json = False,
) -> None:
    """Export a checkpoint. Refuses, by layer name, what the format cannot hold exactly.

    Example: dither export smollm2-w4 --to compressed-tensors -o smollm2-w4-ct
    """
    import dither

    notes = dither.export(checkpoint, out, to=to)
    if json:
        o.emit({"out": out, "format": to, "notes": notes})
        return
    print(f"{out}: {to}")
    for note in notes:
        print(f"note: {note}")
