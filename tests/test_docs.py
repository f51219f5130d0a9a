"""The documents say only what works: commands are run or parsed, Python compiles and names what exists, links lead somewhere.

A fenced ``sh`` block with ``<!-- run -->`` on the line before is executed in an empty folder; any other is parsed by the command line's own
parser, without executing it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dither.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
RUN = "<!-- run -->"
# there once something was measured; see tests/test_figures.py
GENERATED = {"docs/plot.svg", "docs/claims.md", "docs/softmax.svg", "docs/log_bessel.svg"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether it is marked to be run."""

    where: str
    language: str
    text: str
    run: bool


def blocks(text: str, name: str = "document") -> Iterator[Block]:
    """The fenced blocks of a Markdown text. Raises ValueError for one that never ends."""
    lines, start, fence = text.split("\n"), -1, ""
    for i, line in enumerate(lines):
        found = re.match(r" {0,3}(`{3,}|~{3,})\s*(\w*)", line)
        if not fence and found:
            start, fence, language = i, found[1], found[2]
        elif fence and line.strip() == fence:
            before = lines[start - 1].strip() if start else ""
            yield Block(f"{name}:{start + 1}", language, "\n".join(lines[start + 1 : i]), before == RUN)
            fence = ""
    if fence:
        raise ValueError(f"{name}:{start + 1}: the block has no end")


ALL = [
    block for path in DOCUMENTS for block in blocks(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
]


def chosen(language: str, run: bool = False) -> list[Any]:
    return [pytest.param(b, id=b.where) for b in ALL if b.language == language and b.run == run]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words; continued lines are joined, comments left out."""
    lines = text.replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Parse a command as far as that goes without running it. Raises an exception that says what is wrong."""
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        for target in (w for w in words[1:] if "=" not in w and not w.startswith("-")):
            assert target in targets, f"make {target}: there is no such target"
    elif program == "python" and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{words[1]}: there is no such file"
    elif program == "dither":
        parse(words[1:])


def parse(words: list[str]) -> None:
    """What the command line does with its arguments before a verb runs."""
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("dither", list(words)) as context:
            name, verb, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            verb.make_context(name, rest, parent=context)
    except typer.Exit:  # --version and --help say something and stop
        return


# -- shell -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", chosen("sh"))
def test_commands_are_accepted(block: Block) -> None:
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("block", chosen("sh", run=True))
def test_marked_commands_run(block: Block, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(tmp_path / "data")}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{block.where}: {ran.stderr[-500:]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_verbs_in_running_text_exist(path: Path) -> None:
    prose = re.sub(r"^(```|~~~).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, rest in re.findall(r"`dither ([a-z]+)([^`]*)`", prose):
        assert verb in verbs, f"{path.name}: dither {verb}"
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest):
            assert option in known, f"{path.name}: dither {verb} has no {option}"


def test_examples_of_help_are_accepted() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, verb in verbs.items():
        found = re.findall(r"Example: (dither .*)", verb.help or "")
        assert found, f"dither {name}: its help has no example"
        for line in found:
            check_command(shlex.split(line))


# -- Python --------------------------------------------------------------------------------------------------------------------


def check_python(text: str) -> None:
    """Compile ``text`` and look up every name that it takes from dither, and every keyword that it gives to one."""
    tree = ast.parse(text)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dither":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                names[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dither":
                    module = importlib.import_module(alias.name)
                    names[alias.asname or "dither"] = module if alias.asname else importlib.import_module("dither")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        if isinstance(node, ast.Call) and (function := resolve(node.func, names)) is not None:
            known = inspect.signature(function).parameters
            loose = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
            for keyword in node.keywords:
                assert loose or keyword.arg in known, f"{ast.unparse(node.func)} has no argument {keyword.arg}"


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that ``a.b.c`` is, or None where it does not come from dither. Fails for an attribute that does not exist."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        assert hasattr(owner, node.attr), f"{ast.unparse(node)} does not exist"
        return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("block", chosen("python"))
def test_python_compiles_and_names_exist(block: Block) -> None:
    compile(block.text, block.where, "exec")
    check_python(block.text)


# -- links ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target = (path.parent / link).resolve()
        assert target.exists() or str(target.relative_to(ROOT)) in GENERATED, f"{path.name}: {link}"


# -- the checks themselves -------------------------------------------------------------------------------------------------------


def test_documents_have_blocks_to_check() -> None:
    assert {"sh", "python"} <= {block.language for block in ALL}
    assert any(block.run for block in ALL)


@pytest.mark.parametrize(
    "line",
    [
        "dither quantise smollm2 -o out",
        "dither quantize smollm2 --bit 4 -o out",
        "dither quantize smollm2 --bits four -o out",
        "dither quantize",
        "make everything",
        "python benchmarks/nothing.py",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises(Exception, match=r"\w"):
        check_command(shlex.split(line))


@pytest.mark.parametrize(
    "text",
    [
        "import dither\ndither.quantise('m')",
        "from dither.formats import Integer",
        "from dither.quant.recipes import AWQ\nAWQ(bit=4)",
        "import dither as d\nd.recipes.GTPQ()",
    ],
)
def test_wrong_names_are_found(text: str) -> None:
    with pytest.raises((AssertionError, ImportError)):
        check_python(text)


def test_blocks_are_read() -> None:
    text = "a\n```sh\nx \\\n  y # no\n```\n<!-- run -->\n````sh\n```\n````\n"
    first, second = blocks(text)
    assert commands(first.text) == [["x", "y"]] and not first.run
    assert second.text == "```" and second.run
    with pytest.raises(ValueError, match="no end"):
        list(blocks("```sh\nx"))
