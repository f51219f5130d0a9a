"""Exports a checkpoint to formats that other programs load: one file a format, what all share in `target`. See `export`."""

from __future__ import annotations

from pathlib import Path

from dither.errors import ExportError, UsageError
from dither.formats import Scheme
from dither.models import embedded, gguf_layout
from dither.quant.checkpoint import is_checkpoint
from dither.quant.export import awq_layout, compressed_tensors, gguf, gptq_layout, onnx
from dither.quant.export.nearest import Loss, reencode, told
from dither.quant.export.target import Opened, Target
from dither.quant.outcome import Quantized
from dither.quant.store import PARTIAL, explained

_ALL = (compressed_tensors.TARGET, gguf.TARGET, gptq_layout.TARGET, awq_layout.TARGET, onnx.TARGET)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def export(
    checkpoint: str | Path | Quantized,
    out: str | Path,
    to: str = "compressed-tensors",
    *,
    nearest: bool = False,
    bits: int = 8,
    tokenizer: str | Path | None = None,
) -> list[str]:
    """Write ``checkpoint`` (a folder that dither made) to folder ``out`` in format ``to``. Returns notes for the user.

    Weights keep their values to the last bit (each format's file says where a loader of it then rounds). With ``nearest`` those that the
    format cannot hold are re-encoded on the nearest grid of ``bits`` bits (4 or 8) that it can, and a note says what that lost.
    ``tokenizer``: for gguf, a GGUF file (or ``smollm2``) whose tokenizer is written in place of the checkpoint's.

    Raises UsageError (unknown format, not our checkpoint, ``out`` in use), ExportError that lists what does not fit, says which formats
    can hold it and what the nearest re-encoding would lose, CheckpointError (damaged files).
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: is unknown; the formats are {', '.join(TARGETS)}")
    if bits not in (4, 8):
        raise UsageError(f"--bits {bits}: weights are re-encoded in 4 or 8 bits")
    if isinstance(checkpoint, Quantized):
        if checkpoint.out is None:
            raise UsageError("the model was quantized in memory; give quantize(..., out=FOLDER) to export it")
        checkpoint = checkpoint.out
    source, folder = Path(checkpoint), Path(out)
    if not is_checkpoint(source) or not (source / "config.json").is_file() or (source / PARTIAL).exists():
        raise UsageError(f"{source}: is no finished checkpoint of dither; make one with 'dither quantize'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: is not an empty folder; choose another")
    opened, target = Opened.read(source, _gguf_file(tokenizer, to)), TARGETS[to]
    notes = _fit(opened, target, nearest, bits)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return notes + target.write(opened, folder)


def _gguf_file(tokenizer: str | Path | None, to: str) -> Path | None:
    if tokenizer is None:
        return None
    if to != gguf.TARGET.name:
        raise UsageError(f"--tokenizer {tokenizer}: only gguf files carry a tokenizer inside")
    path = embedded.embedded_file() if str(tokenizer) == embedded.ALIAS else Path(tokenizer)
    gguf_layout.read_layout(path)  # what passes is safe to read
    return path


def _fit(opened: Opened, target: Target, nearest: bool, bits: int) -> list[str]:
    """Make all weights of ``opened`` fit ``target``: they do, or are re-encoded if they may be. Raises ExportError."""
    if around := opened.at_run_time:
        raise ExportError(f"{target.name} cannot hold what this model does at run time: {', '.join(around)}")
    if why := target.unknown(opened):
        raise ExportError(f"{target.name}: {why}; {_others(opened)}")
    misfits = target.misfits(opened.weights)
    plan = target.nearest(opened.weights, bits) if nearest or misfits else {}
    if misfits and (not nearest or misfits.keys() - plan.keys()):
        lost = {name: why for name, why in misfits.items() if not nearest or name not in plan}
        raise ExportError(_refusal(opened, target, lost, plan if misfits.keys() <= plan.keys() else {}, bits))
    losses = []
    for weight in opened.weights:
        if weight.name in plan:
            opened.changed[weight.name], error = reencode(opened.as_stored(weight), plan[weight.name])
            losses.append(Loss(weight.name, plan[weight.name], error))
    return [f"re-encoded {told(losses)}"] if losses else []


def _others(opened: Opened) -> str:
    """Which formats can hold a checkpoint that one cannot, in words."""
    found = [name for name, target in TARGETS.items() if target.can_hold(opened)]
    listed = " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return f"{listed} can" if found else f"nor can {', '.join(TARGETS)} as it is"


def _refusal(opened: Opened, target: Target, misfits: dict[str, str], plan: dict[str, Scheme], bits: int) -> str:
    """One line: what does not fit, which formats can hold it, and what the nearest re-encoding of ``plan`` would lose."""
    first = [f"{name} ({why})" for name, why in misfits.items()][:3]
    text = (
        f"{target.name} cannot hold {len(misfits)} of {len(opened.weights)} weights exactly: {', '.join(first)}"
        f"{' ...' if len(misfits) > 3 else ''}; it holds {target.holds}; {_others(opened)}"
    )
    if plan:
        losses = [Loss(w.name, plan[w.name], reencode(opened.as_stored(w), plan[w.name])[1]) for w in opened.weights if w.name in plan]
        text += f"; --nearest would write {told(losses)}"
    return text
