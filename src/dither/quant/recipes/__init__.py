"""The methods, by name; and recipes written as names, as options, or as a YAML or JSON file.

build("awq+gptq", {"bits": 4, "group": 64})      as the command line does
read("recipe.yaml")                              {method: gptq, bits: 3, group: 64, clip: output}  or  {chain: [{...}, {...}]}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from dither.errors import UsageError
from dither.formats import WeightScheme, scheme_from_json
from dither.quant.recipe import Chain, Method, Recipe
from dither.quant.recipes.adaround import AdaRound
from dither.quant.recipes.awq import AWQ
from dither.quant.recipes.flexround import FlexRound
from dither.quant.recipes.gptq import GPTQ
from dither.quant.recipes.llm_fp4 import LLMFP4
from dither.quant.recipes.ostquant import OSTQuant
from dither.quant.recipes.pb_llm import PBLLM
from dither.quant.recipes.quarot import QuaRot
from dither.quant.recipes.repq_vit import RepQViT
from dither.quant.recipes.rtn import RTN
from dither.quant.recipes.smoothquant import SmoothQuant
from dither.quant.recipes.vptq import VPTQ

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (RTN, GPTQ, AWQ, SmoothQuant, LLMFP4, RepQViT, PBLLM, VPTQ, AdaRound, FlexRound, QuaRot, OSTQuant)
}
__all__ = [
    "AWQ",
    "GPTQ",
    "LLMFP4",
    "METHODS",
    "PBLLM",
    "RTN",
    "VPTQ",
    "AdaRound",
    "Chain",
    "FlexRound",
    "Method",
    "OSTQuant",
    "QuaRot",
    "Recipe",
    "RepQViT",
    "SmoothQuant",
    "build",
    "knobs",
    "read",
]


def find(name: str) -> type[Method]:
    """The method called ``name``. Raises UsageError that suggests the nearest name."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"method {name!r}: is unknown; {hint}The methods are {', '.join(sorted(METHODS))}, joined by '+'")


def knobs(name: str) -> dict[str, tuple[Any, Any]]:
    """Each knob of a method: its type and its default."""
    method = find(name)
    hints = get_type_hints(method)
    return {f.name: (hints[f.name], f.default if f.default is not MISSING else None) for f in _fields(method)}


def has(methods: str, knob: str) -> bool:
    """Whether one of the methods, joined by "+", has such a knob."""
    return any(knob in knobs(name.strip()) for name in methods.split("+"))


def _fields(method: type[Method]) -> list[Field[Any]]:
    """The method's knobs: not those of `Method` that mean nothing to it."""
    return [f for f in fields(method) if f.name not in method.unused]


def build(methods: str, options: Mapping[str, Any] | None = None) -> Method | Chain:
    """``"gptq"`` or ``"awq+gptq"`` with the options that its methods know. In a chain only the last method rounds, and an option goes to
    every method that has it. Raises UsageError for unknown methods and options, and for values out of range."""
    names = [n.strip() for n in methods.split("+")]
    classes = [find(n) for n in names]
    options = dict(options or {})
    known = [{f.name for f in _fields(c)} for c in classes]
    for key in options:
        if not any(key in k for k in known):
            near = difflib.get_close_matches(key, sorted(set().union(*known)), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(set().union(*known)))}"
            raise UsageError(f"option {key!r}: method {methods!r} has no such knob{hint}")
    built = []
    for i, (cls, names_known) in enumerate(zip(classes, known, strict=True)):
        own = {k: v for k, v in options.items() if k in names_known}
        if i < len(classes) - 1:
            if "round" not in names_known:
                raise UsageError(
                    f"method {methods!r}: {cls.name} rounds the weights, so nothing can follow it; put it last"
                )
            own["round"] = False
        built.append(_make(cls, own))
    return built[0] if len(built) == 1 else Chain(*built)


def _make(cls: type[Method], values: Mapping[str, Any], where: str = "") -> Method:
    """Check each value against its field's type, and name the field that is wrong."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints or key not in {f.name for f in _fields(cls)}:
            near = difflib.get_close_matches(key, [f.name for f in _fields(cls)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{where}{key}: {cls.name} has no such field{hint}")
        try:
            if key == "weights" and isinstance(value, Mapping):
                value = scheme_from_json(dict(value))
            if key == "overrides" and isinstance(value, Mapping):
                value = {p: s if isinstance(s, WeightScheme) else scheme_from_json(dict(s)) for p, s in value.items()}
            adapter: TypeAdapter[Any] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{where}{key}: {value!r} is not valid: {error.errors()[0]['msg'].lower()}") from None
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{where}{key}: {error}") from None
    try:
        method = cls(**checked)
        method.recipe()
        return method
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}{error}") from None


def read(path: str | Path) -> Method | Chain:
    """A recipe file (YAML or JSON). Raises UsageError that names the file and the field that is wrong."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path}: is no valid {'JSON' if path.suffix == '.json' else 'YAML'} ({str(error).splitlines()[0]})"
        ) from None
    return parse(data, f"{path}: ")


def parse(data: Any, where: str = "") -> Method | Chain:
    """A recipe from plain data: ``{"method": name, **knobs}`` or ``{"chain": [...]}``."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}a recipe is a mapping with 'method' or 'chain', not {type(data).__name__}")
    if "chain" in data:
        if set(data) != {"chain"} or not isinstance(data["chain"], list) or not data["chain"]:
            raise UsageError(f"{where}chain: must be a list of recipes, and stand alone")
        methods = [parse(item, f"{where}chain[{i}].") for i, item in enumerate(data["chain"])]
        singles = [m for m in methods if isinstance(m, Method)]
        if len(singles) < len(methods):
            raise UsageError(f"{where}chain: each item is one method; list joined ones one by one")
        try:
            chain = Chain(*singles)
            chain.recipe()
            return chain
        except UsageError as error:
            raise UsageError(f"{where}chain: {error}") from None
    if not isinstance(data.get("method"), str):
        raise UsageError(f"{where}method: is missing; it is one of {', '.join(sorted(METHODS))}")
    values = {k: v for k, v in data.items() if k != "method"}
    try:
        if "+" in data["method"]:
            return build(data["method"], values)
        method = find(data["method"])
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None
    return _make(method, values, where)
