"""transformers without what a process that only makes text never uses: torch's compiler, tensors that are spread over machines, and scipy.

They are a third of the time to the first token. transformers and torch load the compiler to mark functions that it is not to compile, and
transformers loads distributed tensors and scipy where they are installed. Here the marks are left out, and transformers is told that the others are
missing, which it takes in its stride. Whoever compiles something later gets torch's compiler as it is, but marks that were left out are not made up
for. Only for processes of our own: in that of a user all must be there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"
_ABSENT = ("is_scipy_available", "is_torch_distributed_available")  # functions of transformers.utils


class _Unmarked(ModuleType):
    """Stands for the compiler: its marks leave a function as it is."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark


def _mark(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _mark if function is None else function


class _Later:
    """The compiler's context for masks made by vmap: the real one, when it is used."""

    def __new__(cls) -> Any:
        sys.modules.pop(_INDEXING, None)
        if isinstance(sys.modules.get(_COMPILER), _Unmarked):
            del sys.modules[_COMPILER]
        return importlib.import_module(_INDEXING).TransformGetItemToIndex()


@contextmanager
def imports() -> Iterator[None]:
    """Within it, transformers is imported, and a model may be loaded. If transformers is there already, or cannot do without, it is as it is."""
    if _COMPILER in sys.modules or "transformers" in sys.modules:
        yield
        return
    import torch  # noqa: F401  # first: it has a compiler of its own to name

    indexing = ModuleType(_INDEXING)
    indexing.__dict__["TransformGetItemToIndex"] = _Later
    stand_ins: dict[str, ModuleType] = {_COMPILER: _Unmarked(_COMPILER), _INDEXING: indexing}
    sys.modules.update(stand_ins)
    try:
        try:
            _import()
        except Exception:  # another transformers, which needs more of them
            _forget(stand_ins)
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
                del sys.modules[name]
        yield
    finally:
        _forget(stand_ins)


def _import() -> None:
    from transformers import utils
    from transformers.utils import import_utils

    for name in _ABSENT:
        for module in (utils, import_utils):
            if hasattr(module, name):
                setattr(module, name, lambda: False)
    for name in ("modeling_utils", "masking_utils", "cache_utils"):
        importlib.import_module(f"transformers.{name}")


def _forget(stand_ins: dict[str, ModuleType]) -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
