"""GPTQ at 4 bits, whole model, beside llm-compressor: processor seconds, wall seconds and peak memory of each, in one run on one machine.

    python benchmarks/quantize_peer.py --peer OTHER_ENVIRONMENT/bin/python --calibration wiki.valid.tokens

The peer lives in an environment of its own (``pip install llmcompressor``), since its dependencies are not ours. Both get the same model (a folder
in float32), the same 64 x 512 tokens, groups of 64, asymmetric, everything but embeddings and head; each runs in a process of its own, and
what is timed is the whole process from its start. Limit: one forward pass of the calibration tokens (2 T P operations for P weights) and the Hessians
(T I^2 for each input of I features) are needed by both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import json, sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
folder, tokens, out = sys.argv[1:4]
ids = torch.load(tokens, weights_only=True).tolist()
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
oneshot(model=folder, dataset=data, recipe=recipe, max_seq_length=len(ids[0]), num_calibration_samples=len(ids), output_dir=out)
"""

OURS = """
import sys
import torch
import dither
from dither.quant.recipes import GPTQ
folder, tokens, out = sys.argv[1:4]
dither.quantize(folder, GPTQ(bits=4, group=64), torch.load(tokens, weights_only=True), out)
"""


def run(python: str, code: str, *arguments: str) -> dict[str, float]:
    """What one process took; its output goes to standard error."""
    environment = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    started = time.perf_counter()
    child = subprocess.Popen([python, "-c", code, *arguments], stdout=sys.stderr, env=environment)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{python}: the run failed with status {os.waitstatus_to_exitcode(status)}")
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "peak_memory_bytes": used.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with llmcompressor")
    parser.add_argument("--calibration", required=True, type=Path, help="a text file")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    arguments = parser.parse_args()

    import torch

    from dither import models
    from dither.quant.machine import machine

    with tempfile.TemporaryDirectory() as scratch:
        folder, tokens = Path(scratch) / "model", Path(scratch) / "tokens.pt"
        model, tokenizer = models.load(arguments.model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save(models.calibration_tokens(arguments.calibration, tokenizer, samples=64, length=512, seed=0), tokens)
        del model
        ours = run(sys.executable, OURS, str(folder), str(tokens), str(Path(scratch) / "ours"))
        peer = run(arguments.peer, PEER, str(folder), str(tokens), str(Path(scratch) / "peer"))
    record = {"dither": ours, "llm-compressor": peer, **machine()}
    for name in ("cpu_seconds", "seconds", "peak_memory_bytes"):
        print(f"{name:18} dither {ours[name]:14.1f}  llm-compressor {peer[name]:14.1f}  ratio {ours[name] / peer[name]:.2f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
