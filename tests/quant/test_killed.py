"""A run that is killed (``kill -9``), and killed again when it goes on, ends with the bytes of an undisturbed one.

All runs are forks of one process that has imported everything and computed nothing, so that a run takes a fraction of a second.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
import tiny_folder
from dither.errors import CheckpointError

RUNS = """
import importlib, os, random, shutil, signal, sys, time
from contextlib import suppress
from dither.cli.main import main

folder, kind, *command = sys.argv[1:]


def start(out, dies_at=None, modules=None, also=()):
    '''A run in a process of its own; it kills itself as it is about to rename or remove for the ``dies_at``-th time.'''
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        done = [0]

        def counted(function):
            def call(*arguments, **options):
                if done[0] == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done[0] += 1
                return function(*arguments, **options)
            return call

        if dies_at is not None:
            for name in ("replace", "unlink", "rmdir"):  # os.remove, pathlib and shutil end here
                setattr(os, name, counted(getattr(os, name)))
        try:
            main([*command, *also, "-o", out])
        except SystemExit as end:
            if modules:
                with open(modules, "w") as file:
                    file.write(" ".join(sys.modules))
            os._exit(end.code)
        os._exit(70)
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def keep(out):
    global kept
    shutil.copytree(out, f"{folder}/killed-{kept}")
    kept += 1


kept = 0
assert wait(start(f"{folder}/first", modules=f"{folder}/modules")) == 0
for name in open(f"{folder}/modules").read().split():
    with suppress(Exception):
        importlib.import_module(name)

if kind in ("renames", "overwrite"):
    if kind == "overwrite":
        assert wait(start(f"{folder}/other", also=["--sym", "full"])) == 0
        command.append("--overwrite")
    for n in range(7 if kind == "overwrite" else 100):
        out = f"{folder}/out-{n}"
        if kind == "overwrite":
            shutil.copytree(f"{folder}/other", out)
        code = wait(start(out, dies_at=n))
        if code != -signal.SIGKILL:
            assert code == 0
            break
        keep(out)
        assert wait(start(out)) == 0, f"killed at {n}: the run does not go on"
else:
    def begin(out):
        pid = start(out)
        while not os.path.exists(out + "/.partial"):
            time.sleep(0.0005)
        return pid, time.perf_counter()

    pid, since = begin(f"{folder}/second")
    assert wait(pid) == 0
    seconds, draw, n = time.perf_counter() - since, random.Random(int(kind)), 0
    while kept < 6:
        out, n = f"{folder}/out-{n}", n + 1
        for _ in range(draw.choice((1, 2, 3))):
            pid, since = begin(out)
            time.sleep((kept % 6 + draw.random()) / 6 * seconds)  # at random in each sixth of the time
            os.kill(pid, signal.SIGKILL)
            if wait(pid) == 0:
                break  # it was done before
            keep(out)
        assert wait(start(out)) == 0, "the run does not go on"
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(folder: Path, blocks: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=96)).save_pretrained(folder)
    tiny_folder.tokenizer().save_pretrained(folder)


def check(folder: Path, method: str, kind: str, blocks: int) -> list[set[str]]:
    """What was left by each kill. Every run must have ended alike, and nothing that was left may pass for a whole checkpoint."""
    save(folder / "model", blocks)
    command = ["quantize", str(folder / "model"), "--method", method, "--bits", "3", "--group", "16"]
    command += ["--samples", "4", "--length", "32", "--json"]
    done = subprocess.run([sys.executable, "-c", RUNS, str(folder), kind, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, whole = (
        content(folder / "first"),
        [content(folder / name) for name in ("first", "other") if (folder / name).exists()],
    )
    for out in folder.glob("out-*"):
        assert content(out) == expected, out.name
    found = []
    for killed in sorted(folder.glob("killed-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        left = content(killed)
        if "config.json" in left:  # written last and removed first: all the rest is there
            assert {n: b for n, b in left.items() if not n.startswith(".partial/")} in whole
        else:
            with pytest.raises(CheckpointError):
                dither.load(killed)
        found.append(set(left))
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    found = check(tmp_path, "awq+gptq", kind="0", blocks=5)
    finished = {
        sum(name.startswith(".partial/block-") and name.endswith(".safetensors") for name in left) for left in found
    }
    assert len(found) >= 6 and len(finished) >= 2, finished  # the moments are spread over the blocks


def test_killed_before_each_rename_and_removal(tmp_path: Path) -> None:
    found = check(tmp_path, "rtn", kind="renames", blocks=1)
    states = [{"config.json", "model.safetensors", ".partial/run.json"} & left for left in found]
    assert states[0] == set() and {"model.safetensors", ".partial/run.json"} in states
    assert {"config.json", "model.safetensors", ".partial/run.json"} in states and "config.json" in states[-1]


def test_killed_overwriting_can_be_given_again(tmp_path: Path) -> None:
    """A checkpoint of other settings is replaced: from the first removal on, the folder is no whole checkpoint, but still ours."""
    found = check(tmp_path, "rtn", kind="overwrite", blocks=1)
    assert "config.json" in found[0] and found[5] == {"dither.json"}
