"""``dither quantize``: a model to few bits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dither.cli import options as o


def command(
    model: o.Model,
    out: Annotated[str, typer.Option("-o", "--out", help="Folder of the checkpoint.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="rtn, gptq, awq, or several joined by '+' ('dither methods' explains).")
    ] = "awq+gptq",
    bits: Annotated[int, typer.Option(help="Bits of a weight, 1 to 8.")] = 4,
    group: o.Group = "64",
    sym: Annotated[str, typer.Option(help="'none' (asymmetric), 'restricted', 'full' or 'extremum'.")] = "none",
    recipe: Annotated[
        str | None, typer.Option(help="A recipe file (YAML or JSON) instead of --method, --bits, --group.")
    ] = None,
    knobs: o.Set = None,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of layer names that stay float; may repeat.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS[:GROUP]", help="Another width for some layers, e.g. 'lm_head=8:64'; may repeat."
        ),
    ] = None,
    calibration: o.Calibration = None,
    samples: o.Samples = 64,
    length: o.Length = 512,
    seed: o.Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    json: o.Json = False,
) -> None:
    """Quantize a model into a checkpoint. Stopped at any moment, the same command goes on after the last finished block.

    Example: dither quantize smollm2 --method awq+gptq --bits 4 --group 64 -o smollm2-w4
    """
    from pathlib import Path

    import dither
    from dither.quant import recipes

    chosen = recipes.read(recipe) if recipe else recipes.build(method, _options(bits, group, sym, knobs, skip, layer))
    data = Path(calibration) if calibration and Path(calibration).exists() else calibration
    with o.block_progress(f"quantize {model}") as progress:
        result = dither.quantize(
            model, chosen, data, out, samples=samples, length=length, seed=seed, overwrite=overwrite, progress=progress
        )
    report = result.report
    notes = report.notes + [f"{row.name}: {row.fallback}" for row in report.layers if row.fallback]
    if report.resumed_blocks:
        notes.append(f"resumed: {report.resumed_blocks} blocks were already on disk")
    if json:
        o.emit(
            {
                "checkpoint": str(result.out),
                "method": chosen.recipe().name,
                "bits_per_weight": report.bits_per_weight,
                "seconds": report.seconds,
                "cpu_seconds": report.cpu_seconds,
                "peak_memory_bytes": report.peak_memory_bytes,
                "notes": notes,
            }
        )
        return
    kept = f"; float: {', '.join(report.kept_float[:6])}" + (" ..." if len(report.kept_float) > 6 else "")
    print(f"{result.out}: {len(report.layers)} layers at {report.bits_per_weight:.3f} bits a weight{kept}")
    print(
        f"{report.seconds:.1f} s, {report.cpu_seconds:.1f} CPU s, peak memory {report.peak_memory_bytes / 1e6:.0f} MB"
    )
    for note in notes:
        print(f"note: {note}")


def _options(
    bits: int, group: str, sym: str, knobs: list[str] | None, skip: list[str] | None, layer: list[str] | None
) -> dict[str, Any]:
    values: dict[str, Any] = {"bits": o.bits_of(bits), "group": o.group_size(group), **o.knob_values(knobs)}
    if sym != "none":
        values["sym"] = sym
    if skip:
        values["skip"] = tuple(skip)
    if layer:
        values["overrides"] = dict(_override(item) for item in layer)
    return values


def _override(item: str) -> tuple[str, Any]:
    from dither import formats
    from dither.errors import UsageError

    pattern, equals, width = item.partition("=")
    bits, _, size = width.partition(":")
    if not equals or not bits.isdigit():
        raise UsageError(f"--layer {item}: must be PATTERN=BITS or PATTERN=BITS:GROUP")
    count = o.group_size(size) if size else None
    return pattern, formats.Int(o.bits_of(int(bits))) @ (formats.channel() if count is None else formats.group(count))
