"""Products of many rows with packed weights, beside torch's linear on decoded weights, against what the processor multiplies.

    python benchmarks/packed_gemm.py [--quick] [--threads 1,2] [--out FILE]        writes benchmarks/records/packed_gemm.json

Work: y = x W^T for x of 9 to 2048 rows of bfloat16 and float32, W on integer grids, float16 scales and zero points a group of 64: 2 T O I operations,
and bits / 8 bytes read a weight. Limit: the best of torch's own product of two squares, large enough for any library and small enough for the caches,
and of any product here, in the same run. Peers: torch's linear with the weight already decoded ("dense"), whose memory a few-bit layer does not
have, and decoding the weight, then linear ("decoding"), which is what a layer without this kernel does at each call. Times are minima over rounds in
which all take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dither import kernels
from dither.quant.machine import machine

RECORD = Path(__file__).parent / "records" / "packed_gemm.json"
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 11008))  # O, I
ROWS = (9, 16, 32, 64, 128, 512, 2048)
WIDTHS = (2, 3, 4, 8)
GROUP = 64
SIDE = 2048  # of the squares
TYPES = (torch.bfloat16, torch.float32)


def minima(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """Seconds of the fastest call of each; they take turns for ``rounds``, or until each has had a tenth of a second."""
    times = [float("inf")] * len(runs)
    for run in runs:
        run()
    began, done = time.perf_counter(), 0
    while done < rounds or (rounds > 1 and time.perf_counter() - began < 0.1 * len(runs)):
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run()
            times[i] = min(times[i], time.perf_counter() - started)
        done += 1
    return times


def square(dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of torch's product of two squares."""
    a = torch.randn(SIDE, SIDE).to(dtype)
    return 2 * SIDE**3 / minima(rounds, lambda: a @ a)[0]


def case(shape: tuple[int, int], bits: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    outputs, inputs = shape
    packed = kernels.pack_rows(torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8), bits)
    scale = (torch.rand(outputs, inputs // GROUP) + 0.5).half()
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8)
    matrix, x = kernels.PackedMatrix(packed, bits, scale, zero, GROUP, inputs), torch.randn(tokens, inputs).to(dtype)

    def decoded() -> Tensor:
        return kernels.dequantize_affine(packed, bits, scale, zero, GROUP, inputs, dtype)

    weight = decoded()
    ours, dense, decoding = minima(rounds, lambda: matrix(x), lambda: F.linear(x, weight), lambda: F.linear(x, decoded()))
    return {
        "outputs": outputs, "inputs": inputs, "bits": bits, "rows": tokens, "type": str(dtype).removeprefix("torch."),
        "operations": 2 * tokens * outputs * inputs, "bytes": packed.numel() + 3 * scale.numel(),
        "seconds": ours, "dense_seconds": dense, "decoding_seconds": decoding,
        "times_faster_than_dense": dense / ours, "times_faster_than_decoding": decoding / ours,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    speed, shape = row["operations"] / row["seconds"], f"[{row['outputs']}, {row['inputs']}] {row['bits']} bit"
    work = f"{row['threads']} {row['type']:<8} {shape:<21} {row['rows']:5} {row['operations'] / 1e9:8.2f} {row['bytes'] / 1e6:6.2f}"
    limit = f"{1e3 * row['seconds']:10.3f} {speed / 1e9:8.0f} {100 * row['share_of_peak']:5.0f} %"
    return f"{work} {limit} {row['times_faster_than_dense']:10.2f} {row['times_faster_than_decoding']:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of the small shapes: to see that it works")
    parser.add_argument("--threads", default="1,2", help="numbers of threads")
    parser.add_argument("--out", type=Path, default=RECORD)
    given = parser.parse_args()
    rounds, shapes, widths = (1, SHAPES[:1], (4,)) if given.quick else (5, SHAPES, WIDTHS)
    print(f"kernels: {kernels.backend()}; caches {', '.join(str(kernels.cache_bytes(level) >> 10) + ' KiB' for level in (1, 2, 3))}")
    print(f"threads, type, {'weight':<21} rows     GFLOP     MB         ms    GFLOP/s  of peak  than dense, than decoding: times faster")
    rows = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in TYPES:
            found = []
            peak = square(dtype, 10 * rounds)
            for shape in shapes:
                for bits in widths:
                    for tokens in ROWS:
                        row = case(shape, bits, tokens, dtype, rounds) | {"threads": threads}
                        found.append(row)
                        peak = max(peak, row["operations"] / min(row["seconds"], row["dense_seconds"]))
            for row in found:
                row |= {"peak": peak, "share_of_peak": row["operations"] / row["seconds"] / peak}
                print(line(row), flush=True)
            rows += found
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(machine() | {"group": GROUP, "rows": rows}, indent=1) + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
