"""What a process sets for itself before long work."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import os, gc, sys
from dither import process
process.prepare_for_long_work()
print(os.environ["OMP_WAIT_POLICY"], gc.get_threshold()[0], "torch" in sys.modules)
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_what_the_user_set_stands(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert found == [expected, "20000", "False"]
