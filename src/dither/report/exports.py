"""Perplexity of exports in the programs that load them, for docs/exports.md: drawn from the record of benchmarks/export_perplexity.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.report import numbers

Record = Mapping[str, Any]
HEAD = "| weights | format | bytes of the weights | program | perplexity | against dither | a token apart |\n|---|---|--:|---|--:|--:|--:|"


def export_tables(record: Record) -> str:
    """A row for each export and program, under dither's own of the checkpoint; then what did not run, and how it was measured."""
    rows, silent = [HEAD], []
    for name, checkpoint in record["checkpoints"].items():
        rows.append(f"| {name} | | | dither | {checkpoint['perplexity']:.4f} | | |")
        for export in checkpoint["exports"]:
            where = f"{export['format']}{' in ' + export['reader'] if 'reader' in export else ''}"
            if "not_run" in export:
                silent.append(f"- {name}, {where}: `{export['not_run'].replace('`', chr(39))}`")
            else:
                rows.append(f"| | {export['format']} | {numbers.size(export['bytes'])} | {export['reader']} | {_figures(export)} |")
        rows.append(_spread(checkpoint["rounded_inputs"], checkpoint["perplexity"]))
    return "\n".join([*rows, "", *(["Not run:", "", *silent, ""] if silent else []), _where(record), ""])


def _figures(export: Record) -> str:
    return f"{export['perplexity']:.4f} | {_relative(export['relative_difference'])} | {export['mean_nats_apart']:.1e}"


def _relative(value: float) -> str:
    """Percent, with as many digits as a difference of the last bits needs."""
    return f"{100 * value:+.2f} %" if abs(value) >= 1e-4 else f"{100 * value:+.0e} %"


def _spread(rounded: Record, own: float) -> str:
    """dither with inputs rounded as GGUF's own program does: the range of several runs, how far a token lies from dither's and
    between two of them."""
    found = sorted(rounded["perplexities"])
    relative = f"{_relative(found[0] / own - 1)} .. {_relative(found[-1] / own - 1)}"
    apart = f"{rounded['mean_nats_apart']:.1e}; {rounded['mean_nats_between_runs']:.1e} between runs"
    return f"| | | | dither, inputs rounded to 8 bits, {len(found)} runs | {found[0]:.4f} .. {found[-1]:.4f} | {relative} | {apart} |"


def _where(record: Record) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{record['model']}, {record['method']}, on the first {record['windows']} windows of {record['length']} tokens of {record['text']}; "
        f"the float model: {record['float_perplexity']:.4f}. A token apart: the mean of abs(log p - log p'), in nats. "
        f"Measured on {machine['cpu']} ({versions}), {record['date'][:10]}."
    )
