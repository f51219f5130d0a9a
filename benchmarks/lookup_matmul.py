"""Products of a few rows with weights that are no integer grids, as they are stored, beside torch's bfloat16 linear and beside decoding first.

    python benchmarks/lookup_matmul.py [--threads 2] [--out benchmarks/records/lookup_matmul.json]
    python benchmarks/lookup_matmul.py --quick        one shape, fewer rounds

Work: y = x W^T for bfloat16 x of 1, 2, 4 and 8 rows. W: e2m1 in groups of 32 (float16 scales, and MXFP4), NVFP4, e4m3 in groups of 128 and with a
scale a row, a float of 6 bits; codebooks of 256 vectors of 4 (2 bits a weight), with a second book of 16 (3 bits) and of 256 (4 bits), 4096 and 256
vectors of 8; partly binary with 10 % and 30 % salient weights of 8 bits. Limits: bytes read, multiply-adds, look-ups (of a value, an entry, or the
place of a salient code) and the read bandwidth of this machine, which is the best of torch's sum and of a bfloat16 matrix-vector product over a
tensor larger than the caches. Times are medians of 5 rounds in which both sides alternate; decoding a weight to bfloat16 is timed once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from dither import kernels
from dither.formats import MXFP4, NVFP4, Codebook, Float, PartialBinary, QTensor, Scheme, WeightScheme, channel, group
from dither.quant.cpu_products import cpu_kind
from dither.quant.machine import machine

SHAPES = ((4096, 11008), (1536, 576))
SCHEMES: dict[str, WeightScheme] = {
    "e2m1 g32": Float(2, 1) @ group(32),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "e4m3 g128": Float(4, 3) @ group(128),
    "e4m3 row": Float(4, 3) @ channel(),
    "e3m2 g64": Float(3, 2) @ group(64),
    "256 x 4": Codebook(4, 256),
    "256 x 4 + 16": Codebook(4, 256, 16),
    "256 x 4 + 256": Codebook(4, 256, 256),
    "4096 x 8": Codebook(8, 4096),
    "256 x 8": Codebook(8, 256),
    "binary + 10 %": PartialBinary(0.1),
    "binary + 30 %": PartialBinary(0.3),
}


def seconds(run: Callable[[], object], least: float) -> float:
    """Mean of a call, over ``least`` seconds."""
    run()
    count, started = 0, time.perf_counter()
    while (now := time.perf_counter()) - started < least:
        run()
        count += 1
    return (now - started) / count


def medians(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """Of rounds in which the runs alternate."""
    found = [[seconds(run, 0.03) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def bandwidth(rounds: int) -> float:
    """Bytes a second that reading takes at best."""
    wide, narrow, x = torch.ones(64 << 20), torch.ones(8192, 16384, dtype=torch.bfloat16), torch.ones(1, 16384, dtype=torch.bfloat16)
    found = medians(rounds, lambda: wide.sum(), lambda: F.linear(x, narrow))
    return max(wide.numel() * 4 / found[0], narrow.numel() * 2 / found[1])


def random(scheme: WeightScheme, outputs: int, inputs: int) -> QTensor:
    """A matrix of random contents in that storage."""
    if isinstance(scheme, PartialBinary):
        binary = scheme.choose(torch.rand(outputs, inputs))
        codes = torch.where(binary, torch.randint(0, 2, binary.shape), torch.randint(0, 1 << scheme.high_bits, binary.shape)).to(torch.uint8)
        groups = inputs // scheme.width(inputs)
        alpha, mu = torch.rand(outputs, groups) + 0.5, torch.randn(outputs, groups) / 10
        return scheme.pack(binary, codes, alpha, mu, torch.rand(outputs) / 50, torch.randint(0, 1 << scheme.high_bits, (outputs,)))
    layout = scheme.layout(outputs, inputs)
    made = {k: torch.randint(0, 256, s, dtype=d) if d == torch.uint8 else (torch.rand(s) + 0.5).to(d) for k, (s, d) in layout.items()}
    return QTensor(made, scheme, (outputs, inputs))


def lookups(scheme: WeightScheme, outputs: int, inputs: int) -> int:
    """What a product looks up: a value a weight; an entry or two an index; a place a salient code."""
    if isinstance(scheme, Codebook):
        return -(-outputs // scheme.vector) * inputs * (1 if scheme.residual is None else 2)
    if isinstance(scheme, PartialBinary):
        return scheme.salient_count(outputs, inputs)
    assert isinstance(scheme, Scheme)
    return outputs * inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the smaller shape, one round")
    parser.add_argument("--out", type=Path, help="write the record here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rounds = 1 if given.quick else 5
    peak = bandwidth(rounds)
    print(f"kernels: {kernels.backend()}, {torch.get_num_threads()} threads; read bandwidth {peak / 1e9:.1f} GB/s")
    print(f"{'':<29} {'rows':>4} {'MB':>6} {'limit':>9} {'MMAC':>5} {'M look-ups':>10} {'ours':>9} {'torch bf16':>10} {'x torch':>7} x decoding")
    rows = []
    for outputs, inputs in SHAPES[1:] if given.quick else SHAPES:
        dense = torch.randn(outputs, inputs).bfloat16()
        for name, scheme in SCHEMES.items():
            held = random(scheme, outputs, inputs)
            kind = cpu_kind(scheme, None, inputs)
            assert kind is not None
            multiply = kind.product(held, None)
            decode = seconds(lambda held=held: held.dequantize(torch.bfloat16), 0.01)  # type: ignore[misc]
            for tokens in (1, 2, 4, 8):
                x = torch.randn(tokens, inputs).bfloat16()
                runs = lambda m=multiply, x=x: m(x), lambda x=x, dense=dense: F.linear(x, dense)  # type: ignore[misc]
                ours, peer = medians(rounds, *runs)
                macs, found = tokens * outputs * inputs, lookups(scheme, outputs, inputs)
                row = {
                    "outputs": outputs, "inputs": inputs, "weights": name, "kind": kind.name, "bits": held.bits, "rows": tokens,
                    "bytes": held.nbytes, "multiply_adds": macs, "lookups": found,
                    "seconds": ours, "torch_bfloat16_seconds": peer, "decode_seconds": decode,
                    "times_faster": peer / ours, "times_faster_than_decoding": (decode + peer) / ours,
                    "share_of_bandwidth": held.nbytes / ours / peak,
                }  # fmt: skip
                rows.append(row)
                limits = f"{tokens:4} {held.nbytes / 1e6:6.2f} {held.nbytes / peak * 1e6:6.0f} us {macs / 1e6:5.0f} {found / 1e6:10.1f}"
                times = f"{ours * 1e6:6.0f} us {peer * 1e6:7.0f} us {peer / ours:7.2f} {(decode + peer) / ours:10.1f}"
                print(f"{f'[{outputs}, {inputs}] {name}':<29} {limits} {times}", flush=True)
    if given.out is not None:
        record = machine() | {"threads": torch.get_num_threads(), "read_bandwidth": peak, "rows": rows}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        print(given.out)


if __name__ == "__main__":
    main()
