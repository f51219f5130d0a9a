"""A recipe: which parts, in which order, on which scheme. It is data: hashable, printable, readable from YAML or JSON.

    Recipe(stages=[ScaleSearch(), OutputClip(), Columns()], weights=Int(4) @ group(64))

A paper's method is a small record (``recipes.AWQ``) that knows its knobs and gives its stages; methods compose by joining their stages:

    Chain(AWQ(bits=4, group=64, round=False), GPTQ(bits=4, group=64))
"""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from dither.errors import UsageError
from dither.formats import Blocks, Int, Scheme, WeightScheme, channel, group, named_format, named_scheme, token
from dither.graph import Layer
from dither.quant.grids import MinMax
from dither.quant.parts import BlockRounding, Grid, ModelStage, Part, Rounding, Transform
from dither.quant.rounding.nearest import Nearest


@dataclass(frozen=True)
class Recipe:
    """Parts plus the scheme they work towards, and what stays float.

    ``skip``: patterns (fnmatch, on full layer names) of layers that stay float. ``overrides``: pattern -> scheme for layers that get another
    one. By default everything outside the repeated blocks stays float (embeddings, head), and so do norms, and layers with
    fewer than ``min_outputs`` outputs (routers, gates): too few weights to save, and a routing error costs a whole expert. ``embeddings``: scheme
    of embedding tables outside the blocks (and so of a head that is tied to one); None: float.
    """

    stages: tuple[Part, ...]
    weights: WeightScheme
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, WeightScheme], ...] = ()
    min_outputs: int = 16
    name: str = "custom"
    inputs: Scheme | None = None
    kv: Scheme | None = None
    embeddings: Scheme | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for part in self.stages:
            if not isinstance(part, ModelStage | Transform | Grid | Rounding):
                raise TypeError(f"stages: {part!r} is no model stage, transform, grid or rounding")
        for kind in (Grid, Rounding):
            found = [type(p).__name__ for p in self.stages if isinstance(p, kind)]
            if len(found) > 1:
                raise UsageError(
                    f"a recipe has one {kind.__name__.lower()}, but this one has {' and '.join(found)}: "
                    "the second would overwrite what the first chose; leave one out"
                )
        for scheme in (self.weights, *(s for _, s in self.overrides)):
            why = self.rounding.refuses(scheme)
            if why is None and not isinstance(scheme, Scheme) and any(isinstance(p, Grid) and not isinstance(p, MinMax) for p in self.stages):
                why = f"{type(self.grid).__name__} chooses a grid of numbers, but the weights are stored as {scheme}"
            if why is not None:
                raise UsageError(f"recipe {self.name}: {why}; choose a method that rounds to it, or another scheme")
        grids = [type(p).__name__ for p in self.stages if isinstance(p, Grid) and not isinstance(p, MinMax)]
        if self.rounding.own_grid and grids:
            raise UsageError(
                f"recipe {self.name}: {type(self.rounding).__name__} searches scales itself, so what {grids[0]} chooses would be lost; leave it out"
            )
        for what, rows in (("inputs", self.inputs), ("kv", self.kv)):
            if rows is not None and (not rows.dynamic or rows.blocks.height != 1):
                raise UsageError(f"recipe {self.name}: {what}: {rows} must be dynamic and in blocks of one row (token, group)")
        if self.kv is not None and self.kv.tensor_scale:
            raise UsageError(f"recipe {self.name}: kv: {self.kv} has a scale of the whole tensor, which a growing cache has not")

    @property
    def model_stages(self) -> tuple[ModelStage, ...]:
        return tuple(p for p in self.stages if isinstance(p, ModelStage))

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
    def rounds_on_float(self) -> bool:
        """Whether layers are rounded on the float model's activations."""
        return bool(self.rounding.needs) and self.rounding.float_inputs

    @property
    def uses_float_stream(self) -> bool:
        """Whether calibration data goes through the float model."""
        grid_alone = bool(self.grid.needs) and not self.rounding.needs
        return bool(self.transforms) or grid_alone or isinstance(self.rounding, BlockRounding) or self.rounds_on_float

    @property
    def uses_rounded_stream(self) -> bool:
        """Whether calibration data goes through the model as rounded so far."""
        return isinstance(self.rounding, BlockRounding) or (bool(self.rounding.needs) and not self.rounds_on_float)

    def scheme_of(self, name: str, layer: Layer) -> WeightScheme | None:
        """What the layer of a block, of the full name ``name``, is stored as; None: it stays float."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        own = next((scheme for pattern, scheme in self.overrides if fnmatch.fnmatchcase(name, pattern)), None)
        if own is None and (layer.is_head or layer.routes or layer.out_features < self.min_outputs):
            return None
        return own or self.weights

    @property
    def uses_sites(self) -> bool:
        return any(p.uses_sites for p in self.stages)

    @property
    def needs_data(self) -> bool:
        wants = any(isinstance(p, BlockRounding) or (isinstance(p, ModelStage) and p.needs_batches) for p in self.stages)
        return wants or any(p.needs for p in self.stages) or bool(self.transforms)

    def to_json(self) -> dict[str, Any]:
        given = (("inputs", self.inputs), ("kv", self.kv), ("embeddings", self.embeddings))
        rows = {what: scheme.to_json() for what, scheme in given if scheme is not None}
        return rows | {
            "name": self.name,
            "stages": [
                {"part": type(p).__name__, **{f.name: _plain(getattr(p, f.name)) for f in fields(p)}} for p in self.stages
            ],
            "weights": self.weights.to_json(),
            "skip": list(self.skip),
            "overrides": {pattern: scheme.to_json() for pattern, scheme in self.overrides},
            "min_outputs": self.min_outputs,
        }


@dataclass(frozen=True, kw_only=True)
class Method:
    """The knobs that all methods share.

    ``format``: "int"; "fp4" (e2m1), "fp8" (e4m3), any "eXmY" under one scale a group; "mxfp4" and "nvfp4", which have groups and scales of their
    own. Floats have the bits of their name: ``bits`` is left out, or says the same. ``act_format``: the same for the layers' inputs.
    ``weights`` replaces ``format``, ``bits``, ``group``, ``sym`` and ``scale`` where more is wanted.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    unused: ClassVar[frozenset[str]] = frozenset()  # shared knobs that mean nothing to the method: they are hidden, and refused

    bits: int = 4
    group: int | None = 128  # None: one scale a row
    sym: str | bool = False
    scale: str = "float16"
    format: str = "int"
    weights: WeightScheme | None = None
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, WeightScheme] = field(default_factory=dict)
    act_bits: int | None = None  # of the layers' inputs at run time; None: float
    act_group: int | None = None  # inputs that share a scale; None: one a token
    act_format: str = "int"  # of the inputs; a float format says their bits too
    kv_bits: int | None = None  # of cached keys and values, one scale a token and head; None: float

    def scheme(self) -> WeightScheme:
        if self.weights is not None:
            if self.format != "int":
                raise ValueError(f"format: weights={self.weights} says it, so {self.format!r} must be left out")
            return self.weights
        if self.format == "int":
            return Int(self.bits, sym=self.sym, scale=self.scale) @ (channel() if self.group is None else group(self.group))
        default = type(self)
        if self.sym != default.sym:
            raise ValueError(f"sym: is of integers; format {self.format!r} is symmetric by itself, so leave it out")
        if named_scheme(self.format) is not None and self.scale != default.scale:
            raise ValueError(f"scale: format {self.format!r} has scales of its own, so leave it out")
        blocks = channel() if self.group is None else group(self.group)
        bits = None if self.bits == default.bits else self.bits
        return _floats(self.format, bits, None if self.group == default.group else self.group, blocks, self.scale)

    @property
    def stores(self) -> bool:
        """Whether what weights are stored as matters to it; in a chain, methods to which it does not follow the others."""
        return True

    @abstractmethod
    def stages(self) -> Sequence[Part]:
        """The parts in the order of the paper."""

    def inputs(self) -> Scheme | None:
        """How the layers' inputs are rounded at run time, anew for each token: asymmetric integers, or floats."""
        blocks = token() if self.act_group is None else group(self.act_group)
        if self.act_format != "int":
            default = type(self)
            bits = None if self.act_bits == default.act_bits else self.act_bits
            size = None if self.act_group == default.act_group else self.act_group
            return replace(_floats(self.act_format, bits, size, blocks, prefix="act_"), dynamic=True)
        if self.act_bits is None and self.act_group is not None:
            raise ValueError(f"act_group: {self.act_group} is of few-bit inputs, so it needs act_bits or act_format")
        return None if self.act_bits is None else replace(Int(self.act_bits) @ blocks, dynamic=True)

    def kv(self) -> Scheme | None:
        """How keys and values are rounded: asymmetric integers, anew for each token and head."""
        return None if self.kv_bits is None else replace(Int(self.kv_bits) @ token(), dynamic=True)

    def embeddings(self) -> Scheme | None:
        """The scheme of embedding tables; None: float."""
        return None

    def recipe(self) -> Recipe:
        for f in fields(self):
            if f.name in self.unused and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}: {self.name} has no such knob, so {getattr(self, f.name)!r} must be left out")
        for knob, verb in (("format", "scheme"), ("act_format", "inputs")):
            if getattr(self, knob) != "int" and getattr(type(self), verb) is not getattr(Method, verb):
                raise ValueError(f"{knob}: {self.name} chooses it itself, so it must be left out, not {getattr(self, knob)!r}")
        return Recipe(
            tuple(self.stages()),
            self.scheme(),
            tuple(self.skip),
            tuple(self.overrides.items()),
            name=self.name,
            inputs=self.inputs(),
            kv=self.kv(),
            embeddings=self.embeddings(),
        )


def _plain(knob: Any) -> Any:
    """A part's knob as plain data: records of knobs say their type too."""
    if not is_dataclass(knob) or isinstance(knob, type):
        return knob
    return {"kind": type(knob).__name__, **{f.name: _plain(getattr(knob, f.name)) for f in fields(knob)}}


def _floats(name: str, bits: int | None, size: int | None, blocks: Blocks, scale: str = "float16", *, prefix: str = "") -> Scheme:
    """The float format ``name`` on ``blocks``; ``bits`` and ``size`` (of a group) are what the user gave, None where nothing.

    Raises ValueError, naming the knob (after ``prefix``), where they do not fit the name.
    """
    try:
        form = named_format(name, scale)
    except ValueError as error:
        raise ValueError(f"{prefix}format: {error}") from None
    if bits not in (None, form.bits):
        raise ValueError(f"{prefix}bits: {name} has {form.bits} bits, not {bits}; leave {prefix}bits out")
    whole = named_scheme(name)
    if whole is None:
        return form @ blocks
    if size not in (None, whole.blocks.width):
        raise ValueError(f"{prefix}group: {name} has groups of {whole.blocks.width}, not {size}; leave {prefix}group out")
    return whole


class Chain:
    """Methods one after the other: their parts joined. Their schemes must agree. Raises UsageError where they cannot be joined."""

    def __init__(self, *methods: Method) -> None:
        if not methods:
            raise UsageError("a chain needs at least one method")
        self.methods = methods
        self.name = "+".join(m.name for m in methods)
        last = methods[-1].scheme()  # where it is no grid, what others search on only stands in for it
        schemes = {m.scheme() for m in methods if m.stores and (isinstance(last, Scheme) or m is methods[-1])}
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
        last = self.methods[-1]
        return Recipe(
            tuple(parts),
            last.scheme(),
            skip,
            overrides,
            name=self.name,
            inputs=self._agreed("inputs", [m.inputs() for m in self.methods]),
            kv=self._agreed("kv", [m.kv() for m in self.methods]),
            embeddings=last.embeddings(),
        )

    def _agreed(self, what: str, schemes: Sequence[Scheme | None]) -> Scheme | None:
        """The one scheme that methods ask for; those that ask for none follow."""
        found = {scheme for scheme in schemes if scheme is not None}
        if len(found) > 1:
            raise UsageError(f"chain {self.name}: {what}: the methods ask for different schemes ({', '.join(map(str, found))})")
        return found.pop() if found else None

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.methods))})"


def as_recipe(recipe: Recipe | Method | Chain) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else recipe.recipe()
