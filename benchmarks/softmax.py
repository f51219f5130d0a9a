"""Softmax of one row by two passes, three passes and torch, against the speed of memory; its error; and where dither calls it.

    python benchmarks/softmax.py [--quick] [--out FILE] [PART ...]        writes benchmarks/records/softmax.json
    python benchmarks/readme.py --special                                 docs/special.md and docs/softmax.svg from it

Parts: float32 (rows of 4 KiB to 1 GiB, AVX-512 and AVX2, 1 and 2 threads), bfloat16 (the best instruction set), errors, use. Each part names its
machine and date; a run replaces the parts that it measures. Work a row of N numbers: 3 N, 4 N or 5 N numbers moved (`dither.special.softmax_timing`),
2 N exponentials, N with reload. Limit: what reading, copying and changing the same rows takes without arithmetic, in the same run. Times are
medians of rounds in which all take turns. Memory: 2 GiB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dither import kernels
from dither.cli.bench import parse_sizes
from dither.quant.generate import Sampling, pick
from dither.quant.judge import _surprise
from dither.quant.machine import machine
from dither.special import log_softmax, softmax, softmax_error, softmax_timing, timing

RECORD = Path(__file__).parent / "records" / "softmax.json"
VOCABULARY, TOKENS = 49152, 256  # of the embedded language model; rows that perplexity takes at a time
CLASSES = 1 << 24  # of an extreme classifier


def times(sizes: str, types: str, isas: list[str], rounds: int) -> list[dict[str, Any]]:
    print(softmax_timing.HEAD)
    found = []
    for row in softmax_timing.rows(parse_sizes(sizes), (1, 2), (types,), isas, rounds):
        print(softmax_timing.line(row), flush=True)
        found.append(row)
    return found


def errors(quick: bool) -> list[dict[str, Any]]:
    """In ulp, the largest of three seeds."""
    found = []
    for isa in timing.instruction_sets():
        with timing.settings(1, isa):
            seeds = [softmax_error.errors(5003 if quick else 1_000_003, seed) for seed in range(3)]
        for name in seeds[0]:
            by_kind = {kind: max(seed[name][kind] for seed in seeds) for kind in seeds[0][name]}
            found.append({"isa": isa, "algorithm": name, "ulp": by_kind})
            print(f"{isa:>7} {name:>10}  " + "  ".join(f"{kind} {ulp:.2f}" for kind, ulp in by_kind.items()))
    return found


def uses(rounds: int) -> list[dict[str, Any]]:
    """What dither does with logits, beside torch's way."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(TOKENS, VOCABULARY, generator=g) * 3, torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    halves, out, row = logits.bfloat16(), torch.empty_like(logits), logits[0].clone()
    classes = timing.buffer(CLASSES, torch.float32).copy_(torch.randn(CLASSES, generator=g))
    scores = timing.buffer(CLASSES, torch.float32)

    def loss(x: Tensor) -> float:
        return float(F.cross_entropy(x.float(), targets, reduction="sum"))

    work: list[tuple[str, str, Callable[[], object], Callable[[], object]]] = [
        ("perplexity's loss, float32 logits", "called", lambda: _surprise(logits, targets), lambda: loss(logits)),
        ("perplexity's loss, bfloat16 logits", "called", lambda: _surprise(halves, targets), lambda: loss(halves)),
        ("softmax of all those rows", "not used", lambda: softmax(logits, out=out), lambda: torch.softmax(logits, -1, out=out)),
        ("the sampler's softmax, one row", "not called", lambda: softmax(row), lambda: row.softmax(-1)),
        ("softmax over 2^24 classes", "not used", lambda: softmax(classes, out=scores), lambda: torch.softmax(classes, -1, out=scores)),
        ("log-softmax over 2^24 classes", "not used", lambda: log_softmax(classes, out=scores), lambda: torch.log_softmax(classes, -1, out=scores)),
    ]  # fmt: skip
    found = []
    for threads in (1, 2):
        with timing.settings(threads, ""), torch.inference_mode():
            for says, state, ours, peer in work:
                seconds = timing.alternating({"ours": ours, "torch": peer}, rounds)
                found.append({"work": says, "state": state, "threads": threads, **seconds, "times_faster": seconds["torch"] / seconds["ours"]})
            choosing = timing.alternating({"pick": lambda: pick(row, Sampling(temperature=1.0), g)}, rounds)["pick"]
            found.append({"work": "the sampler's whole choice of a token", "state": "", "threads": threads, "torch": choosing})
    for f in found:
        ours = f"{1e6 * f['ours']:10.1f} us {f['times_faster']:6.2f} times faster" if "ours" in f else ""
        print(f"{f['work']:<40} {f['threads']} thread(s)  torch {1e6 * f['torch']:10.1f} us  ours {ours or '-'}  {f['state']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="float32, bfloat16, errors, use; all if none is named")
    parser.add_argument("--quick", action="store_true", help="short rows and one round: to see that it works")
    parser.add_argument("--out", type=Path, default=RECORD)
    given = parser.parse_args()
    isas, rounds = timing.instruction_sets(), 1 if given.quick else 9
    if not isas:
        parser.error("the C++ extension is not installed: there is nothing to time")
    sizes = "64K:1M" if given.quick else "4K:1G"
    measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "float32": lambda: times(sizes, "float32", isas[:2], rounds),
        "bfloat16": lambda: times(sizes, "bfloat16", isas[:1], rounds),
        "errors": lambda: errors(given.quick),
        "use": lambda: uses(rounds),
    }
    unknown = set(given.parts) - measured.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such part; they are {', '.join(measured)}")
    record = json.loads(given.out.read_text()) if given.out.is_file() else {}
    print(f"kernels: {kernels.backend()}; caches {', '.join(softmax_timing.short(kernels.cache_bytes(level)) for level in (1, 2, 3))}")
    for name, run in measured.items():
        if not given.parts or name in given.parts:
            record[name] = machine() | {"caches": [kernels.cache_bytes(level) for level in (1, 2, 3)], "rows": run()}
            given.out.parent.mkdir(exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
