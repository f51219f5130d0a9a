"""Peak memory does not grow with the number of blocks: the same width with four times the depth costs the same.

Each run is a command of its own, so that its peak is its own; the figure it reports is held against the one the kernel keeps for its process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import tiny_folder
import tiny_models


def save_llama(folder: Path, hidden: int, intermediate: int, blocks: int) -> None:
    """A random Llama in bfloat16, one file a block, so that making it takes no more memory than a block."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tiny_folder.tokenizer().save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=draw) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape)
        return values.bfloat16()

    files = {
        "outside": {"model.embed_tokens": random((tiny_models.VOCABULARY, hidden)), "model.norm": random((hidden,))}
    }
    block = {name: random(shape) for name, shape in shapes.items()}
    weight_map = {}
    for i in range(blocks):
        files[f"block-{i}"] = {f"model.layers.{i}.{name}": tensor for name, tensor in block.items()}
    for file, tensors in files.items():
        stored = {f"{name}.weight": tensor for name, tensor in tensors.items()}
        save_file(stored, folder / f"{file}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def peak(model: Path, out: Path) -> int:
    """Peak memory of quantizing ``model`` with GPTQ, as reported, bytes."""
    command = [
        sys.executable,
        "-m",
        "dither.cli.main",
        "quantize",
        model,
        "--method",
        "gptq",
        "--bits",
        "4",
        "--group",
        "128",
    ]
    command += ["--samples", "2", "--length", "64", "--json", "-o", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            seen = max([seen, *(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))])
            time.sleep(0.05)
        assert process.stdout is not None and process.stderr is not None
        printed, told = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, told
    reported = int(json.loads(printed.splitlines()[-1])["peak_memory_bytes"])
    assert 0.99 * seen <= reported <= 1.02 * seen
    return reported


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # hundreds of megabytes, which pytest would keep for three sessions


def peaks(place: Path, hidden: int, intermediate: int, depths: tuple[int, int]) -> list[int]:
    for blocks in depths:
        save_llama(place / f"{blocks}", hidden, intermediate, blocks)
    with ThreadPoolExecutor() as pool:  # side by side: each is a process of its own
        return list(pool.map(lambda blocks: peak(place / f"{blocks}", place / f"{blocks}-w4"), depths))


def test_twenty_four_blocks_more_cost_far_less_than_holding_them(place: Path) -> None:
    """At this width most of the peak is torch itself, so what is held against the growth is the size of the blocks. Half of it is allowed: the
    heap keeps what is freed, with some tens of megabytes of holes, however many blocks there are."""
    hidden, intermediate = 512, 704
    shallow, deep = peaks(place, hidden, intermediate, (4, 28))
    added = 24 * 4 * hidden * (5 * hidden // 2 + 3 * intermediate)  # in float32
    assert abs(deep - shallow) <= added / 2


@pytest.mark.slow
def test_eight_and_thirty_two_blocks_peak_within_a_tenth(place: Path) -> None:
    shallow, deep = peaks(place, 1024, 1024, (8, 32))
    assert abs(deep - shallow) <= 0.1 * min(shallow, deep)
