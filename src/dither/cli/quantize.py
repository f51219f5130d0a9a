"""``dither quantize``: a model to few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli import options as o

if TYPE_CHECKING:
    from dither.quant import Chain, Method


def command(
    model: o.Model,
    out: Annotated[str, typer.Option("-o", "--out", help="Folder of the checkpoint.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="rtn, gptq, awq, or several joined by '+' ('dither methods' explains).")
    ] = "awq+gptq",
    bits: Annotated[
        int | None, typer.Option(help="Bits of a weight, 1 to 8.", show_default="the method's: 4 for most; or those of --format")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Weights along the input that share a scale; 'row' for one scale a row.",
            show_default="64; the row where a paper has it; that of --format",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Numbers that weights are stored as: int, fp4, fp8, mxfp4, nvfp4, or like e3m2.", show_default="int"),
    ] = None,
    act_bits: Annotated[
        int | None, typer.Option(help="Bits of the layers' inputs at run time.", show_default="the method's: float for most")
    ] = None,
    act_group: Annotated[
        int | None, typer.Option(min=1, help="Inputs that share a scale.", show_default="all of a token")
    ] = None,
    act_format: Annotated[
        str | None, typer.Option(help="Numbers that inputs are rounded to; the names of --format.", show_default="int")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Bits of keys and values, in the cache too.", show_default="float")
    ] = None,
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
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration sequences, or images.", show_default="64; 32 images")] = None,
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
    from dither.errors import UsageError
    from dither.quant import recipes

    run_time = {"act_bits": act_bits, "act_group": act_group, "act_format": act_format, "kv_bits": kv_bits}
    if recipe and (given := [k for k, v in (run_time | {"format": format}).items() if v is not None]):
        raise UsageError(f"--{given[0].replace('_', '-')}: goes into the recipe file, as {given[0]}")
    chosen = recipes.read(recipe) if recipe else recipes.build(method, _options(method, bits, group, format, sym, run_time, knobs, skip, layer))
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
            | _run_time(chosen)
        )
        return
    kept = f"; float: {', '.join(report.kept_float[:6])}" + (" ..." if len(report.kept_float) > 6 else "")
    print(f"{result.out}: {len(report.layers)} layers at {report.bits_per_weight:.3f} bits a weight{kept}")
    print(
        f"{report.seconds:.1f} s, {report.cpu_seconds:.1f} CPU s, peak memory {report.peak_memory_bytes / 1e6:.0f} MB"
    )
    for note in notes:
        print(f"note: {note}")


def _run_time(chosen: Method | Chain) -> dict[str, int]:
    """The bits of inputs, and of keys and values, where they are few."""
    from dither.quant import Chain

    plan, method = chosen.recipe(), chosen.methods[-1] if isinstance(chosen, Chain) else chosen
    inputs = method.act_bits if plan.inputs is None else plan.inputs.format.bits
    found = {"act_bits": inputs, "kv_bits": None if plan.kv is None else plan.kv.format.bits}
    return {knob: bits for knob, bits in found.items() if bits is not None}


def _options(
    method: str,
    bits: int | None,
    group: str | None,
    format: str | None,
    sym: str,
    run_time: dict[str, Any],
    knobs: list[str] | None,
    skip: list[str] | None,
    layer: list[str] | None,
) -> dict[str, Any]:
    """What the user gave, and --group 64 where neither the method nor a number format says otherwise. Bits are the method's own: 4 for most."""
    from dither.formats import named_scheme
    from dither.quant import recipes

    last = recipes.knobs(method.split("+")[-1].strip())  # some methods have no such knob
    chosen = o.knob_values(knobs)
    values: dict[str, Any] = {} if bits is None else {"bits": o.bits_of(bits)}
    if group is not None:
        values["group"] = o.group_size(group)
    elif "group" in last and named_scheme(str(chosen.get("format", format))) is None:
        values["group"] = None if last["group"][1] is None else 64  # None: one scale a row, by the paper
    if format is not None:
        values["format"] = format
    for knob, value in run_time.items():
        if value is not None:
            values[knob] = o.bits_of(value, f"--{knob.replace('_', '-')}") if knob.endswith("bits") else value
    values |= chosen
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
