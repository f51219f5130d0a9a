"""Which path runs, and what is said where there is no extension."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dither.kernels import backend
from dither.kernels.extension import extension

# An import hook that makes the extension impossible to find, whatever is installed.
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "dither.kernels._C":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Absent())
import torch
import dither.kernels as k
print("imported", file=sys.stderr)
for _ in range(3):
    k.pack_rows(torch.zeros(2, 5, dtype=torch.uint8), 3)
print(k.backend())
"""


def test_says_once_that_it_runs_on_references() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "reference"
    before, after = done.stderr.split("imported\n")
    assert "reference" not in before
    assert after.count("\n") == 1
    assert "dither runs on its torch reference kernels" in after


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITHER_ISA", raising=False)
    monkeypatch.setenv("DITHER_KERNELS", "reference")
    assert backend() == "reference"
    monkeypatch.setenv("DITHER_KERNELS", "auto")
    if extension() is None:
        pytest.skip("the C++ extension is not installed")
    assert backend() in ("avx512", "avx2", "scalar")
    monkeypatch.setenv("DITHER_ISA", "scalar")
    assert backend() == "scalar"


def test_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_KERNELS", "fast")
    with pytest.raises(ValueError, match="DITHER_KERNELS=fast"):
        backend()
    monkeypatch.delenv("DITHER_KERNELS")
    if extension() is None:
        pytest.skip("the C++ extension is not installed")
    monkeypatch.setenv("DITHER_ISA", "sse9")
    with pytest.raises(ValueError, match="DITHER_ISA=sse9"):
        backend()


def test_one_openmp_library() -> None:
    """The extension must use the pool that torch has: two pools would fight for the cores. In a process of its own: other libraries of the tests
    bring pools too."""
    if extension() is None:
        pytest.skip("the C++ extension is not installed")
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc on this system")
    code = (
        "import torch; from dither.kernels import pack_rows; pack_rows(torch.zeros(64, 64, dtype=torch.uint8), 3)\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 1
