"""Perplexity of exports in the programs that load them, beside dither's own of the checkpoint that was exported, on the same tokens.

    python benchmarks/export_perplexity.py --text wiki.test.tokens --out benchmarks/records/export_perplexity.json
    python benchmarks/readme.py --exports                the table in docs/exports.md

A model is quantized on grids that several formats hold exactly, each checkpoint is exported to every format, and each export is read by every
program that is said to load it: llama.cpp (through xllamacpp), onnxruntime, transformers with compressed-tensors, transformers with a GGUF file. Each
runs in a process of its own, without dither, on one thread (benchmarks/export_runtimes.py, which says how llama.cpp is asked). What a format does not
hold and what a program does not load is in the record with the program's own words.

Both sides judge the first ``--windows`` windows of ``--length`` tokens that dither's tokenizer cuts, every token of a window but its first:

    ppl = exp( mean of -log p(x_t | x_<t) )

Recorded for each pair: both perplexities, their relative difference, the mean distance |log p - log p'| of one token (differences of perplexity alone
may cancel), and the bytes of the folder's weights. The limit is rounding: the same codes and scales are multiplied in both, in float32 but for
llama.cpp, which rounds the inputs of few-bit layers to 8 bits, 32 numbers at a time, and for folders that transformers decodes to the type of the
scales.

Rounding inputs is chaotic: a difference in the last bits moves some numbers over a step, the next layers' inputs then differ by more, and after a
few layers nothing is left in common between the errors of two runs. So no run predicts another's figure, and llama.cpp is held against a spread:
dither on the same tokens with inputs rounded in this way, several times, each with noise of the size of float32's rounding before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_runtimes import log_probabilities
from torch import nn

import dither
from dither import models
from dither.errors import DitherError, ExportError
from dither.formats import Int, Scheme, group
from dither.quant.inputs import round_rows
from dither.quant.linear import QuantLinear
from dither.quant.machine import machine
from dither.quant.recipe import Method

LONGEST = 2048  # tokens of a window
CHECKPOINTS: dict[str, Scheme] = {
    "4 bits, groups of 32": Int(4, sym=True) @ group(32),
    "4 bits, groups of 64, zero points": Int(4) @ group(64),
    "8 bits, groups of 32": Int(8, sym=True) @ group(32),
}
READERS: dict[str, tuple[str, ...]] = {  # of export_runtimes.py, by format
    "gguf": ("llama.cpp", "transformers (GGUF)"),
    "onnx": ("onnxruntime",),
    "compressed-tensors": ("transformers",),
    "gptq": ("transformers",),
    "awq": ("transformers",),
}
PACKAGES = ("xllamacpp", "onnxruntime", "transformers", "compressed-tensors", "gguf")
Q8_0 = replace(Int(8, sym=True) @ group(32), dynamic=True)  # what llama.cpp rounds the inputs of few-bit layers to, 32 numbers at a time
NOISE, RUNS = 2.0**-20, 3  # relative, as sums of float32 in another order may differ; how often
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")


def own(model: nn.Module, windows: torch.Tensor) -> np.ndarray:
    """dither's log-probabilities ``[windows, length - 1]`` of the tokens behind the first, float64."""
    with torch.inference_mode():
        return np.stack([log_probabilities(model(input_ids=ids[None], use_cache=False).logits[0].float().numpy(), ids.numpy()) for ids in windows])


def rounded_inputs(model: nn.Module, seed: int) -> nn.Module:
    """The model whose few-bit layers see inputs with a little noise, rounded to Q8_0 as in llama.cpp."""
    noise = torch.Generator().manual_seed(seed)

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        return (round_rows(x * (1 + NOISE * torch.randn(x.shape, generator=noise)), Q8_0), *others)

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(rounded)
    return model


def theirs(reader: str, folder: Path, windows: torch.Tensor, scratch: Path, seconds: float) -> np.ndarray | str:
    """A program's log-probabilities, or why there are none: the last line that its process wrote."""
    np.save(scratch / "windows.npy", windows.numpy())
    answer = scratch / "answer.npy"
    answer.unlink(missing_ok=True)
    program = Path(__file__).with_name("export_runtimes.py")
    command = [sys.executable, "-P", str(program), reader, str(folder), str(scratch / "windows.npy"), str(answer)]  # -P: kernels.py here is ours
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:g} s"
    if child.returncode == 0:
        found: np.ndarray = np.load(answer)
        return found
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {child.returncode}"


def perplexity(logs: np.ndarray) -> float:
    return math.exp(-float(logs.mean()))


def compared(here: np.ndarray, there: np.ndarray) -> dict[str, float]:
    return {
        "perplexity": perplexity(there),
        "relative_difference": perplexity(there) / perplexity(here) - 1,
        "mean_nats_apart": float(np.abs(here - there).mean()),
        "most_nats_apart": float(np.abs(here - there).max()),
    }


def line(found: Mapping[str, Any]) -> str:
    return f"{found['perplexity']:10.5f}  {found['relative_difference']:+.1e}  {found['mean_nats_apart']:.1e} nats apart"


def checkpoint(model: str, recipe: Method, calibration: str | None, windows: torch.Tensor, scratch: Path, seconds: float) -> dict[str, Any]:
    """One checkpoint: what dither says, and what each program says of each export."""
    out = scratch / "few"
    result = dither.quantize(model, recipe, calibration, out)
    here = own(dither.load(out)[0], windows)
    rounded = [own(rounded_inputs(dither.load(out)[0], seed), windows) for seed in range(RUNS)]
    record: dict[str, Any] = {"perplexity": perplexity(here), "exports": []}
    record["rounded_inputs"] = {
        "perplexities": [perplexity(one) for one in rounded],
        "mean_nats_apart": float(np.mean([np.abs(one - here).mean() for one in rounded])),
        "mean_nats_between_runs": float(np.mean([np.abs(one - other).mean() for one, other in itertools.combinations(rounded, 2)])),
    }
    print(f"  {'dither':58}{perplexity(here):10.5f}", flush=True)
    for one in rounded:
        print(f"  {'dither, inputs rounded to Q8_0':58}{line(compared(here, one))}", flush=True)
    for target, readers in READERS.items():
        folder = scratch / target
        about: dict[str, Any] = {"format": target}
        try:
            about["notes"] = dither.export(result, folder, to=target, **({"tokenizer": model} if target == "gguf" else {}))
        except ExportError as error:
            record["exports"].append(about | {"not_run": str(error)})
            print(f"  {target:20} not held: {error}", flush=True)
            continue
        about["bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)
        for reader in readers:
            there = theirs(reader, folder, windows, scratch, seconds)
            found = {"not_run": there} if isinstance(there, str) else compared(here, there)
            record["exports"].append(about | {"reader": reader} | found)
            figures = there if isinstance(there, str) else line(found)
            print(f"  {target:18} {about['bytes']:>11,} bytes {reader:19} {figures}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what dither.quantize takes; its tokenizer must fit GGUF")
    parser.add_argument("--method", default="rtn", choices=("rtn", "gptq"))
    parser.add_argument("--calibration", help="text for gptq (default: the embedded text)")
    parser.add_argument("--text", type=Path, help="text to judge on (default: the embedded text)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help=f"tokens of a window, at most {LONGEST}")
    parser.add_argument("--seconds", type=float, default=600.0, help="the longest that one program may take for one export")
    parser.add_argument("--quick", action="store_true", help="one window of 32 tokens, one checkpoint")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    asked = parser.parse_args()
    if asked.windows < 1 or not 2 <= asked.length <= LONGEST:
        parser.error(f"--windows must be at least 1 and --length between 2 and {LONGEST}")
    if asked.quick:
        asked.windows, asked.length = 1, 32

    torch.set_num_threads(1)
    text = models.embedded_text("evaluation") if asked.text is None else models.read_text(asked.text)
    try:
        tokenizer = models.open(asked.model).tokenizer()
    except DitherError as error:
        parser.error(str(error))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < asked.windows * asked.length:
        parser.error(f"the text has {ids.numel()} tokens, fewer than {asked.windows} windows of {asked.length}")
    windows = ids[: asked.windows * asked.length].view(asked.windows, asked.length)
    record: dict[str, Any] = {
        "model": asked.model, "method": asked.method, "text": "the embedded text" if asked.text is None else asked.text.name,
        "windows": asked.windows, "length": asked.length, "float_perplexity": perplexity(own(models.load(asked.model)[0], windows)),
        "checkpoints": {},
    }  # fmt: skip
    method = {"rtn": dither.recipes.RTN, "gptq": dither.recipes.GPTQ}[asked.method]
    for name, scheme in list(CHECKPOINTS.items())[: 1 if asked.quick else None]:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            record["checkpoints"][name] = checkpoint(asked.model, method(weights=scheme), asked.calibration, windows, Path(scratch), asked.seconds)
    about = machine()
    about["machine"]["threads"] = 1
    about["machine"]["versions"] |= {package: version(package) for package in PACKAGES}
    if asked.out is not None:
        asked.out.write_text(json.dumps(record | about, indent=1) + "\n")


if __name__ == "__main__":
    main()
