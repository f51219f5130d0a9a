"""Walsh-Hadamard transforms in place, beside packages that do them, against what memory allows.

    python benchmarks/fwht.py [--threads 2] [--quick] [--out benchmarks/records/fwht.json]

Work: one vector of 2^10 to 2^26, float32 and float64; batches of rows, and rows of orders 12 2^k and 20 2^k, float32. Limits: bytes that the
passes read and write (one pass for a row of up to 256 KiB, one more for every ten doublings) over this machine's bandwidth of reading and writing,
which is that of torch's multiplication in place of a tensor larger than the caches; and n log2 n additions. Peers: fht-cpu (in place, one thread),
pyfwht (in place, float64), hadamard-transform (torch), torch.matmul with the matrix, for rows of up to 8192. A peer that is not installed is left
out. Times are medians of 5, each the mean of enough calls to last 50 ms; all sides alternate in one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither import kernels
from dither.quant.machine import machine
from dither.special import fwht_, hadamard

RECORD = Path(__file__).parent / "records" / "fwht.json"
BLOCK = 1 << 18  # bytes that one pass takes (csrc/fwht.hpp)
ROWS = ((1024, 1, 64), (256, 1, 4096), (256, 12, 1536), (64, 20, 5120))  # rows, order, length


def seconds(run: Callable[[], object]) -> float:
    """Mean of a call, over about 50 ms."""
    run()
    count, started = 0, time.perf_counter()
    while (now := time.perf_counter()) - started < 0.05:
        run()
        count += 1
    return (now - started) / count


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of 5 rounds, in which the runs alternate."""
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(5)]
    return {name: statistics.median(r[name] for r in rounds) for name in runs}


def bandwidth() -> float:
    """Bytes a second, read and written."""
    wide = torch.ones(64 << 20)
    return 2 * wide.numel() * 4 / medians({"mul": lambda: wide.mul_(1.0)})["mul"]


def optional(name: str) -> Any | None:
    """A package, or None with a line."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name}: is not installed, left out")
        return None


def passes(length: int, size: int) -> int:
    """Times that a row is read and written."""
    return 1 + math.ceil(max(0.0, math.log2(length * size / BLOCK)) / 10)


def peers(x: Tensor, order: int, packages: dict[str, Any | None]) -> dict[str, Callable[[], object]]:
    """What others do for the rows ``x [R, N]``; zeros stay zeros, so that calls in place can be repeated."""
    rows, length = x.shape
    found: dict[str, Callable[[], object]] = {}
    fht, py, torch_only = packages["fht_cpu"], packages["pyfwht"], packages["hadamard_transform"]
    if order == 1:
        array = x.numpy()
        if fht is not None:
            found["fht-cpu"] = lambda: fht.fht(array[0] if rows == 1 else array)
        if py is not None and x.dtype == torch.float64 and rows == 1:
            backend = py.Backend.OPENMP if py.has_openmp() else py.Backend.CPU
            found["pyfwht"] = lambda: py.transform(array[0], backend=backend)
        if torch_only is not None and length <= 1 << 20:
            found["hadamard-transform"] = lambda: torch_only.hadamard_transform(x)
    if length <= 8192:
        matrix = (hadamard(length) * math.sqrt(length)).to(x.dtype)
        found["torch matmul"] = lambda: x @ matrix
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="vectors of 2^10, 2^16 and 2^20 only")
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    packages = {name: optional(name) for name in ("fht_cpu", "pyfwht", "hadamard_transform")}
    peak = bandwidth()
    print(f"kernels: {kernels.backend()}, {given.threads} threads; bandwidth of reading and writing {peak / 1e9:.1f} GB/s")
    print(f"{'':<26} {'MB moved':>9} {'M add':>8} {'ours':>11} {'of bandwidth':>12}   times faster than")
    vectors = (10, 16, 20) if given.quick else (10, 12, 14, 16, 18, 20, 22, 24, 26)
    work = [(1, 1, 1 << n, dtype) for n in vectors for dtype in (torch.float32, torch.float64)]
    rows = []
    for count, order, length, dtype in [*work, *((r, d, n, torch.float32) for r, d, n in ROWS)]:
        x = torch.zeros(count, length, dtype=dtype)
        moved = 2 * passes(length, x.element_size()) * x.numel() * x.element_size()
        additions = count * length * (order * (order > 1) + round(math.log2(length / order)))
        times = medians({"ours": lambda x=x, order=order: fwht_(x, order=order)} | peers(x, order, packages))  # type: ignore[misc]
        ours = times.pop("ours")
        name = str(dtype).removeprefix("torch.")
        rows.append({
            "rows": count, "order": order, "length": length, "dtype": name, "bytes": moved, "additions": additions, "seconds": ours,
            "share_of_bandwidth": moved / ours / peak, "peers": {k: {"seconds": t, "times_faster": t / ours} for k, t in times.items()},
        })  # fmt: skip
        ratios = ", ".join(f"{k} {t / ours:.2f}" for k, t in times.items())
        limits = f"{moved / 1e6:9.2f} {additions / 1e6:8.2f} {ours * 1e6:8.1f} us {100 * moved / ours / peak:10.0f} %"
        print(f"{f'[{count}, {length}] {name}':<26} {limits}   {ratios}", flush=True)
    record = machine() | {"threads": given.threads, "bandwidth": peak, "rows": rows}
    given.out.parent.mkdir(exist_ok=True, parents=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
