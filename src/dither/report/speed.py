"""The figures of run time for docs/speed.md: tables, drawn from the records of benchmarks/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dither.report import numbers
from dither.report.softmax import where_measured

Record = Mapping[str, Any]
Columns = Mapping[str, Callable[[Record], str]]
LARGE = (4096, 11008)  # outputs and inputs of a layer that no cache holds


def decode(record: Record) -> str:
    """Whole runtimes beside each other (benchmarks/decode.py)."""
    columns: dict[str, Callable[[Record], str]] = {
        "runtime": lambda row: _named(row["name"]),
        "numbers": lambda row: row["dtype"] or numbers.NOTHING,
        "MB a token": lambda row: f"{row['bytes_a_token'] / 1e6:.1f}",
        "tokens a second": lambda row: f"{row['tokens_per_second']:.1f}",
        "of what memory allows": lambda row: f"{100 * row['share_of_bandwidth']:.0f} %",
        "times llama.cpp Q4_0": lambda row: _ratio(row.get("times_llama_cpp_q4_0", {}).get("tokens_per_second")),
    }
    for prompt in _prompts(record):
        columns[f"prompt of {prompt}, tokens a second"] = _prefill(prompt)
    lines = [
        f"Making {record['tokens']} tokens behind {record['prompt_tokens']}, one sequence, {_threads(record['threads'])}; "
        f"medians of {record['rounds']} rounds in which all take turns; memory is read at {record['read_bandwidth'] / 1e9:.1f} GB/s:\n",
        _table(columns, record["rows"]),
        *(f"\n{name} did not run: {why}" for name, why in record["did_not_run"].items()),
        f"\n{where_measured(record)}\n",
    ]
    return "\n".join(lines)


def summary(record: Record) -> str:
    """The same in short, for README.md."""
    columns: dict[str, Callable[[Record], str]] = {
        "runtime": lambda row: _named(row["name"]),
        "tokens a second": lambda row: f"{row['tokens_per_second']:.0f}",
        "times llama.cpp Q4_0": lambda row: _ratio(row.get("times_llama_cpp_q4_0", {}).get("tokens_per_second")),
    }
    for prompt in _prompts(record):
        columns[f"prompt of {prompt}, tokens a second"] = _prefill(prompt)
    return "\n".join([_table(columns, record["rows"]), f"\n{_threads(record['threads']).capitalize()}. {where_measured(record)}\n"])


def packed_matmul(record: Record) -> str:
    """One row of x, as in generation (benchmarks/packed_matmul.py)."""
    columns: Columns = {
        "layer": _layer,
        "bits": lambda row: str(row["bits"]),
        "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
        "time": lambda row: f"{1e6 * row['seconds']:.0f} us",
        "of what memory allows": lambda row: f"{100 * row['share_of_bandwidth']:.0f} %",
        "times faster than torch bfloat16": lambda row: _ratio(row["times_faster"]),
    }
    head = f"One row of x, groups of {record['group']}, {_threads(record['threads'])}; memory is read at {record['read_bandwidth'] / 1e9:.1f} GB/s:\n"
    rows = [row for row in record["rows"] if row["rows"] == 1 and (row["outputs"], row["inputs"]) == LARGE]
    return "\n".join([head, _table(columns, rows), f"\n{where_measured(record)}\n"])


def packed_gemm(record: Record) -> str:
    """Many rows of x, as in prompts (benchmarks/packed_gemm.py)."""
    columns: Columns = {
        "layer": _layer,
        "bits": lambda row: str(row["bits"]),
        "numbers": lambda row: str(row["type"]),
        "threads": lambda row: str(row["threads"]),
        "time": lambda row: f"{1e3 * row['seconds']:.1f} ms",
        "of the operations possible": lambda row: f"{100 * row['share_of_peak']:.0f} %",
        "times as fast as torch with float weights": lambda row: _ratio(row["times_faster_than_dense"]),
        "times as fast as decoding and torch": lambda row: _ratio(row["times_faster_than_decoding"]),
    }
    rows = [row for row in record["rows"] if row["rows"] == 512 and (row["outputs"], row["inputs"]) == LARGE]
    return "\n".join([f"512 rows of x, groups of {record['group']}:\n", _table(columns, rows), f"\n{where_measured(record)}\n"])


def int8_matmul(record: Record) -> str:
    """Integers on both sides (benchmarks/int8_matmul.py)."""
    columns: Columns = {
        "layer": _layer,
        "rows": lambda row: str(row["rows"]),
        "bits": lambda row: str(row["bits"]),
        "zero points of inputs": lambda row: "yes" if row["input_zero_points"] else "no",
        "time": lambda row: f"{1e6 * row['seconds']:,.0f} us",
        "of the limit": lambda row: f"{100 * row['share_of_limit']:.0f} %",
        "times torch bfloat16": lambda row: _ratio(row["times_faster_than_bfloat16"]),
        "times torch._int_mm": lambda row: _ratio(row["times_faster_than_int_mm"]),
        "times oneDNN, dynamic": lambda row: _ratio(row["times_faster_than_onednn"]),
    }
    head = (
        f"{_threads(record['threads']).capitalize()}; memory is read at {record['read_bandwidth'] / 1e9:.1f} GB/s, "
        f"{record['int8_operations'] / 1e9:,.0f} G operations on integers a second at best:\n"
    )
    return "\n".join([head, _table(columns, record["rows"]), f"\n{where_measured(record)}\n"])


def lookup_matmul(record: Record) -> str:
    """Weights that are no integer grid (benchmarks/lookup_matmul.py)."""
    columns: Columns = {
        "layer": _layer,
        "weights": lambda row: str(row["weights"]),
        "bits a weight": lambda row: f"{8 * row['bytes'] / (row['outputs'] * row['inputs']):.2f}",
        "time": lambda row: f"{1e6 * row['seconds']:,.0f} us",
        "of what memory allows": lambda row: f"{100 * row['share_of_bandwidth']:.0f} %",
        "times torch bfloat16": lambda row: _ratio(row["times_faster"]),
        "times decoding and torch": lambda row: _ratio(row["times_faster_than_decoding"]),
    }
    head = f"One row of x, {_threads(record['threads'])}; memory is read at {record['read_bandwidth'] / 1e9:.1f} GB/s:\n"
    return "\n".join([head, _table(columns, [row for row in record["rows"] if row["rows"] == 1]), f"\n{where_measured(record)}\n"])


def first_token(record: Record) -> str:
    """From the start of a process to its first character (benchmarks/first_token.py)."""
    own = record["seconds"]["dither run"]
    columns: Columns = {
        "process": lambda row: str(row["way"]),
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "times dither run": lambda row: _ratio(row["seconds"] / own),
    }
    rows = [{"way": way, "seconds": seconds} for way, seconds in record["seconds"].items()]
    return "\n".join([f"{record['model']}; medians of {record['rounds']} rounds:\n", _table(columns, rows), f"\n{where_measured(record)}\n"])


def load_memory(record: Record) -> str:
    """What loading takes beyond imports, against 1.15 times the bytes on disk and 150 MB (benchmarks/load_memory.py)."""
    columns: Columns = {
        "numbers": lambda row: str(row["dtype"]),
        "MB on disk": lambda row: f"{row['bytes_on_disk'] / 1e6:.1f}",
        "MB allowed": lambda row: f"{row['budget'] / 1e6:.1f}",
        "MB at most while loading": lambda row: f"{row['beyond_imports']['loaded'] / 1e6:.1f}",
        "of what is allowed": lambda row: f"{100 * row['times_budget']['loaded']:.0f} %",
        "MB after making text": lambda row: f"{row['beyond_imports']['made_text'] / 1e6:.1f}",
    }
    return "\n".join([f"{record['model']}:\n", _table(columns, record["rows"]), f"\n{where_measured(record)}\n"])


def serve(record: Record) -> str:
    """Streams of one server (benchmarks/serve.py)."""
    columns: Columns = {
        "streams": lambda row: str(row["streams"]),
        "tokens a second": lambda row: f"{row['tokens_per_second']:.1f}",
        "times one stream": lambda row: _ratio(row["times_one_stream"]),
        "times dither run": lambda row: _ratio(row["times_dither_run"]),
        "first token, median": lambda row: f"{1e3 * row['first_token_seconds']:.0f} ms",
        "first token, last": lambda row: f"{1e3 * row['worst_first_token_seconds']:.0f} ms",
    }
    head = f"{record['model']}; {record['tokens']} tokens behind {record['prompt_tokens']} in each stream, all at once:\n"
    return "\n".join([head, _table(columns, record["rows"]), f"\n{where_measured(record)}\n"])


def kv_memory(record: Record) -> str:
    """The cache of keys and values after a long text (benchmarks/kv_memory.py)."""
    few, wide = record["few"], record["float"]
    return (
        f"{record['model']}: keys and values of {few['tokens']:,} tokens take {wide['bytes']:,} bytes in {record['dtype']} and {few['bytes']:,} at "
        f"{record['kv_bits']} bits, {record['ratio']:.2f} times less.\n\n{where_measured(record)}\n"
    )


def quantize_peer(record: Record) -> str:
    """GPTQ by LLM-Compressor beside ours (benchmarks/quantize_peer.py)."""
    columns: Columns = {
        "program": lambda row: str(row["program"]),
        "time": lambda row: f"{row['seconds']:.0f} s",
        "processor time": lambda row: f"{row['cpu_seconds']:.0f} s",
        "peak memory": lambda row: f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    rows = [{"program": name} | record[name] for name in ("dither", "llm-compressor")]
    return "\n".join([_table(columns, rows), f"\n{where_measured(record)}\n"])


def _table(columns: Columns, rows: Iterable[Record]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows)])


def _prompts(record: Record) -> list[int]:
    """Lengths of the prompts that were read."""
    return sorted({int(key.split("_")[1]) for row in record["rows"] for key in row if key.startswith("prefill_")})


def _prefill(prompt: int) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        found = row.get(f"prefill_{prompt}_tokens_per_second")
        return numbers.NOTHING if found is None else f"{found:,.0f}"

    return cell


def _named(name: str) -> str:
    return f"**{name}**" if name.startswith("dither") else name


def _layer(row: Record) -> str:
    return f"{row['outputs']} x {row['inputs']}"


def _ratio(value: float | None) -> str:
    return numbers.NOTHING if value is None else f"{value:.2f}"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"
