"""log I_v and log K_v on a CUDA device: agreement with this machine's CPU path, and throughput.

    python benchmarks/log_bessel_gpu.py [--points 1e6,1e7,1e8] [--out benchmarks/records/log_bessel_gpu.json]

Needs torch, numpy and dither's sources on PYTHONPATH; without CUDA it says so in one line and stops. Agreement is judged on 24,000 pairs that
cover all regions and their borders, |cuda - cpu| / max(1, |cpu|). Work: pairs (v, x) drawn uniformly from the paper's ranges, float64. "sorted"
gathers the pairs of each region (two waits for the device a region), "unsorted" evaluates every expression on every pair and selects. Limit: 24
bytes a pair read and written once. Times are medians of three runs after one that is not counted, by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.kernels import backend
from dither.kernels.bessel import REGIONS, log_bessel
from dither.kernels.bessel_reference import classify
from dither.special.bessel_tables import tables_on

RANGES = {"0-150": (0.0, 150.0), "150-1e4": (150.0, 1e4)}  # of v and x
CPU_POINTS = 1_000_000
UNSORTED_POINTS = 10_000_000  # at most: every expression of every pair keeps arrays alive
CHUNK = 1 << 24  # pairs a call: the arrays of a call stay below a gigabyte each


def grid(count: int) -> tuple[Tensor, Tensor]:
    """Pairs from every region and on both sides of every border, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, n: int) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    part = count // 6
    v = [uniform(0, 150, part), uniform(0, 20, part), uniform(150, 1e4, part), uniform(math.log(1e-8), math.log(1e6), part).exp()]
    x = [uniform(0, 150, part), uniform(0, 30, part), uniform(150, 1e4, part), uniform(math.log(1e-300), math.log(1e8), part).exp()]
    borders = torch.tensor([0.5, 0.7, 12.7, 30.0, 57.0, 164.0], dtype=torch.float64)
    edges = torch.tensor([1.0, 3.0, 8.0, 19.6931, 30.0, 35.9074, 84.4153, 274.2377, 1400.0], dtype=torch.float64)
    step = 1 + 1e-12 * uniform(-1, 1, part)
    v += [borders[torch.arange(part) % len(borders)] * step, uniform(math.log(1e-3), math.log(1e4), part).exp()]
    x += [uniform(math.log(1e-4), math.log(2e4), part).exp(), edges[torch.arange(part) % len(edges)] * step]
    return torch.cat(v), torch.cat(x)


def agreement(device: torch.device) -> dict[str, Any]:
    """The largest and median difference from the CPU, by function and region."""
    v, x = grid(24_000)
    regions = classify(v, x)
    found: dict[str, Any] = {"points": len(v)}
    for kind in ("I", "K"):
        here = log_bessel(kind, v, x, tables_on(v.device), ratio=True)
        there = log_bessel(kind, v.to(device), x.to(device), tables_on(device), ratio=True)
        plain = log_bessel(kind, v.to(device), x.to(device), tables_on(device), sort=False)
        assert here.ratio is not None and there.ratio is not None
        error = (there.value.cpu() - here.value).abs() / here.value.abs().clamp_min(1)
        ratio = ((there.ratio.cpu() - here.ratio) / here.ratio).abs()
        found[kind] = {
            "finite": bool(there.value.isfinite().all()), "maximum": error.max().item(), "median": error.median().item(),
            "ratio_maximum": ratio.max().item(), "sorted_and_unsorted_differ_by": (plain.value - there.value).abs().max().item(),
            "by_region": {REGIONS[code]: error[regions == code].max().item() for code in regions.unique().tolist()},
        }  # fmt: skip
    return found


def cuda_seconds(kind: str, v: Tensor, x: Tensor, sort: bool) -> float:
    tables, times = tables_on(v.device), []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for p, q in zip(v.split(CHUNK), x.split(CHUNK), strict=True):
            log_bessel(kind, p, q, tables, sort=sort)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def cpu_seconds(kind: str, v: Tensor, x: Tensor) -> float:
    tables, times = tables_on(v.device), []
    for _ in range(3):
        started = time.perf_counter()
        log_bessel(kind, v, x, tables)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def throughput(device: torch.device, counts: list[int]) -> list[dict[str, Any]]:
    rows = []
    generator = torch.Generator(device).manual_seed(0)
    for name, (low, high) in RANGES.items():
        for kind in ("I", "K"):
            v, x = (low + (high - low) * torch.rand(CPU_POINTS, dtype=torch.float64, device=device, generator=generator) for _ in range(2))
            cpu = cpu_seconds(kind, v.cpu(), x.cpu())
            for count in counts:
                v, x = (low + (high - low) * torch.rand(count, dtype=torch.float64, device=device, generator=generator) for _ in range(2))
                taken = cuda_seconds(kind, v, x, True)
                plain = cuda_seconds(kind, v, x, False) if count <= UNSORTED_POINTS else None
                rows.append(
                    {
                        "function": kind, "range": name, "points": count, "sorted_seconds": taken, "unsorted_seconds": plain,
                        "points_a_second": count / taken, "cpu_points_a_second": CPU_POINTS / cpu, "times_cpu": count / taken * cpu / CPU_POINTS,
                        "times_unsorted": None if plain is None else plain / taken, "bytes_a_second": 24 * count / taken,
                    }
                )  # fmt: skip
                row = rows[-1]
                against = "" if plain is None else f", {row['times_unsorted']:.2f} times unsorted"
                print(f"log {kind}  {name:8} {count:11,}  {count / taken / 1e6:9.1f} M/s, {row['times_cpu']:.2f} times the CPU{against}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="1e6,1e7,1e8", help="pairs a call, separated by commas")
    parser.add_argument("--out", type=Path, help="write the record here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("log_bessel_gpu: skipped, torch sees no CUDA device")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}; CPU path: {backend()}, {torch.get_num_threads()} threads; limit 24 bytes a pair")
    agreed = agreement(device)
    for kind in ("I", "K"):
        a = agreed[kind]
        print(f"log {kind}: {agreed['points']:,} pairs, all finite: {a['finite']}, from the CPU at most {a['maximum']:.1e}, median {a['median']:.1e}")
    record = {
        "device": torch.cuda.get_device_name(device), "cpu_path": backend(), "cpu_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "agreement": agreed, "rows": throughput(device, [int(float(n)) for n in given.points.split(",")]),
    }  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        print(given.out)


if __name__ == "__main__":
    main()
