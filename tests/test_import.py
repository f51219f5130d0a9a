"""``import dither`` is light, and what it promises is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import dither

HEAVY = {"torch", "transformers", "numpy", "safetensors", "gguf", "compressed_tensors", "psutil"}
VERBS = ["quantize", "eval", "compare", "inspect", "run", "export", "claims", "methods", "bessel", "demo"]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after ``code``."""
    shown = "import sys; print('\\n' + ' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{shown}"], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def fastest(*command: str, runs: int = 5) -> float:
    """Seconds of the fastest run: the others waited for the machine."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
        times.append(time.perf_counter() - started)
    return min(times)


def test_importing_dither_loads_nothing_heavy() -> None:
    assert not modules_after("import dither") & (HEAVY | {"pydantic", "rich", "typer", "yaml"})


def test_help_loads_nothing_heavy() -> None:
    call = "from dither.cli.main import main\ntry:\n    main({})\nexcept SystemExit: pass"
    assert not modules_after(call.format(["--help"])) & (HEAVY | {"pydantic", "rich"})


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb: str) -> None:
    call = f"from dither.cli.main import main\ntry:\n    main(['{verb}', '--help'])\nexcept SystemExit: pass"
    assert not modules_after(call) & HEAVY  # typer itself may bring pydantic


def test_times() -> None:
    """0.3 s and 0.5 s on an idle machine; three times that here, for machines that are not."""
    bare = fastest(sys.executable, "-c", "pass")
    assert fastest(sys.executable, "-c", "import dither") - bare < 0.9
    assert fastest(sys.executable, "-m", "dither.cli.main", "--help") - bare < 1.5


def test_every_public_name_is_there() -> None:
    for name in dither.__all__:
        assert getattr(dither, name) is not None
    assert dir(dither) == dither.__all__ and dither.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dither.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from dither import nonsense  # noqa: F401


def test_transformers_learns_of_us_whichever_is_imported_first() -> None:
    asked = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'dither' in m"
    load = "import transformers.modeling_utils"
    for code in (f"import dither\n{load}\n{asked}", f"{load}\nimport dither\n{asked}"):
        modules_after(code)
