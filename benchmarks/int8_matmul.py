"""Products of integers, weights of 4 and 8 bits times inputs of 8, beside torch in bfloat16 and torch's own int8, against what the machine allows.

    python benchmarks/int8_matmul.py [--threads 2] [--quick] [--out benchmarks/records/int8_matmul.json]

Work: y = x W^T for x of 1 row (a step of generation) and of 512 (a prompt), bfloat16 as a layer gets it, so that rounding x is part of the time.
Weights of 4 bits have a scale and a zero point for every 64 inputs, those of 8 bits one a row; inputs have zero points or none. Peers: torch's linear
in bfloat16; torch._int_mm, which gets x rounded already, knows no scales and leaves its sums as they are; and oneDNN's dynamically quantized linear,
which rounds x (float32) by one scale a tensor. Limits, measured first: bytes a second, of a tensor that no cache holds, and int8 operations a second,
each the best of what torch and this library reach. Weights that stay in a cache are read faster, so a share can pass 100 %. Times are medians of
rounds in which all alternate, each the mean of enough calls. More threads than free cores wait for each other: such times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dither import kernels
from dither.kernels import Int8Matrix, TokenGrid
from dither.quant.machine import machine

SHAPES = ((4096, 11008), (1536, 576), (576, 1536))
GROUPS = {4: 64, 8: None}  # None: one scale a row
ROWS = (1, 512)


def seconds(run: Callable[[], object], budget: float) -> float:
    """Mean of a call, over about ``budget`` seconds."""
    count, started = 0, time.perf_counter()
    while (now := time.perf_counter()) - started < budget or not count:
        run()
        count += 1
    return (now - started) / count


def medians(runs: dict[str, Callable[[], object]], rounds: int, budget: float) -> dict[str, float]:
    """Of rounds in which the runs alternate."""
    for run in runs.values():
        run()
    found = [{name: seconds(run, budget) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in found) for name in runs}


def matrix(outputs: int, inputs: int, bits: int, sym: str | bool) -> tuple[Int8Matrix, int]:
    """Random weights, and the bytes that a product reads of them."""
    group = GROUPS[bits] or inputs
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scale = torch.rand(outputs, inputs // group).half()
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8)
    packed = kernels.pack_rows(codes, bits)
    return Int8Matrix(packed, bits, scale, zero, group, inputs, TokenGrid(8, sym)), packed.numel() + 3 * scale.numel()


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's dynamically quantized linear: int8 weights, one scale a row; inputs uint8, one scale a tensor, rounded in the call."""
    torch.backends.quantized.engine = "onednn" if "onednn" in torch.backends.quantized.supported_engines else "x86"
    scale = weight.abs().amax(1) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        prepacked = torch.ops.quantized.linear_prepack(held, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, prepacked, True)


def limits(rounds: int, budget: float) -> tuple[float, float]:
    """Bytes a second of a tensor beyond the caches, and int8 operations a second: the best of all rounds."""
    wide, narrow = torch.ones(64 << 20), torch.ones(8192, 16384, dtype=torch.bfloat16)
    whole, _ = matrix(16384, 16384, 8, "restricted")
    row, square, side = torch.ones(1, 16384, dtype=torch.bfloat16), torch.ones(2048, 2048, dtype=torch.int8), 2048
    held, _ = matrix(side, side, 8, "restricted")
    many = torch.randn(side, side)
    reads = {"sum": (wide.sum, 256 << 20), "linear": (lambda: F.linear(row, narrow), 256 << 20), "ours": (lambda: whole(row), 256 << 20)}
    works = (lambda: torch._int_mm(square, square), lambda: held(many))
    bandwidth = max(count / min(seconds(run, budget) for _ in range(rounds)) for run, count in reads.values())
    return bandwidth, max(2 * side**3 / min(seconds(run, budget) for _ in range(rounds)) for run in works)


def measure(outputs: int, inputs: int, tokens: int, rounds: int, budget: float) -> list[dict[str, Any]]:
    x, weight = torch.randn(tokens, inputs).bfloat16(), torch.randn(outputs, inputs)
    ours = {(bits, sym): matrix(outputs, inputs, bits, sym) for bits in GROUPS for sym in ("restricted", False)}
    q, turned, narrow, wide, quantized = x.clamp(-4, 4).mul(30).char(), weight.mul(30).char().t(), weight.bfloat16(), x.float(), onednn(weight)
    runs: dict[str, Callable[[], object]] = {f"{bits} {sym}": (lambda held=held: held(x)) for (bits, sym), (held, _) in ours.items()}
    runs |= {"bfloat16": lambda: F.linear(x, narrow), "int_mm": lambda: torch._int_mm(q, turned), "onednn": lambda: quantized(wide)}
    found = medians(runs, rounds, budget)
    peers = {f"torch_{name}_seconds": found[name] for name in ("bfloat16", "int_mm", "onednn")}
    return [
        {
            "outputs": outputs, "inputs": inputs, "rows": tokens, "bits": bits, "input_zero_points": sym is False,
            "bytes": read + 2 * tokens * (inputs + outputs), "operations": 2 * tokens * outputs * inputs, "seconds": found[f"{bits} {sym}"],
        } | peers
        for (bits, sym), (_, read) in ours.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="short rounds: times that only show that it works")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    rounds, budget = (3, 0.01) if asked.quick else (7, 0.1)
    bandwidth, speed = limits(rounds, budget)
    print(f"kernels: {kernels.backend()}, {torch.get_num_threads()} threads; reads {bandwidth / 1e9:.1f} GB/s, int8 {speed / 1e9:.0f} G operations/s")
    print(f"{'':<34} {'rows':>4} {'MB':>7} {'MOP':>7} {'ours':>11} {'of limit':>8} {'x bf16':>7} {'x int_mm':>8} {'x oneDNN':>8}")
    rows = []
    for outputs, inputs in SHAPES:
        for tokens in ROWS:
            for row in measure(outputs, inputs, tokens, rounds, budget):
                least = max(row["bytes"] / bandwidth, row["operations"] / speed)
                row |= {"share_of_limit": least / row["seconds"]}
                row |= {f"times_faster_than_{peer}": row[f"torch_{peer}_seconds"] / row["seconds"] for peer in ("bfloat16", "int_mm", "onednn")}
                rows.append(row)
                name = f"[{outputs}, {inputs}] {row['bits']} bit{', input zeros' if row['input_zero_points'] else ''}"
                faster = f"{row['times_faster_than_bfloat16']:7.2f} {row['times_faster_than_int_mm']:8.2f} {row['times_faster_than_onednn']:8.2f}"
                work = f"{tokens:4} {row['bytes'] / 1e6:7.2f} {row['operations'] / 1e6:7.0f}"
                print(f"{name:<34} {work} {row['seconds'] * 1e6:8.1f} us {100 * row['share_of_limit']:6.0f} % {faster}", flush=True)
    record = machine() | {"threads": torch.get_num_threads(), "group": GROUPS[4], "read_bandwidth": bandwidth, "int8_operations": speed, "rows": rows}
    if asked.out:
        asked.out.parent.mkdir(exist_ok=True)
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
        print(asked.out)


if __name__ == "__main__":
    main()
