"""Every kernel test runs on every path that this build and processor have: the reference and each instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dither.kernels.extension import extension

ISAS = ("scalar", "avx2", "avx512")


def use(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """From here on, kernels run on ``path``; skips the test where there is no such path."""
    if path == "reference":
        monkeypatch.setenv("DITHER_KERNELS", "reference")
        return
    monkeypatch.delenv("DITHER_KERNELS", raising=False)
    monkeypatch.setenv("DITHER_ISA", path)
    native = extension()
    if native is None:
        pytest.skip("the C++ extension is not installed")
    try:
        native.isa(path)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=("reference", *ISAS))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``on("avx2")`` chooses a path in the middle of a test."""
    return lambda name: use(monkeypatch, name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
