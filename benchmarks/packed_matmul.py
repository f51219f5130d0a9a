"""Products of a few rows with packed weights, beside torch's bfloat16 linear, against what memory allows.

    python benchmarks/packed_matmul.py [--threads 2]        writes benchmarks/records/packed_matmul.json

Work: y = x W^T for x of 1, 4 and 8 rows, W on integer grids, float16 scales and zero points a group of 64. Limits: bytes read (codes, scales, zero
points), operations, and the read bandwidth of this machine, which is the best of torch's sum and of a bfloat16 matrix-vector product over
a tensor larger than the caches. Times are medians of 5, each the mean of enough calls to last 50 ms; both sides alternate in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dither import kernels
from dither.quant.machine import machine

RECORD = Path(__file__).parent / "records" / "packed_matmul.json"
SHAPES = ((4096, 11008), (1536, 576), (576, 1536), (576, 576))
GROUP = 64


def seconds(run: Callable[[], object]) -> float:
    """Mean of a call, over about 50 ms."""
    run()
    count, started = 0, time.perf_counter()
    while (now := time.perf_counter()) - started < 0.05:
        run()
        count += 1
    return (now - started) / count


def medians(*runs: Callable[[], object]) -> list[float]:
    """Of 5 rounds, in which the runs alternate."""
    rounds = [[seconds(run) for run in runs] for _ in range(5)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def bandwidth() -> float:
    """Bytes a second that reading takes at best."""
    wide, narrow, x = torch.ones(64 << 20), torch.ones(8192, 16384, dtype=torch.bfloat16), torch.ones(1, 16384, dtype=torch.bfloat16)
    found = medians(lambda: wide.sum(), lambda: F.linear(x, narrow))
    return max(wide.numel() * 4 / found[0], narrow.numel() * 2 / found[1])


def problem(outputs: int, inputs: int, bits: int) -> tuple[kernels.PackedMatrix, int]:
    """A random matrix, and the bytes that a product reads of it."""
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scale = torch.rand(outputs, inputs // GROUP).half()
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8)
    packed = kernels.pack_rows(codes, bits)
    return kernels.PackedMatrix(packed, bits, scale, zero, GROUP, inputs), packed.numel() + 3 * scale.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    peak = bandwidth()
    print(f"kernels: {kernels.backend()}, {torch.get_num_threads()} threads; read bandwidth {peak / 1e9:.1f} GB/s")
    print(f"{'':<26} {'rows':>4} {'MB':>7} {'MFLOP':>7} {'ours':>10} {'torch bf16':>10} {'times faster':>12} {'of bandwidth':>12}")
    rows = []
    for outputs, inputs in SHAPES:
        dense = torch.randn(outputs, inputs).bfloat16()
        for bits in range(1, 9):
            matrix, read = problem(outputs, inputs, bits)
            for tokens in (1, 4, 8):
                x: Tensor = torch.randn(tokens, inputs).bfloat16()
                ours, peer = medians(lambda m=matrix, x=x: m(x), lambda x=x, dense=dense: F.linear(x, dense))  # type: ignore[misc]
                row = {
                    "outputs": outputs, "inputs": inputs, "bits": bits, "rows": tokens, "bytes": read, "operations": 2 * tokens * outputs * inputs,
                    "seconds": ours, "torch_bfloat16_seconds": peer, "times_faster": peer / ours, "share_of_bandwidth": read / ours / peak,
                }  # fmt: skip
                rows.append(row)
                limits = f"{tokens:4} {read / 1e6:7.2f} {2 * tokens * outputs * inputs / 1e6:7.0f}"
                times = f"{ours * 1e6:7.1f} us {peer * 1e6:7.1f} us {peer / ours:12.2f} {100 * read / ours / peak:10.0f} %"
                print(f"{f'[{outputs}, {inputs}] {bits} bit':<26} {limits} {times}", flush=True)
    record = machine() | {"threads": torch.get_num_threads(), "group": GROUP, "read_bandwidth": peak, "rows": rows}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(RECORD)


if __name__ == "__main__":
    main()
