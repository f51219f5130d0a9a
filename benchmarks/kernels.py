"""Timings of the kernels against torch, on the shapes of SmolLM2-135M: ``make bench``, or ``python
benchmarks/kernels.py --threads 2``.

Each figure is the best of several runs. Torch's side is the reference of the kernel (`dither/kernels/*_reference.py`)
or, for Gram matrices, torch's own float32 matrix product of the whole batch, which computes both triangles; for attention it is torch's
scaled_dot_product_attention. Limits: a core with AVX512_BF16 does 64 products and sums a cycle, so causal attention of T tokens cannot end before its
T^2 (d + e) operations a head at that rate.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dither import kernels
from dither.kernels import AffineGrid


def best(run: Callable[[], object], seconds: float = 0.6) -> float:
    """Milliseconds of the fastest run within about ``seconds``."""
    fastest, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now > end:
            return fastest * 1e3


def on_reference(run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> None:
        os.environ["DITHER_KERNELS"] = "reference"
        try:
            run()
        finally:
            del os.environ["DITHER_KERNELS"]

    return timed


def line(what: str, kernel: float, torch_ms: float, rate: str = "") -> None:
    print(f"{what:<44} {kernel:9.2f} ms {torch_ms:9.2f} ms {kernel / torch_ms:8.3f}   {rate}", flush=True)


def gptq_problem(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, AffineGrid]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=g)
    x = torch.randn(2 * columns, columns, generator=g, dtype=torch.float64)
    h = x.T @ x / len(x)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h))).T.contiguous()
    cells = weight.view(rows, columns // 64, 64)
    low, high = cells.amin(2).clamp(max=0), cells.amax(2).clamp(min=0)
    scale = (high - low) / 15
    group = (torch.arange(columns) // 64)[torch.randperm(columns, generator=g)].contiguous()
    return weight.to(dtype), factor.to(dtype), group, AffineGrid(scale, torch.round(-low / scale), 15)


def bench_gptq() -> None:
    for rows, columns in ((576, 576), (1536, 576), (576, 1536)):
        for dtype in (torch.float32, torch.float64):
            problem = gptq_problem(rows, columns, dtype)
            run = partial(kernels.gptq_columns, *problem)
            ms = best(run)
            rate = f"{rows * columns**2 / 2 / ms / 1e6:.0f} G multiply-adds/s"
            line(f"gptq [{rows}, {columns}] {str(dtype)[6:]}", ms, best(on_reference(run)), rate)


def bench_gram() -> None:
    for columns in (576, 1536):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4096, columns).to(dtype)
            h = torch.zeros(columns, columns, dtype=torch.float64)
            ms = best(partial(kernels.gram_update, h, x))
            full = x.float()
            torch_ms = best(partial(torch.mm, full.T, full))
            rate = f"{4096 * columns**2 / ms / 1e6:.0f} GFLOP/s, both triangles counted"
            line(f"gram [4096, {columns}] {str(dtype)[6:]}", ms, torch_ms, rate)


def bench_attention() -> None:
    for batch, length in ((4, 512), (1, 2048)):
        q, k, v = (torch.randn(batch, length, heads, 64).bfloat16().transpose(1, 2) for heads in (9, 3, 3))
        ms = best(partial(kernels.causal_attention, q, k, v))
        peer = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        rate = f"{batch * 9 * length**2 * 2 * 64 / ms / 1e6:.0f} GFLOP/s of unmasked products"
        line(f"attention [{batch}, 9, {length}, 64] bfloat16", ms, best(peer), rate)


def bench_packing() -> None:
    rows, columns = 1536, 1536
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
        packed = kernels.pack_rows(codes, bits)
        for what, run in (
            ("pack", partial(kernels.pack_rows, codes, bits)),
            ("unpack", partial(kernels.unpack_rows, packed, bits, columns)),
        ):
            ms = best(run, 0.2)
            rate = f"{rows * columns / ms / 1e6:.1f} G codes/s"
            line(f"{what} [{rows}, {columns}] {bits} bit", ms, best(on_reference(run), 0.2), rate)
        scale, zero = torch.rand(rows, columns // 64), torch.ones(rows, columns // 64)
        for dtype in (torch.float32, torch.bfloat16):
            run = partial(kernels.dequantize_affine, packed, bits, scale, zero, 64, columns, dtype)
            ms = best(run, 0.2)
            rate = f"{rows * columns * (dtype.itemsize + bits / 8) / ms / 1e6:.1f} GB/s"
            name = f"dequantize [{rows}, {columns}] {bits} bit to {str(dtype)[6:]}"
            line(name, ms, best(on_reference(run), 0.2), rate)


def bench_round() -> None:
    for rows, columns in ((1536, 576), (576, 1536)):
        weight = torch.randn(rows, columns) * 0.02
        run = partial(kernels.round_affine, weight, 4, 64)
        ms = best(run)
        rate = f"{rows * columns * 8 / ms / 1e6:.1f} GB/s, {rows * columns * 8 / 1e6:.1f} MB moved"
        line(f"round [{rows}, {columns}] 4 bit, groups of 64", ms, best(on_reference(run)), rate)


def bench_codebook() -> None:
    """Vectors of 4 and 256 centroids: an assignment of k-means, VPTQ's pass over all columns, and decoding."""
    book = torch.randn(256, 4)
    for rows, columns in ((1536, 576), (576, 1536)):
        weight, mix = torch.randn(rows, columns), torch.randn(columns, columns) * 0.01
        count = rows * columns // 4
        run = partial(kernels.nearest_centroids, weight.view(-1, 4), book)
        ms = best(run)
        line(f"nearest of 256, {count} vectors of 4", ms, best(on_reference(run)), f"{count * 1024 / ms / 1e6:.0f} G multiply-adds/s")
        run = partial(kernels.sweep_columns, weight, mix, book)
        ms = best(run)
        line(f"sweep [{rows}, {columns}]", ms, best(on_reference(run)), f"{rows * columns * (columns / 2 + 256) / ms / 1e6:.0f} G multiply-adds/s")
        packed = kernels.pack_wide(run()[0], 8)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(rows, columns, dtype=dtype)
            decode = partial(kernels.decode_codebook, packed, 8, book[None], rows=rows, count=columns, out=out)
            ms = best(decode, 0.2)
            rate = f"{rows * columns * (dtype.itemsize + 0.25) / ms / 1e6:.1f} GB/s"
            line(f"decode codebook [{rows}, {columns}] to {str(dtype)[6:]}", ms, best(on_reference(decode), 0.2), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"kernels: {kernels.backend()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<44} {'kernel':>12} {'torch':>12} {'ratio':>8}")
    bench_gptq()
    bench_gram()
    bench_attention()
    bench_packing()
    bench_round()
    bench_codebook()


if __name__ == "__main__":
    main()
