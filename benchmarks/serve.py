"""`dither serve` under 1, 4 and 8 streams: tokens a second, the time to the first token, and where a step's time goes.

    python benchmarks/serve.py [MODEL] [--quick] [--out benchmarks/records/serve.json]

MODEL: a checkpoint; left out, smollm2 is rounded to 4 bits, groups of 64. Work: every stream reads a prompt of 32 tokens and makes as many as asked,
greedily. Limits: one reading of the model's bytes a step serves up to 8 streams, so 8 streams could be 8 times as fast as one where memory is what
a step waits for; a product of 8 rows costs more arithmetic than one of 1, and attention, sampling and Python go stream by stream.

The server is a process of its own; the clients, plain HTTP, share the machine with it. Peers, in the same run: `dither run`'s loop (`generate`)
alone, and the same sequences stepped in the other ways of `serve.batch`: the model itself over rows side by side, and one by one. Parts of a step:
inside C++ kernels (the whole program, or packed products where the model is stepped), inside torch's operators, and the rest, which is Python; they
are shares of steps under torch's profiler, whose own time counts as Python, so that share is an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from dither import process

if __name__ == "__main__":
    process.prepare_for_long_work()  # as the command line does, before torch is loaded

import torch
from torch import nn

import dither
from dither.kernels.extension import extension
from dither.quant.evaluate import open_model
from dither.quant.generate import Sampling, generate
from dither.quant.linear import decoded
from dither.quant.machine import machine
from dither.serve.batch import Batch, ByProgram, OneByOne, SideBySide
from dither.serve.trial import of_the_model, stepper

PROMPT = 32  # tokens
STREAMS = (1, 4, 8)


@contextmanager
def served(model: str) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "dither.cli.main", "serve", model, "--port", "0", "--name", "model", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


async def stream(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> list[float]:
    """When the request went out, and when each piece came."""
    ask = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    times = [time.perf_counter()]
    async with client.stream("POST", "completions", json=ask) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


async def load(url: str, streams: int, tokens: int, vocabulary: int) -> dict[str, float]:
    """Tokens a second of all streams together, from the first request to the last piece, and times to the first piece."""
    draw = torch.Generator().manual_seed(streams)
    prompts = torch.randint(3, vocabulary, (streams, PROMPT), generator=draw).tolist()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        found = await asyncio.gather(*(stream(client, prompt, tokens) for prompt in prompts))
        usage = [len(times) - 1 for times in found]
    wall = max(t[-1] for t in found) - min(t[0] for t in found)
    firsts = [t[1] - t[0] for t in found]
    return {
        "tokens_per_second": tokens * streams / wall, "first_token_seconds": statistics.median(firsts), "worst_first_token_seconds": max(firsts),
        "pieces": statistics.mean(usage),
    }  # fmt: skip


class _Timed:
    """``inner``, whose method ``name`` is timed."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name, self.seconds = inner, name, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name != self.name:
            return found

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return call


@contextmanager
def timed_kernels(batch: Batch[Any]) -> Iterator[_Timed]:
    """Within it, what a step does inside C++ is timed: all of a program, or packed products."""
    if isinstance(batch, ByProgram):
        timed = _Timed(batch.program.tape._native, "run")
        with mock.patch.object(batch.program.tape, "_native", timed):
            yield timed
    else:
        timed = _Timed(extension(), "packed_matmul")
        with mock.patch("dither.kernels.packed_matmul.extension", lambda: timed):
            yield timed


def parts(batch: Batch[Any], streams: int, steps: int) -> dict[str, float]:
    """Seconds of a step, and its shares."""
    draw = torch.Generator().manual_seed(0)
    sequences = [batch.read(torch.randint(3, 1000, (PROMPT,), generator=draw).tolist())[0] for _ in range(streams)]

    def run(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            for at in range(0, streams, batch.rows):
                chosen = sequences[at : at + batch.rows]
                batch.step(chosen, [7] * len(chosen))
        return (time.perf_counter() - started) / count

    run(2)
    whole = run(steps)
    count = max(2, steps // 4)
    with timed_kernels(batch) as timed, torch.profiler.profile() as profile:
        profiled = run(count)
    kernels = timed.seconds / count
    operators = sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6 / count
    return {
        "step_seconds": whole, "profiled_step_seconds": profiled, "kernels_share": kernels / profiled,
        "operators_share": operators / profiled, "python_share": 1 - (kernels + operators) / profiled,
    }  # fmt: skip


def whole_bytes(model: nn.Module) -> int:
    """That a step reads: parameters and few-bit tensors, each once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint; default: smollm2 at 4 bits")
    parser.add_argument("--quick", action="store_true", help="16 tokens, one round")
    parser.add_argument("--out", type=Path, help="where the record goes; default: nowhere")
    options = parser.parse_args()
    tokens, rounds = (16, 1) if options.quick else (128, 5)
    with tempfile.TemporaryDirectory() as folder:
        name = options.model or f"{folder}/smollm2-w4"
        if options.model is None:
            code = f"import dither; dither.quantize('smollm2', dither.recipes.RTN(bits=4, group=64), out={name!r})"
            subprocess.run([sys.executable, "-c", code], check=True)  # apart, so that nothing of it stays in this process
        record = measure(name, tokens, rounds)
    record["model"] = options.model or "smollm2, rtn, 4 bits, groups of 64"
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(options.out)


def measure(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    model, tokenizer = open_model(name)
    vocabulary, read = model.get_input_embeddings().weight.shape[0], whole_bytes(model)  # type: ignore[operator]
    print(f"{torch.get_num_threads()} threads, kernels {dither.kernels.backend()}; {read / 1e6:.0f} MB a step; {tokens} tokens, {rounds} rounds")
    text = tokenizer.decode(list(range(1000, 1000 + PROMPT)))
    peer = [generate(model, tokenizer, text, Sampling(max_tokens=tokens)).tokens_per_second for _ in range(rounds)]
    alone = statistics.median(peer)
    print(f"{'dither run':<12} {alone:7.1f} tokens/s")
    rows = []
    with served(name) as url:
        asyncio.run(load(url, 8, 4, vocabulary))
        results = [{n: asyncio.run(load(url, n, tokens, vocabulary)) for n in STREAMS} for _ in range(rounds)]  # the numbers of streams alternate
    one = statistics.median(r[1]["tokens_per_second"] for r in results)
    for n in STREAMS:
        row = {key: statistics.median(r[n][key] for r in results) for key in results[0][n]}
        row |= {"streams": n, "times_one_stream": row["tokens_per_second"] / one, "times_dither_run": row["tokens_per_second"] / alone}
        rows.append(row)
        print(
            f"{n} stream{'s' if n > 1 else ' '}    {row['tokens_per_second']:7.1f} tokens/s, {row['times_one_stream']:.2f} times one stream, "
            f"first token {1e3 * row['first_token_seconds']:.0f} ms (worst {1e3 * row['worst_first_token_seconds']:.0f})",
            flush=True,
        )
    steps = []
    with torch.inference_mode(), decoded(model, few_rows=True):
        program, itself = stepper(model), of_the_model(model)  # in this order: the second puts hooks into the model
        if isinstance(program, ByProgram):
            steps += [parts(program, n, 4 * rounds + 4) | {"streams": n, "way": "by program"} for n in STREAMS]
        if isinstance(itself, SideBySide):
            steps += [parts(itself, n, 4 * rounds + 4) | {"streams": n, "way": "side by side"} for n in STREAMS]
        steps.append(parts(OneByOne(model), 8, rounds + 2) | {"streams": 8, "way": "one by one"})
    for step in steps:
        shares = ", ".join(f"{key.removesuffix('_share').replace('_', ' ')} {100 * step[key]:.0f} %" for key in step if key.endswith("_share"))
        print(f"a step of {step['streams']} {step['way']}: {1e3 * step['step_seconds']:.1f} ms ({shares})")
    return machine() | {
        "bytes_a_step": read, "prompt_tokens": PROMPT, "tokens": tokens, "rounds": rounds, "dither_run_tokens_per_second": alone, "rows": rows,
        "steps": steps,
    }  # fmt: skip


if __name__ == "__main__":
    main()
