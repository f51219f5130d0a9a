"""A recipe: which parts, in which order, on which scheme. It is data: hashable, printable, readable from YAML or JSON.

    Recipe(stages=[ScaleSearch(), OutputClip(), Columns()], weights=Int(4) @ group(64))

A paper's method is a small record (``recipes.AWQ``) that knows its knobs and gives its stages; methods compose by joining their stages:

    Chain(AWQ(bits=4, group=64, round=False), GPTQ(bits=4, group=64))
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from dither.errors import UsageError
from dither.formats import Int, Scheme, channel, group
from dither.quant.grids import MinMax
from dither.quant.parts import Grid, Part, Rounding, Transform
from dither.quant.rounding.nearest import Nearest


@dataclass(frozen=True)
class Recipe:
    """Parts plus the scheme they work towards, and what stays float.

    ``skip``: patterns (fnmatch, on full layer names) of layers that stay float. ``overrides``: pattern -> scheme for layers that get another
    one. By default everything outside the repeated blocks stays float (embeddings, head), and so do norms, and layers with
    fewer than ``min_outputs`` outputs (routers, gates): too few weights to save, and a routing error costs a whole expert.
    """

    stages: tuple[Part, ...]
    weights: Scheme
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Scheme], ...] = ()
    min_outputs: int = 16
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for part in self.stages:
            if not isinstance(part, Transform | Grid | Rounding):
                raise TypeError(f"stages: {part!r} is no transform, grid or rounding")
        for kind in (Grid, Rounding):
            found = [type(p).__name__ for p in self.stages if isinstance(p, kind)]
            if len(found) > 1:
                raise UsageError(
                    f"a recipe has one {kind.__name__.lower()}, but this one has {' and '.join(found)}: "
                    "the second would overwrite what the first chose; leave one out"
                )

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return tuple(p for p in self.stages if isinstance(p, Transform))

    @property
    def grid(self) -> Grid:
        return next((p for p in self.stages if isinstance(p, Grid)), MinMax())

    @property
    def rounding(self) -> Rounding:
        return next((p for p in self.stages if isinstance(p, Rounding)), Nearest())

    @property
    def uses_sites(self) -> bool:
        return any(p.uses_sites for p in self.stages)

    @property
    def needs_data(self) -> bool:
        return any(p.needs for p in self.stages) or bool(self.transforms)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "stages": [
                {"part": type(p).__name__, **{f.name: getattr(p, f.name) for f in fields(p)}} for p in self.stages
            ],
            "weights": self.weights.to_json(),
            "skip": list(self.skip),
            "overrides": {pattern: scheme.to_json() for pattern, scheme in self.overrides},
            "min_outputs": self.min_outputs,
        }


@dataclass(frozen=True, kw_only=True)
class Method:
    """The knobs that all methods share. ``weights`` replaces ``bits``, ``group`` and ``sym`` where more is wanted than integers."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    bits: int = 4
    group: int | None = 128  # None: one scale a row
    sym: str | bool = False
    scale: str = "float16"
    weights: Scheme | None = None
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Scheme] = field(default_factory=dict)

    def scheme(self) -> Scheme:
        if self.weights is not None:
            return self.weights
        return Int(self.bits, sym=self.sym, scale=self.scale) @ (channel() if self.group is None else group(self.group))

    @abstractmethod
    def stages(self) -> Sequence[Part]:
        """The parts in the order of the paper."""

    def recipe(self) -> Recipe:
        return Recipe(
            tuple(self.stages()), self.scheme(), tuple(self.skip), tuple(self.overrides.items()), name=self.name
        )


class Chain:
    """Methods one after the other: their parts joined. Their schemes must agree. Raises UsageError where they cannot be joined."""

    def __init__(self, *methods: Method) -> None:
        if not methods:
            raise UsageError("a chain needs at least one method")
        self.methods = methods
        self.name = "+".join(m.name for m in methods)
        schemes = {m.scheme() for m in methods}
        if len(schemes) > 1:
            raise UsageError(
                f"chain {self.name}: the methods ask for different schemes ({', '.join(map(str, schemes))})"
            )

    def recipe(self) -> Recipe:
        parts: list[Part] = [p for m in self.methods for p in m.stages()]
        grids = [p for p in parts if isinstance(p, Grid) and not isinstance(p, MinMax)]
        if len(grids) <= 1:
            parts = [p for p in parts if not isinstance(p, MinMax)]
        overrides = tuple(item for m in self.methods for item in m.overrides.items())
        skip = tuple(dict.fromkeys(s for m in self.methods for s in m.skip))
        return Recipe(tuple(parts), self.methods[-1].scheme(), skip, overrides, name=self.name)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.methods))})"


def as_recipe(recipe: Recipe | Method | Chain) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else recipe.recipe()
