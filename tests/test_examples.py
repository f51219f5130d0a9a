"""The examples run, and say what is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_boolean_interactions(capsys: pytest.CaptureFixture[str]) -> None:
    """The trees are found exactly: no interaction joins more inputs than a tree has levels, and coefficients are averages over all inputs."""
    example = load("boolean_interactions")
    found, ours, pairs = example.main(["--trees", "12"])
    assert found.complete and ours > 1 - 1e-12 and pairs < ours and found.bits().sum(axis=1).max() <= 3
    assert "interactions from" in capsys.readouterr().out
    f, names = example.ensemble(12, 0)
    used = np.flatnonzero(found.bits().any(axis=0))
    assert len(names) == 30 and 3 < len(used) <= 20
    bits = np.zeros((1 << len(used), 30), dtype=np.uint8)
    bits[:, used] = np.arange(1 << len(used))[:, None] >> np.arange(len(used)) & 1
    values = f(bits)
    for k, x in zip(found.bits()[:10], found.values[:10], strict=True):
        assert float((values * (1.0 - 2.0 * ((bits @ k) % 2))).mean()) == pytest.approx(x, abs=1e-10)


@pytest.mark.slow
def test_interactions_of_a_network() -> None:
    """Hidden patches of a digit: more of the network's log-odds than Lasso on pairs explains."""
    found, ours, pairs = load("boolean_interactions").main(["--model", "network"])
    assert found.n == 24 and ours > 0.99 and ours > pairs
