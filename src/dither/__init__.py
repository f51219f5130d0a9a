"""dither makes neural networks few-bit, cheap and robust, and writes checkpoints that other people's runtimes load.

    import dither
    q = dither.quantize("smollm2", dither.recipes.AWQ(bits=4, group=64), calibration=texts, out="smollm2-w4")

Importing this package is cheap: everything below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from dither import claims, errors, formats, graph, kernels, models, quant, report
    from dither.models import load as load_float
    from dither.quant import accuracy, load, perplexity, quantize, recipes
    from dither.quant.export import export

    __version__: str

_MODULES = ("claims", "errors", "formats", "graph", "kernels", "models", "quant", "report")
_NAMES = {
    "quantize": "dither.quant",
    "accuracy": "dither.quant",
    "perplexity": "dither.quant",
    "recipes": "dither.quant",
    "load": "dither.quant",
    "export": "dither.quant.export",
    "load_float": "dither.models",
}
__all__ = [
    "__version__",
    "accuracy",
    "claims",
    "errors",
    "export",
    "formats",
    "graph",
    "kernels",
    "load",
    "load_float",
    "models",
    "perplexity",
    "quant",
    "quantize",
    "recipes",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dither.{name}")
    if name in _NAMES:
        module = importlib.import_module(_NAMES[name])
        value = getattr(module, "load" if name == "load_float" else name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dither")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module 'dither' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _register(module: Any) -> None:
    from dither.quant.hf import register

    register()


# transformers learns of dither's checkpoints the moment it is imported, and not before
wrapt.when_imported("transformers.modeling_utils")(_register)
