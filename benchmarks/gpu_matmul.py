"""Products with few-bit weights on the GPU, beside cuBLAS in bfloat16, against what the device allows.

    python benchmarks/gpu_matmul.py [--quick] [--out benchmarks/records/gpu_matmul.json]

Work: y = x W^T for x of 1 to 2048 rows, bfloat16. Ours: weights of 4 and 8 bits with float16 scales and zero points a group of 128 (W4A16, W8A16);
int8 weights with inputs rounded to int8 row by row (W8A8); the same in float8 e4m3 (FP8). Times of the last two include the rounding of x. Peers:
cuBLAS in bfloat16; torch._int_mm and torch._scaled_mm, products of operands that are rounded already.

Limits: bytes (weights with scales and zero points, x, y, each once) over the best bandwidth of a copy and of a sum here; operations over the best
rate of a product of 8192^3 here, in the type that is multiplied. The larger of the two is the limit; nothing reaches a share of 1.

Times are medians of 9 replays of a CUDA graph of some 20 calls, so what the processor does for a call is outside (a table of its own, for one row,
has it). Up to 64 rows the calls go through copies of the weights that together exceed the L2 cache threefold. Errors are against float64 on the
same (rounded) operands, root mean square over that of y; more than 1 % ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels import pack_rows
from dither.kernels.gpu import tuning
from dither.kernels.gpu.fp8 import float8_matmul
from dither.kernels.gpu.packed_matmul import packed_matmul
from dither.kernels.gpu.presence import has_float8
from dither.kernels.gpu.rounded import round_rows
from dither.kernels.gpu.w8a8 import int8_matmul

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
TOKENS = (1, 4, 16, 64, 512, 2048)
GROUP = 128
FEW = 64  # rows up to which weights are read from memory, not from the cache
Run = Callable[[int], Tensor]  # the product with copy number i of the weights


def seconds(run: Run, copies: int) -> float:
    """Of one call, inside a graph."""
    calls = max(copies, 20 // copies * copies)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(min(copies, 2)):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % copies)
    graph.replay()
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def eager(run: Run, copies: int) -> float:
    """Of one call as Python makes it, many in a row."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(200):
        run(i % copies)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 200


def limits() -> dict[str, float]:
    """Bytes and operations a second, at best."""
    found = bandwidths()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    found["bfloat16_rate"] = 2 * n**3 / seconds(lambda i: a @ b.T, 1)
    a8, b8 = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    found["int8_rate"] = 2 * n**3 / seconds(lambda i: torch._int_mm(a8, b8.T), 1)
    if has_float8(torch.device("cuda", torch.cuda.current_device())):
        one, af, bf = torch.ones((), device="cuda"), a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        found["float8_rate"] = 2 * n**3 / seconds(lambda i: torch._scaled_mm(af, bf.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), 1)
    return found


def bandwidths() -> dict[str, float]:
    """Bytes a second, of 1 GiB read and written, and read."""
    wide, other = torch.ones(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    return {
        "copy_bandwidth": 2 * wide.nbytes / seconds(lambda i: other.copy_(wide), 1),
        "read_bandwidth": wide.nbytes / seconds(lambda i: wide.sum(), 1),
    }


def cublas(x: Tensor, outputs: int, copies: int) -> tuple[float, float | None]:
    """Seconds of torch's bfloat16 product, in a graph and, for one row, as Python calls it."""
    dense = [torch.randn(outputs, x.shape[1], device="cuda").bfloat16() for _ in range(copies)]

    def run(i: int) -> Tensor:
        return F.linear(x, dense[i])

    return seconds(run, copies), eager(run, copies) if x.shape[0] == 1 else None


class Weights:
    """Random few-bit weights, enough copies of them, and what they decode to."""

    def __init__(self, kind: str, outputs: int, inputs: int, copies: int) -> None:
        self.kind, self.shape, self.copies, self.bits = kind, (outputs, inputs), copies, 4 if kind == "W4A16" else 8
        grouped = kind in ("W4A16", "W8A16")
        groups = inputs // GROUP if grouped else 1
        if kind == "FP8":
            codes = torch.randn(outputs, inputs, device="cuda").mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            codes = torch.randint(0, 1 << self.bits, (outputs, inputs), dtype=torch.uint8, device="cuda")
        scale = (torch.rand(outputs, groups, device="cuda") * 0.02 + 0.01).half()
        points = torch.randint(0, 1 << self.bits, (outputs, groups), dtype=torch.uint8, device="cuda")
        packed = pack_rows(codes, self.bits)
        zero = pack_rows(points.view(1, -1), self.bits)[0, : -(-points.numel() * self.bits // 8)] if grouped else None
        self.codes, self.scale, self.points = codes, scale, points if grouped else None
        held = [(packed, scale, zero)]
        self.held = held + [tuple(None if t is None else t.clone() for t in held[0]) for _ in range(copies - 1)]
        self.bytes = sum(t.nbytes for t in held[0] if t is not None)

    def run(self, x: Tensor, i: int) -> Tensor:
        packed, scale, zero = self.held[i]
        if self.kind == "W8A8":
            return int8_matmul(x, packed, scale, None)
        if self.kind == "FP8":
            return float8_matmul(x, packed, scale)
        return packed_matmul(x, packed, scale, zero, self.bits, GROUP)

    def true(self, x: Tensor) -> Tensor:
        """The product in float64, from rounded inputs where this kind rounds them."""
        wide = x.double()
        if self.kind == "FP8":
            s = x.float().abs().amax(1, keepdim=True) / 448
            wide = (x.float() / s).to(torch.float8_e4m3fn).double() * s.double()
            return wide @ (self.codes.view(torch.float8_e4m3fn).double() * self.scale.double()).T
        if self.kind == "W8A8":
            s = x.float().abs().amax(1, keepdim=True) / 127
            wide = (x.float() / s).round().double() * s.double()
            return wide @ ((self.codes.double() - 128) * self.scale.double()).T
        assert self.points is not None
        blocks = self.codes.double().view(self.shape[0], -1, GROUP) - self.points.double()[:, :, None]
        return wide @ (blocks * self.scale.double()[:, :, None]).view(self.shape).T


def peer(kind: str, x: Tensor, weights: Weights) -> tuple[str, Run] | None:
    """torch's own product of operands of this kind, where it has one for this size."""
    if kind == "W8A8" and x.shape[0] > 16:
        q, _, _ = round_rows(x, 127.0, torch.int8, "float32")
        held = [(packed.view(torch.int8)[:, : x.shape[1]] ^ -128).contiguous() for packed, _, _ in weights.held]
        return "torch._int_mm", lambda i: torch._int_mm(q, held[i].T)
    if kind == "FP8":
        q, s, _ = round_rows(x, 448.0, torch.float8_e4m3fn, "float32")
        held = [(packed.view(torch.float8_e4m3fn), scale.float().T.contiguous()) for packed, scale, _ in weights.held]
        return "torch._scaled_mm", lambda i: torch._scaled_mm(q, held[i][0].T, s[:, None], held[i][1], out_dtype=torch.bfloat16)
    return None


def measure(kinds: list[str], shape: tuple[int, int], tokens: int, best: dict[str, float]) -> list[dict[str, Any]]:
    """One row a kind."""
    outputs, inputs = shape
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    x = torch.randn(tokens, inputs, device="cuda").bfloat16()
    operations = 2 * tokens * outputs * inputs
    bandwidth = max(best["copy_bandwidth"], best["read_bandwidth"])

    def copies(size: float) -> int:
        return max(2, -(-3 * cache // int(size))) if tokens <= FEW else 1

    dense, dense_eager = cublas(x, outputs, copies(2 * outputs * inputs))
    rows = []
    for kind in kinds:
        weights = Weights(kind, outputs, inputs, copies((0.5 if kind == "W4A16" else 1) * outputs * inputs))
        true = weights.true(x)
        error = float((weights.run(x, 0).double() - true).pow(2).mean().sqrt() / true.pow(2).mean().sqrt())
        ours = seconds(lambda i, w=weights: w.run(x, i), weights.copies)  # type: ignore[misc]
        rate = best[{"W8A8": "int8_rate", "FP8": "float8_rate"}.get(kind, "bfloat16_rate")]
        read = weights.bytes + 2 * tokens * (inputs + outputs)
        limit = max(read / bandwidth, operations / rate)
        row: dict[str, Any] = {
            "kind": kind, "outputs": outputs, "inputs": inputs, "rows": tokens, "bytes": read, "operations": operations, "error": error,
            "seconds": ours, "limit_seconds": limit, "share_of_limit": limit / ours, "cublas_bfloat16_seconds": dense, "times_faster": dense / ours,
        }  # fmt: skip
        if tokens == 1:
            row |= {"eager_seconds": eager(lambda i, w=weights: w.run(x, i), weights.copies), "cublas_bfloat16_eager_seconds": dense_eager}  # type: ignore[misc]
        try:
            if (other := peer(kind, x, weights)) is not None:
                row |= {"peer": other[0], "peer_seconds": seconds(other[1], weights.copies)}
                row["times_faster_than_peer"] = row["peer_seconds"] / ours
        except (RuntimeError, ValueError) as refused:  # sizes or devices that torch does not take
            row["peer_refused"] = str(refused).splitlines()[0]
        rows.append(row)
        against = f"{row['peer_seconds'] * 1e6:8.1f} us {row['times_faster_than_peer']:6.2f}" if "peer_seconds" in row else ""
        print(
            f"{f'[{outputs}, {inputs}]':<15} {tokens:5} {kind:<6} {read / 1e6:8.2f} {operations / 1e9:8.2f} {limit * 1e6:8.1f} {ours * 1e6:9.1f} us "
            f"{100 * limit / ours:5.0f} % {dense * 1e6:9.1f} us {dense / ours:6.2f} {error:9.1e}  {against}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, four numbers of rows")
    parser.add_argument("--out", type=Path, help="write the record here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_matmul: there is no CUDA device here", file=sys.stderr)
        return 2
    import triton

    started = time.perf_counter()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    print(f"{device.name}, {device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size / 1e6:.0f} MB; {versions}")
    best = limits()
    print(", ".join(f"{name.replace('_', ' ')} {value / 1e12:.2f} T{'B' if 'bandwidth' in name else 'OP'}/s" for name, value in best.items()))
    kinds = ["W4A16", "W8A16", "W8A8", *(["FP8"] if "float8_rate" in best else [])]
    head = f"{'shape':<15} {'rows':>5} {'kind':<6} {'MB':>8} {'GOP':>8} {'limit us':>8} {'ours':>12} {'limit':>7}"
    print(f"{head} {'cuBLAS bf16':>12} {'faster':>6} {'error':>9}  {'peer':>11} {'faster':>6}")
    rows = []
    for shape in SHAPES[:1] if given.quick else SHAPES:
        for tokens in (1, 16, 64, 2048) if given.quick else TOKENS:
            rows += measure(kinds, shape, tokens, best)
    print(f"{'shape':<15} {'kind':<6} {'eager':>10} {'cuBLAS bf16':>12}   one row, with what the processor does for a call")
    for row in rows:
        if row["rows"] == 1:
            times = f"{row['eager_seconds'] * 1e6:7.1f} us {row['cublas_bfloat16_eager_seconds'] * 1e6:9.1f} us"
            print(f"{[row['outputs'], row['inputs']]!s:<15} {row['kind']:<6} {times}")
    plans = {" ".join(map(str, key)): plan._asdict() for key, plan in tuning.chosen().items()}  # type: ignore[call-overload]
    about = {
        "machine": {"device": device.name, "multiprocessors": device.multi_processor_count, "l2_bytes": device.L2_cache_size, "versions": versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "group": GROUP, "limits": best,
    }  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(about | {"rows": rows, "plans": plans}, indent=1) + "\n")
        print(given.out)
    worst = max(rows, key=lambda row: row["error"])
    print(f"largest error {worst['error']:.1e} ({worst['kind']}, {worst['rows']} rows); {time.perf_counter() - started:.0f} s")
    return int(not worst["error"] < 0.01)


if __name__ == "__main__":
    sys.exit(main())
