"""smollm2 at 4 bits from whole runtimes, one sequence: tokens a second, reading a prompt and making text, beside torch and llama.cpp in one run.

    python benchmarks/decode.py [--threads 2] [--prefill 512 --prefill 2048] [--quick] [--out benchmarks/records/decode.json]

Work: a prompt of 32 tokens, then 128 more, greedily; and a prompt alone. A made token reads every weight once, so the limit is the read bandwidth of
this machine (as `packed_matmul.py` measures it) over the bytes of the weights; a prompt of T tokens costs 2 T operations a weight.

Every runtime is a process of its own (`decode_arms.py`) that waits while the others run. Rounds alternate between them; figures are medians. Steps
are counted alike: the first token comes with the prompt, so n tokens are n - 1 steps. Tokens a processor second: the processor time of the prompt
alone, measured apart, is taken off. Weights:

    dither             rtn, 4 bits, groups of 64; embedding and head (one matrix) in the model's type
    dither head 8      the same, with 8 bits in groups of 64 for embedding and head
    dither w4a8, head 8    the same, with inputs of layers, but not of the head, rounded to 8 bits, one scale and zero point a token
    dither q4_0        the grids of the Q4_0 file: 4 bits in groups of 32, symmetric; embedding and head in 8 bits, groups of 32
    llama.cpp q4_0     the same checkpoint, exported (embedding and head become Q8_0)
    llama.cpp q4_1     the package's own file
    openvino q4_0      the Q4_0 file, read by OpenVINO GenAI
    onnxruntime int4   onnxruntime-genai on what its builder makes of the float model: 4 bits in groups of 32, the head too; int8 products

A peer that cannot run is named in the record with what it said. optimum-intel, which makes OpenVINO's own 4-bit models, needs an older transformers
than ours; our own ONNX export has no cache of keys and values, so it makes no text token by token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from decode_arms import Arm, Times
from packed_matmul import bandwidth

from dither.models.embedded import embedded_file
from dither.quant.machine import machine

PROMPT, TOKENS, ROUNDS = 32, 128, 5
GRIDS = {
    "w4": ("--group", "64"),
    "w4-head8": ("--group", "64", "--layer", "model.embed_tokens=8:64"),
    "w4a8-head8": ("--group", "64", "--act-bits", "8", "--layer", "model.embed_tokens=8:64"),
    "q4_0": ("--group", "32", "--sym", "extremum", "--layer", "model.embed_tokens=8:32"),
}
BUILD = """
import subprocess, sys
from dither import models
model, tokenizer = models.load("smollm2")
for part in (model, tokenizer):
    part.save_pretrained(sys.argv[1] + "/float")
command = ["-m", "onnxruntime_genai.models.builder", "-i", sys.argv[1] + "/float", "-o", sys.argv[1] + "/genai", "-p", "int4", "-e", "cpu"]
options = ["-c", sys.argv[1] + "/cache", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
subprocess.run([sys.executable, *command, *options], check=True)
"""


class DidNotRun(Exception):
    """The reason is the message."""


def dither(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dither.cli.main", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpoints(folder: Path) -> None:
    """The checkpoints, and the GGUF file of one of them; what is there already stays."""
    for name, grid in GRIDS.items():
        if not (folder / name / "config.json").is_file():
            dither("quantize", "smollm2", "--method", "rtn", "--bits", "4", *grid, "--out", str(folder / name))
    if not (folder / "genai" / "genai_config.json").is_file():
        subprocess.run([sys.executable, "-c", BUILD, str(folder)], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if not (folder / "gguf" / "model.gguf").is_file():
        dither("export", str(folder / "q4_0"), "--to", "gguf", "--tokenizer", "smollm2", "--nearest", "--out", str(folder / "gguf"))


def arms(folder: Path, threads: int) -> list[Arm]:
    return [
        Arm("dither", "dither", str(folder / "w4"), "bfloat16", threads),
        Arm("dither head 8", "dither", str(folder / "w4-head8"), "bfloat16", threads),
        Arm("dither head 8, float32", "dither", str(folder / "w4-head8"), "float32", threads),
        Arm("dither w4a8, head 8", "dither", str(folder / "w4a8-head8"), "bfloat16", threads),
        Arm("dither q4_0", "dither", str(folder / "q4_0"), "bfloat16", threads),
        Arm("torch bfloat16", "torch", "smollm2", "bfloat16", threads),
        Arm("torch float32", "torch", "smollm2", "float32", threads),
        Arm("llama.cpp q4_0", "llama.cpp", str(folder / "gguf" / "model.gguf"), "", threads),
        Arm("llama.cpp q4_1", "llama.cpp", str(embedded_file()), "", threads),
        Arm("openvino q4_0", "openvino-genai", str(folder / "gguf" / "model.gguf"), "", threads),
        Arm("onnxruntime int4", "onnxruntime-genai", str(folder / "genai"), "", threads),
    ]


class Process:
    """An arm at work."""

    def __init__(self, arm: Arm, child: subprocess.Popen[str], log: IO[str]) -> None:
        self.arm, self.child, self.log = arm, child, log
        self.nbytes: int = self._ask(asdict(arm))["bytes"]

    def measure(self, prompt: int, tokens: int) -> Times:
        return Times(**self._ask([prompt, tokens]))

    def _ask(self, what: Any) -> Any:
        assert self.child.stdin is not None and self.child.stdout is not None
        print(json.dumps(what), file=self.child.stdin, flush=True)
        answer = self.child.stdout.readline()
        if not answer:
            self.log.seek(0)
            said = [line for line in self.log.read().splitlines() if line.strip()]
            raise DidNotRun(f"its process ended with {self.child.wait()}: {said[-1][:300] if said else 'no message'}")
        return json.loads(answer)

    @classmethod
    @contextmanager
    def start(cls, arm: Arm) -> Iterator[Process]:
        """Loads the model."""
        with tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, str(Path(__file__).with_name("decode_arms.py"))]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as child:
                try:
                    yield cls(arm, child, log)
                finally:
                    child.kill()


def rounds(processes: Sequence[Process], prefills: Sequence[int], tokens: int, count: int) -> dict[str, list[dict[str, float]]]:
    """Of each arm, its figures in each round."""
    found: dict[str, list[dict[str, float]]] = {p.arm.name: [] for p in processes}
    for _ in range(count):
        for process in processes:
            alone, made = process.measure(PROMPT, 1), process.measure(PROMPT, tokens)
            row = {"tokens_per_second": (tokens - 1) / made.decode, "tokens_per_cpu_second": (tokens - 1) / max(made.cpu - alone.cpu, 1e-9)}
            for length in prefills:
                read = process.measure(length, 1)
                row |= {f"prefill_{length}_tokens_per_second": length / read.prompt, f"prefill_{length}_tokens_per_cpu_second": length / read.cpu}
            found[process.arm.name].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, action="append", help="tokens of a prompt alone; may repeat; default: 512")
    parser.add_argument("--quick", action="store_true", help="one round, 32 tokens")
    parser.add_argument("--only", nargs="+", help="names of arms")
    parser.add_argument("--models", type=Path, help="folder that keeps the checkpoints for the next time; default: a temporary one")
    parser.add_argument("--out", type=Path, help="where the record goes; default: nowhere")
    asked = parser.parse_args()
    tokens, count, prefills = (32, 1, asked.prefill or [512]) if asked.quick else (TOKENS, ROUNDS, asked.prefill or [512])
    torch.set_num_threads(asked.threads)
    with ExitStack() as stack:
        folder = asked.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints(folder)
        peak = bandwidth()
        print(f"{asked.threads} threads; read bandwidth {peak / 1e9:.1f} GB/s; {tokens} tokens behind {PROMPT}, {count} rounds", flush=True)
        chosen = [arm for arm in arms(folder, asked.threads) if asked.only is None or arm.name in asked.only]
        if not chosen:
            parser.error(f"--only: names none of {', '.join(repr(arm.name) for arm in arms(folder, asked.threads))}")
        processes, absent = [], {}
        for arm in chosen:
            try:
                processes.append(stack.enter_context(Process.start(arm)))
            except DidNotRun as why:
                if arm.runtime in ("dither", "torch"):
                    raise
                absent[arm.name] = str(why)
                print(f"{arm.name}: {why}", flush=True)
        found = rounds(processes, prefills, tokens, count)
        record = machine() | {
            "threads": asked.threads, "read_bandwidth": peak, "prompt_tokens": PROMPT, "tokens": tokens, "rounds": count,
            "rows": rows(processes, found, peak), "did_not_run": absent,
        }  # fmt: skip
    show(record["rows"], prefills)
    if asked.out is not None:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
        print(asked.out)


def rows(processes: Sequence[Process], found: dict[str, list[dict[str, float]]], peak: float) -> list[dict[str, Any]]:
    """Medians over the rounds, limits, and ratios to llama.cpp's Q4_0 within each round."""
    against = found.get("llama.cpp q4_0")
    made = []
    for process in processes:
        own = found[process.arm.name]
        row: dict[str, Any] = asdict(process.arm) | {"bytes_a_token": process.nbytes, "limit_tokens_per_second": peak / process.nbytes}
        del row["model"], row["threads"]
        row |= {key: statistics.median(r[key] for r in own) for key in own[0]}
        row["share_of_bandwidth"] = row["tokens_per_second"] * process.nbytes / peak
        if against is not None:
            row["times_llama_cpp_q4_0"] = {key: statistics.median(a[key] / b[key] for a, b in zip(own, against, strict=True)) for key in own[0]}
        made.append(row)
    return made


def show(rows: Sequence[dict[str, Any]], prefills: Sequence[int]) -> None:
    heads = "".join(f" {f'prompt {n}':>12} {'x q4_0':>7}" for n in prefills)
    print(f"{'':<24} {'MB':>6} {'limit':>7} {'tokens/s':>9} {'share':>6} {'/ CPU s':>8} {'x q4_0':>7}{heads}")
    for row in rows:
        times = row.get("times_llama_cpp_q4_0", {})

        def ratio(key: str, times: dict[str, float] = times) -> str:
            return f"{times[key]:7.2f}" if times else f"{'':7}"

        line = f"{row['name']:<24} {row['bytes_a_token'] / 1e6:6.0f} {row['limit_tokens_per_second']:7.0f} {row['tokens_per_second']:9.1f}"
        line += f" {100 * row['share_of_bandwidth']:4.0f} % {row['tokens_per_cpu_second']:8.1f} {ratio('tokens_per_second')}"
        for n in prefills:
            line += f" {row[f'prefill_{n}_tokens_per_second']:12.1f} {ratio(f'prefill_{n}_tokens_per_second')}"
        print(line)


if __name__ == "__main__":
    main()
