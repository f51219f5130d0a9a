"""Memory of the cache of keys and values, in few bits and in the model's own type: the same model goes on from the same prompt twice.

    python benchmarks/kv_memory.py --tokens 4096 --kv-bits 4

Prints what each cache holds at the end (all of it: codes, scales, zero points, spare room), their ratio, and how long the tokens took.
``--out`` writes the same as JSON, with the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.formats import Int, token
from dither.quant.evaluate import DTYPES
from dither.quant.kv import few_bit_attention
from dither.quant.kv_cache import cache_bytes
from dither.quant.machine import machine


def generate(model: nn.Module, ids: Tensor, count: int) -> dict[str, Any]:
    """``count`` tokens behind ``ids``, greedily, past any end token."""
    started = time.perf_counter()
    found = model.generate(  # type: ignore[operator]
        ids, min_new_tokens=count, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    seconds = time.perf_counter() - started
    cache = found.past_key_values
    return {"bytes": cache_bytes(cache), "tokens": cache.get_seq_length(), "seconds": seconds, "cache": type(cache).__name__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to generate")
    parser.add_argument("--kv-bits", type=int, default=4)
    parser.add_argument("--rotate", action="store_true", help="rotate queries and keys first")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--prompt", default="The history of the world begins")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    plain, tokenizer = models.load(asked.model, dtype=DTYPES[asked.dtype])
    ids = tokenizer(asked.prompt, return_tensors="pt")["input_ids"]
    few = copy.deepcopy(plain)
    few_bit_attention(few, replace(Int(asked.kv_bits) @ token(), dynamic=True), asked.rotate)
    record: dict[str, Any] = {"model": asked.model, "dtype": asked.dtype, "kv_bits": asked.kv_bits, "rotate": asked.rotate}
    with torch.inference_mode():
        for name, model in (("float", plain), ("few", few)):
            record[name] = generate(model, ids, asked.tokens)
            row = record[name]
            print(f"{name:<6} {row['bytes']:>12,} bytes for {row['tokens']} tokens, {row['seconds']:.1f} s ({row['cache']})", flush=True)
    record["ratio"] = record["float"]["bytes"] / record["few"]["bytes"]
    print(f"ratio  {record['ratio']:.3f}")
    if asked.out is not None:
        asked.out.write_text(json.dumps(record | machine(), indent=1))


if __name__ == "__main__":
    main()
