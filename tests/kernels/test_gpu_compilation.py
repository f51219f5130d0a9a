"""The Triton kernels compile for NVIDIA's devices: that needs no GPU. Registers suffice and shared memory fits; what runs is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dither.kernels.gpu import packed_kernels, rounded_kernels

TYPES = dict(x="*bf16", packed="*u8", y="*bf16", parts="*fp32", q_scale="*fp32", q_total="*i32", total="*i32")
TYPES |= dict(limit="fp32", smallest="fp32", largest="fp32")
ALIGNED = {"x", "packed", "scale", "zero", "y", "q", "weight", "parts", "outputs", "columns", "groups", "stride", "size"}


def check(capability, kernel, warps=4, stages=3, types=None, **constants):
    names = kernel.arg_names
    known = TYPES | dict(scale="*fp16", zero="*u8") | (types or {})
    signature = {n: "constexpr" if n in constants else known.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in ALIGNED}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= (99 if capability == 89 else 163) * 1024, (kernel.__name__, made.metadata.shared)
    text = made.asm["ptx"]
    print(capability, kernel.__name__, "wgmma" if "wgmma.mma_async" in text else "mma" if "mma.sync" in text else "-")


import triton.language as tl

for capability in map(int, sys.argv[1:]):
    packed = dict(BITS=4, GROUP=128, HAS_ZERO=True)
    check(capability, packed_kernels.product_row, **packed, BLOCK_O=4, BLOCK_K=1024, SUB=32, STAGES=1)
    check(capability, packed_kernels.product_tile, **packed, BLOCK_O=64, BLOCK_T=16, BLOCK_K=128, INTERPRETED=False)
    check(capability, packed_kernels.decode_tile, **packed, BLOCK_O=16, BLOCK_K=256)
    check(capability, packed_kernels.add_parts, BLOCK=1024)
    tile = dict(HAS_ZERO=False, PER_ROW=True, FINISH=True, BLOCK_O=64, BLOCK_T=16, BLOCK_K=256)
    types = dict(scale="*fp32", q="*i8", weight="*u8")
    row = dict(STORED=tl.float16, BLOCK=1024)
    check(capability, rounded_kernels.round_row, types=types, WHOLE=True, **row)
    check(capability, rounded_kernels.rounded_tile, types=dict(q="*i8", weight="*u8"), WHOLE=True, **tile)
    if capability >= 89:
        check(capability, rounded_kernels.round_row, types=dict(scale="*fp32", q="*fp8e4nv"), WHOLE=False, **row)
        check(capability, rounded_kernels.rounded_tile, types=dict(q="*fp8e4nv", weight="*fp8e4nv"), WHOLE=False, **tile)
"""


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(89, marks=pytest.mark.slow)])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)  # Triton reads the source of what it compiles from files
    done = subprocess.run([sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    matrix = [line.split()[2] for line in done.stdout.splitlines() if "_tile" in line and "decode" not in line]
    assert matrix and set(matrix) == {"wgmma" if capability == 90 else "mma"}  # tensor cores, Hopper's own where there are such
