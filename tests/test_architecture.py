"""The rules of docs/architecture.md that a machine can check: imports only go down, and no architecture is named."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dither"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)


def folder_of(path: Path) -> str:
    """``quant`` for ``quant/rounding/columns.py``, ``errors`` for ``errors.py``."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name, below dither, of everything imported from dither, wherever the statement stands."""
    package = ["dither", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "dither" else [module]
        else:
            continue
        for name in names:
            if name.startswith("dither."):
                yield node.lineno, name.removeprefix("dither.").split(".")[0]


def test_the_document_lists_the_folders() -> None:
    assert LAYERS[0] == "cli" and LAYERS[-1] == "errors" and len(LAYERS) == len(set(LAYERS))
    found = {folder_of(f) for f in FILES if f.stat().st_size > 0} - {"__init__"}
    assert found == set(LAYERS), "docs/architecture.md and src/dither disagree about the folders"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_go_down(path: Path) -> None:
    own = folder_of(path)
    if own == "__init__":  # the public names come from everywhere
        return
    below = LAYERS[LAYERS.index(own) + 1 :] if own in LAYERS else []
    for line, name in imports(ast.parse(path.read_text()), path):
        if name == own or name in below:
            continue
        allowed = name not in LAYERS and own == "cli"  # ``import dither`` and its public names
        assert allowed, f"{path.relative_to(ROOT)}:{line}: {own}/ imports {name}, which is not below it"


def test_the_check_sees_every_kind_of_import() -> None:
    code = "import dither.cli\nfrom dither import quant\nfrom dither.graph.sites import x\ndef f():\n from ..models import y\n from .. import formats"
    assert [n for _, n in imports(ast.parse(code), SOURCE / "kernels" / "x.py")] == [
        "cli",
        "quant",
        "graph",
        "models",
        "formats",
    ]


# -- no architecture is named ------------------------------------------------------------------------------------------------

NAMES = (
    "llama|alpaca|vicuna|mistral|mixtral|qwen|gemma|gpt|gptj|neox|phi|opt|bloom|falcon|stablelm|olmo|granite|deepseek|cohere|mamba|rwkv|bert|"
    "roberta|vit|deit|swin|convnext|resnet|bart|whisper|wav2vec|starcoder|codegen|mpt|baichuan|internlm|yi|glm|chatglm"
)
NAMED = re.compile(rf"(?<![a-z])({NAMES})(?![a-z])|(?<![a-z0-9])t5(?![a-z0-9])", re.IGNORECASE)
PARTS = re.compile(
    r"(?<![a-z])(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|c_attn|c_fc|self_attn|input_layernorm|embed_tokens|wte)(?![a-z])"
)

# Where such a word is no knowledge of an architecture, and why.
EXCUSED = {
    ("models/gguf_file.py", "llama"): "llama.cpp, the program that defines the GGUF format",
    ("cli/export.py", "llama"): "llama.cpp",
    ("quant/export/gguf.py", "llama"): "llama.cpp, the program that defines the GGUF format",
    ("quant/export/gguf_blocks.py", "llama"): "llama.cpp",
    ("quant/export/gguf_metadata.py", "llama"): "llama.cpp",
    ("quant/export/gguf_tokenizer.py", "llama"): "llama.cpp, and its names of ways to cut text",
    ("quant/export/gguf_tokenizer.py", "gpt"): "llama.cpp's names of byte-level BPE and of a way to cut text",
    ("models/fashion.py", "vit"): "the alias of the embedded vision model, its folder and its inputs",
    ("models/opening.py", "vit"): "the alias of the embedded vision model",
    ("report/speed.py", "llama"): "llama.cpp",
    ("report/records.py", "up_proj"): "a docstring shows what a layer's full name looks like",
    ("quant/recipes/__init__.py", "vit"): "the name of a paper's method",
    ("quant/recipes/repq_vit.py", "vit"): "the name of a paper's method",
    ("claims/__init__.py", "vit"): "the name of a paper's method",
    ("claims/repq_vit.py", "vit"): "the name of a paper's method, the alias of the embedded vision model, the models of the paper's own table",
    ("claims/repq_vit.py", "deit"): "the models of the paper's own table",
    ("claims/awq.py", "llama"): "the model of the paper's own table",
    ("claims/gptq.py", "llama"): "the model of the paper's own table",
    ("claims/vptq.py", "llama"): "the model of the paper's own table",
    ("claims/llm_fp4.py", "llama"): "the model of the paper's own table",
    ("claims/ostquant.py", "llama"): "the model of the paper's own table",
}


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Names, strings and comments of a file, docstrings included, that say an architecture or one of its layers."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT) or token.type == getattr(
            tokenize, "FSTRING_MIDDLE", -1
        ):
            for found in (*NAMED.finditer(token.string), *PARTS.finditer(token.string)):
                yield token.start[0] + token.string[: found.start()].count("\n"), found.group().lower()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_architecture_is_named(path: Path) -> None:
    name = path.relative_to(SOURCE).as_posix()
    for line, word in words(path):
        assert (name, word) in EXCUSED, (
            f"src/dither/{name}:{line}: names {word!r}; dither discovers structure, it knows no architecture"
        )


def test_excuses_are_needed() -> None:
    used = {(p.relative_to(SOURCE).as_posix(), word) for p in FILES for _, word in words(p)}
    assert set(EXCUSED) <= used


def test_the_check_finds_names(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        '"""About\nLlama."""\nif isinstance(m, GPT2Model) or "q_proj" in n or kind == "gpt_neox":  # OPT-125m\n    t5 = f"{n}.mlp.up_proj"\n'
    )
    assert {w for _, w in words(tmp_path / "x.py")} == {"llama", "gpt", "q_proj", "neox", "opt", "t5", "up_proj"}
    (tmp_path / "x.py").write_text("options = option + adopted.optimizer + invite + philosophy; bits25 = yield_\n")
    assert not list(words(tmp_path / "x.py"))
