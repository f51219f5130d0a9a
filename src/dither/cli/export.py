"""``dither export``: a checkpoint for other people's runtimes."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli import options as o


def command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that dither made.", show_default=False)],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="The format. compressed-tensors: transformers, vLLM. gguf: llama.cpp, transformers; one file model.gguf with config and tokenizer. "
            "gptq, awq: the layouts of those papers' programs, for runtimes that know no other; integers of one scheme. "
            "onnx: onnxruntime; one file model.onnx (needs onnx and onnxscript)."
        ),
    ] = "compressed-tensors",
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Re-encode weights that the format cannot hold on the nearest grid that it can, and say what that lost.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Bits of re-encoded weights: 4 or 8.")] = 8,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="gguf: a GGUF file, or smollm2, whose tokenizer is written in place of the checkpoint's.", show_default=False),
    ] = None,
    json: o.Json = False,
) -> None:
    """Export a checkpoint. Refuses, by layer name, what the format cannot hold exactly, and names the formats that can.

    Example: dither export smollm2-w4 --to gguf --tokenizer smollm2 -o smollm2-w4-gguf
    """
    import dither

    notes = dither.export(checkpoint, out, to=to, nearest=nearest, bits=bits, tokenizer=tokenizer)
    if json:
        o.emit({"out": out, "format": to, "notes": notes})
        return
    print(f"{out}: {to}")
    for note in notes:
        print(f"note: {note}")
