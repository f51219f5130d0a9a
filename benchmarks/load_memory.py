"""Peak memory of loading a few-bit checkpoint and making text with it, beyond what the imports take.

    python benchmarks/load_memory.py [CHECKPOINT] [--out benchmarks/records/load_memory.json]

CHECKPOINT: left out, smollm2 is rounded to 4 bits, groups of 64, embedding and head to 8. Budget: 1.15 times the bytes on disk plus 150 MB; the
bytes themselves have to be read. Each type is a process of its own: peaks of resident memory (``VmHWM``) after the imports, after loading, and after
a text of 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dither.quant.machine import machine

SPARE = 150_000_000  # bytes
CHILD = """
import json, sys
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

from dither.cli import lean
with lean.imports():
    import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
    from dither.quant.evaluate import open_model
    from dither.quant.generate import Sampling, generate
    found = {"imports": peak()}
    model, tokenizer = open_model(sys.argv[1], sys.argv[2])
found["loaded"] = peak()
generate(model, tokenizer, "The capital of France is", Sampling(max_tokens=32))
found["made_text"] = peak()
print(json.dumps(found))
"""


def measure(checkpoint: str, dtype: str) -> dict[str, Any]:
    disk = sum(f.stat().st_size for f in Path(checkpoint).rglob("*") if f.is_file())
    shown = subprocess.run([sys.executable, "-c", CHILD, checkpoint, dtype], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(shown.splitlines()[-1])
    budget = round(1.15 * disk) + SPARE
    beyond = {stage: found[stage] - found["imports"] for stage in ("loaded", "made_text")}
    for stage, value in beyond.items():
        limits = f"on disk {disk / 1e6:.0f} MB, budget {budget / 1e6:.0f} MB"
        print(f"{dtype:<9} {stage:<10} {value / 1e6:6.0f} MB beyond imports, {value / budget:.2f} times the budget; {limits}")
    return {"dtype": dtype, "bytes_on_disk": disk, "budget": budget, "peak_bytes": found, "beyond_imports": beyond,
            "times_budget": {stage: value / budget for stage, value in beyond.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="default: smollm2 at 4 bits")
    parser.add_argument("--out", type=Path, help="where the record goes; default: nowhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = asked.checkpoint or f"{folder}/smollm2-w4"
        if asked.checkpoint is None:
            command = ["quantize", "smollm2", "--method", "rtn", "--bits", "4", "--layer", "model.embed_tokens=8:64", "--out", name]
            subprocess.run([sys.executable, "-m", "dither.cli.main", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [measure(name, dtype) for dtype in ("float32", "bfloat16")]
    if asked.out is not None:
        model = asked.checkpoint or "smollm2, rtn, 4 bits, groups of 64, embedding and head 8 bits"
        asked.out.write_text(json.dumps(machine() | {"model": model, "rows": rows}, indent=1) + "\n")
        print(asked.out)


if __name__ == "__main__":
    main()
