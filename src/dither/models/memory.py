"""A module that is already in memory, seen as a `Source`."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.models.source import NoTokenizer, Source, slots, tied_names


class MemorySource(Source):
    """Serves the tensors of ``model``, which is never changed. Every skeleton is a copy of its structure."""

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, name: str | None = None, notes: Iterable[str] = ()
    ) -> None:
        self.model, self._tokenizer = model, tokenizer
        self.config = getattr(model, "config", None)
        self.name = name or type(model).__name__
        self.notes = list(notes)
        self.generation_config = getattr(model, "generation_config", None)
        self.tied = tied_names(model)
        self._tensors = {name: tensor.detach() for names, tensor, _ in slots(model, "") for name in names}
        self.dtype = most_common_dtype((t.dtype, t.numel()) for t in self._tensors.values())

    def names(self) -> list[str]:
        return [name for name in self.model.state_dict() if name in self._tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return self._tensors[name].to("cpu", dtype, copy=True)

    def skeleton(self, attn_implementation: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        """A copy with meta parameters. The attention implementation stays the model's own."""
        memo: dict[int, Any] = {}
        for _, tensor, _ in slots(self.model, ""):
            if isinstance(tensor, nn.Parameter):
                kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
                memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta", kept), requires_grad=tensor.requires_grad)
        return copy.deepcopy(self.model, memo).eval()

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise NoTokenizer(
                f"{self.name}: the model was given without a tokenizer; pass tokenizer=..., or tokens instead of text"
            )
        return self._tokenizer

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names():
            tensor = self._tensors[name].cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
        return digest.hexdigest()[:16]

    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        yield from saved_files(self._tokenizer, self.generation_config)


class RewrittenSource(MemorySource):
    """A float32 model in memory that was made from another source by rewriting its weights: names, tokenizer and storage types are that one's,
    and what was not there (a head that was untied, biases) takes its most common type."""

    def __init__(self, model: nn.Module, original: Source) -> None:
        super().__init__(model, name=original.name, notes=original.notes)
        self.original, self.dtype = original, original.dtype
        self.generation_config = original.generation_config

    def dtype_of(self, name: str) -> torch.dtype:
        kind = self._tensors[name].dtype
        if not kind.is_floating_point:
            return kind
        return self.original.dtype_of(name) if self.original.has(name) else self.dtype

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return super()._read(name, self.dtype_of(name) if dtype is None else dtype)

    def tokenizer(self) -> Any:
        return self.original.tokenizer()

    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        yield from self.original.sidecars()


def most_common_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The floating type of most elements; float32 where nothing is floating."""
    count: Counter[torch.dtype] = Counter()
    for dtype, numel in sizes:
        if dtype.is_floating_point:
            count[dtype] += numel
    return count.most_common(1)[0][0] if count else torch.float32


def saved_files(tokenizer: Any, generation_config: Any) -> Iterator[tuple[str, str | bytes]]:
    """What ``save_pretrained`` of a tokenizer and of generation settings would write."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                yield path.name, path.read_bytes()
    if hasattr(generation_config, "to_json_string"):
        yield "generation_config.json", generation_config.to_json_string()
