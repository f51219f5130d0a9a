"""A `Source`: a model whose weights are read when asked for, tensor by tensor, block by block."""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError, ModelError


class NoTokenizer(ModelError):
    """The model comes without a tokenizer (as models of images do)."""


class Source(ABC):
    """Names are those of the module's ``state_dict``: parameters and persistent buffers, tied names included.

    ``name``: what the user called it. ``config``: the transformers config, or None for a module that has none.
    ``dtype``: the floating type that most weights are stored in. ``tied``: alias -> the name whose tensor it shares.
    ``notes``: what the user should know, one line each. ``generation_config``: transformers' record, or None.
    """

    name: str
    config: Any
    dtype: torch.dtype
    tied: Mapping[str, str]
    notes: list[str]
    generation_config: Any

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Raises KeyError for a name that the model does not have."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The type the tensor is stored in (what the stored type decodes to, where it is packed)."""

    @abstractmethod
    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A tensor in memory of its own."""

    @abstractmethod
    def skeleton(self, attn_implementation: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        """The module with meta parameters and real buffers, in eval mode. Parameters have the type they are stored in;
        with ``dtype`` the type that the model's constructor gives them under that default type."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once. Raises NoTokenizer where there is none, ModelError where it is damaged."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that stay the same for the same weights, wherever they lie."""

    @abstractmethod
    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        """Files to put beside the weights of a derived checkpoint: tokenizer, generation settings; ``(name,
        content)``."""

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, check_finite: bool = False) -> Tensor:
        """One tensor, converted to ``dtype`` if it is floating. The caller owns its memory.

        Raises KeyError for an unknown name; CheckpointError with ``check_finite`` where a value is NaN or infinite.
        """
        floating = self.dtype_of(name).is_floating_point
        read = self._read(name, dtype if floating else None)
        if check_finite and floating:
            require_finite(read, name, self.name)
        return read

    def fill(
        self,
        module: nn.Module,
        prefix: str = "",
        *,
        dtype: torch.dtype | None = None,
        except_prefixes: Sequence[str] = (),
        check_finite: bool = True,
    ) -> None:
        """Read the parameters and persistent buffers of ``module`` (the submodule ``prefix`` of the skeleton).

        Floating tensors become ``dtype`` (None: the type they have in ``module``). Submodules named in
        ``except_prefixes`` (full names) stay as they are. Parameters shared inside ``module`` are read once and stay
        shared. Raises CheckpointError for a weight with NaN or infinity.
        """
        for names, old, write in slots(module, prefix):
            if all(_inside(name, except_prefixes) for name in names):
                continue
            if isinstance(old, nn.Parameter):
                wanted = (dtype or old.dtype) if old.is_floating_point() else None
                value = self.tensor(names[0], wanted, check_finite=check_finite)
                write(nn.Parameter(value, requires_grad=old.requires_grad))
            elif self.has(names[0]):
                write(self.tensor(names[0], dtype or old.dtype))

    def has(self, name: str) -> bool:
        """Whether the weights hold this tensor (buffers may be missing: the constructor's value stands)."""
        try:
            self.dtype_of(name)
        except KeyError:
            return False
        return True

    def release(self, module: nn.Module) -> None:
        """Give the memory of a filled module back: its parameters become meta tensors again. Buffers stay."""
        empty(module)


Slot = tuple[list[str], Tensor, Callable[[Tensor], None]]


def slots(module: nn.Module, prefix: str) -> Iterable[Slot]:
    """Each distinct parameter and persistent buffer of ``module``: its full names, itself, and a function that replaces
    it under all of them."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for path, part in module.named_modules(prefix=prefix):
        dot = f"{path}." if path else ""
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and key not in part._non_persistent_buffers_set:
                owners.setdefault(id(tensor), []).append((part, key, dot + key))
                tensors[id(tensor)] = tensor

    def writer(places: list[tuple[nn.Module, str, str]]) -> Callable[[Tensor], None]:
        def write(value: Tensor) -> None:
            for part, key, _ in places:
                if isinstance(value, nn.Parameter):
                    part._parameters[key] = value
                else:
                    part._buffers[key] = value

        return write

    return [([name for *_, name in places], tensors[i], writer(places)) for i, places in owners.items()]


def tied_names(module: nn.Module) -> dict[str, str]:
    """Alias -> owner, for parameters that one tensor serves under several names; the owner is the first in module
    order."""
    return {alias: names[0] for names, _, _ in slots(module, "") for alias in names[1:]}


def empty(module: nn.Module) -> None:
    """Let go of a module's weights now: modules of transformers refer to themselves, so they would stay until Python's collector runs."""
    for _, old, write in slots(module, ""):
        if isinstance(old, nn.Parameter):
            write(nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad))


def return_freed_memory() -> None:
    """Hand freed heap back to the system, where the C library can (glibc keeps it for later otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _inside(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def require_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raises CheckpointError that names the tensor and the first index of a NaN or infinity."""
    if tensor.numel() == 0:
        return
    low, high = tensor.float().aminmax() if tensor.dtype.itemsize < 2 else tensor.aminmax()  # NaN propagates into both
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    flat = int((~torch.isfinite(tensor.float())).reshape(-1).nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
    raise CheckpointError(
        f"{where}: tensor {name} holds {float(tensor.reshape(-1)[flat])} at {index}; "
        "the weights are damaged: get them again"
    )
