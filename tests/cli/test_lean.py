"""What `dither run` leaves out of its imports, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dither
import tiny_folder

LEFT_OUT = ("torch._dynamo", "torch.distributed.tensor", "scipy")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_leaves_the_compiler_out_and_says_the_same(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "float")
    dither.quantize(str(tmp_path / "float"), dither.recipes.RTN(bits=4, group=16), out=tmp_path / "few")
    model, tokenizer = dither.load(tmp_path / "few")
    from dither.quant.generate import Sampling, generate

    expected = generate(model, tokenizer, "few bits", Sampling(max_tokens=24)).text
    code = f"""
import sys
from dither.cli.main import main
try:
    main(["run", {str(tmp_path / "few")!r}, "few bits", "--max-tokens", "24"])
except SystemExit as end:
    assert not end.code
print([name for name in {LEFT_OUT!r} if name in sys.modules])
"""
    shown = fresh(code)
    assert shown == f"{expected}\n[]\n"


def test_what_is_compiled_later_finds_the_compiler() -> None:
    shown = fresh("""
import sys
from dither.cli import lean
with lean.imports():
    import transformers.masking_utils as masks
    assert sys.modules["torch._dynamo"].disable(len) is len
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
import torch
with masks.TransformGetItemToIndex():
    x = torch.arange(3)
    print(torch.vmap(lambda i: x[i])(torch.tensor([2, 0])).tolist())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist(), torch._dynamo.__name__)
""")
    assert shown == "[2, 0]\n[2.0, 2.0] torch._dynamo\n"


def test_another_transformers_is_imported_as_it_is() -> None:
    """One that takes more of the compiler than marks."""
    shown = fresh("""
import importlib, sys
from dither.cli import lean
found = importlib.import_module
lean.importlib.import_module = lambda name, *a: found("torch._dynamo.symbolic_convert" if name.endswith("masking_utils") else name, *a)
with lean.imports():
    lean.importlib.import_module = found
    import transformers.masking_utils as masks
    print(sys.modules["torch._dynamo"].__class__.__name__, masks.TransformGetItemToIndex.__module__)
""")
    assert shown == "module torch._dynamo._trace_wrapped_higher_order_op\n"
