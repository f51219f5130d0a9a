"""Seconds from the start of a process to the first character that it prints, beside the same in other ways.

    python benchmarks/first_token.py [CHECKPOINT] [--quick] [--out benchmarks/records/first_token.json]

CHECKPOINT: left out, smollm2 is rounded to 4 bits, groups of 64. Limit: no process that uses torch is faster than its import, which is measured in
the same rounds; weights are read at some GB/s, since files are in the page cache after the first, unmeasured run of each. Medians of 5 rounds, in
which the ways alternate:

    dither run      the command line, as users call it
    transformers    its own loader and loop on the same checkpoint (`import dither` gives it the few-bit layers), printing the first token
    llama.cpp       Q4_1, the package's own file, by its Python package
    import torch    and print
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dither.models.embedded import embedded_file
from dither.quant.machine import machine

PROMPT = "The capital of France is"
TRANSFORMERS = """
import sys
import dither
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
given = tokenizer(sys.argv[2], return_tensors="pt")
made = model.generate(**given, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(made[0, given["input_ids"].shape[1]:]), flush=True)
"""
LLAMA = """
import sys
import xllamacpp as cpp
settings = cpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = sys.argv[1], 512, 1, False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(sys.argv[3])
answer = cpp.Server(settings).handle_completions({"prompt": sys.argv[2], "max_tokens": 1, "temperature": 0})
print(answer["choices"][0]["text"], flush=True)
"""


def first(command: list[str]) -> float:
    """Seconds until standard output has something."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        assert process.stdout is not None
        seen = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not seen or process.returncode:
        raise SystemExit(f"{command[0]}: printed nothing, or failed with {process.returncode}: {command[-4:]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="default: smollm2 at 4 bits")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, help="where the record goes; default: nowhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = asked.checkpoint or f"{folder}/smollm2-w4"
        dither = [sys.executable, "-m", "dither.cli.main"]
        if asked.checkpoint is None:
            command = [*dither, "quantize", "smollm2", "--method", "rtn", "--bits", "4", "--out", name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        threads = machine()["machine"]["threads"]
        ways = {
            "dither run": [*dither, "run", name, PROMPT, "--max-tokens", "16"],
            "transformers": [sys.executable, "-c", TRANSFORMERS, name, PROMPT],
            "llama.cpp": [sys.executable, "-c", LLAMA, str(embedded_file()), PROMPT, str(threads)],
            "import torch": [sys.executable, "-c", "import torch; print(torch.__version__)"],
        }
        for command in ways.values():
            first(command)
        rounds = [{way: first(command) for way, command in ways.items()} for _ in range(1 if asked.quick else 5)]
    seconds = {way: statistics.median(r[way] for r in rounds) for way in ways}
    for way, found in seconds.items():
        print(f"{way:<14} {found:6.2f} s, {found / seconds['dither run']:.2f} times dither run")
    if asked.out is not None:
        record = machine() | {"model": asked.checkpoint or "smollm2, rtn, 4 bits, groups of 64", "rounds": len(rounds), "seconds": seconds}
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
        print(asked.out)


if __name__ == "__main__":
    main()
