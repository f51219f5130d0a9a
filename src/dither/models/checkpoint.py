"""A checkpoint on disk as a `Source`: safetensors or GGUF, never more in memory than was asked for."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError, ModelError
from dither.models import safetensors_file, skeleton
from dither.models.conversion import Made, Stored, plan
from dither.models.memory import most_common_dtype
from dither.models.source import NoTokenizer, Source, slots, tied_names

_SLACK = 1 << 22  # parameters that a model may have beyond what its weights hold, besides its tied ones
_TEXT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_TEXT_LIMIT = 1 << 28


class Checkpoint(Source, ABC):
    """What all files on disk share: a plan from stored tensors to parameters, made and checked when the checkpoint is
    opened.

    Raises CheckpointError where parameters are missing or have another shape than the config says; `Unplannable` where
    transformers' conversion rules cannot be run one parameter at a time.
    """

    generation_config: Any = None

    def __init__(self, name: str, where: Path, config: Any, dtype: torch.dtype | None) -> None:
        self.name, self.where, self.config, self.notes = name, where, config, []
        self._given_dtype = dtype
        self._tokenizer: Any = None
        self._class = skeleton.auto_class(config)
        elements, count = self._size()
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and not 0 <= layers <= count:
            raise CheckpointError(
                f"{where}: the config says {layers} layers, but there are {count} tensors; copy or download it again"
            )
        self._limit = 4 * elements + _SLACK
        self._model = skeleton.build(config, self._class, "sdpa", torch.float32, limit=self._limit, where=where)
        self.tied: dict[str, str] = tied_names(self._model)
        try:
            self._plan, self._unused = plan(self._describe(self._model), self._model, self._rules(self._model))
        except Exception as error:  # foreign rules: whatever they raise, the slow way is still open
            raise Unplannable(f"{type(error).__name__}: {error}") from None
        self._settle_ties()
        self._check()
        self.dtype = dtype or most_common_dtype((m.dtype, torch.Size(m.shape).numel()) for m in self._plan.values())

    @abstractmethod
    def _size(self) -> tuple[int, int]:
        """Stored weights, stored tensors."""

    @abstractmethod
    def _describe(self, model: nn.Module) -> Stored:
        """Shape and type of every stored tensor."""

    def _rules(self, model: nn.Module) -> Sequence[Any]:
        """transformers' weight transforms for this kind of checkpoint."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules: Sequence[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]  # always a PreTrainedModel
        return rules

    @abstractmethod
    def _load(self, key: str, dtype: torch.dtype | None) -> Tensor:
        """One stored tensor."""

    def _settle_ties(self) -> None:
        """A tied tensor may be stored under any of its names; stored under two with different values, it is not
        tied."""
        for alias, owner in list(self.tied.items()):
            if alias in self._plan and owner in self._plan:
                if not self._equal(self._plan[alias], self._plan[owner]):
                    del self.tied[alias]
                    self.notes.append(
                        f"{alias} and {owner} differ in the weights, so they are not shared, whatever the config says"
                    )
            elif alias in self._plan:
                self._plan[owner] = self._plan[alias]
        for alias, owner in self.tied.items():
            if owner in self._plan:
                self._plan[alias] = self._plan[owner]
        if len(self.tied) < len(tied_names(self._model)):
            self._untie(self._model)

    def _equal(self, a: Made, b: Made) -> bool:
        return torch.equal(
            *(made.recipe.make(lambda key: self._load(key, None), self._model)[made.name] for made in (a, b))
        )

    def _untie(self, model: nn.Module) -> None:
        for names, tensor, _ in slots(model, ""):
            for alias in names[1:]:
                if alias not in self.tied:
                    path, _, key = alias.rpartition(".")
                    setattr(
                        model.get_submodule(path),
                        key,
                        nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad),
                    )

    def _check(self) -> None:
        expected = {
            name: (tensor, isinstance(tensor, nn.Parameter))
            for names, tensor, _ in slots(self._model, "")
            for name in names
        }
        missing = [name for name, (_, parameter) in expected.items() if parameter and name not in self._plan]
        if missing:
            raise CheckpointError(
                f"{self.where}: lacks the tensor {missing[0]} ({len(missing)} missing); copy or download it again"
            )
        for name, (tensor, _) in expected.items():
            if name in self._plan and self._plan[name].shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self.where}: tensor {name} has the shape {list(self._plan[name].shape)}, but the config says "
                    f"{list(tensor.shape)}; one of the two is damaged: copy or download them again"
                )
        self._plan = {name: self._plan[name] for name in self._model.state_dict() if name in self._plan}
        unused = self._truly_unused()
        if unused:
            self.notes.append(
                f"{len(unused)} stored tensors are not part of the model and are left out (first: {unused[0]})"
            )

    def _truly_unused(self) -> list[str]:
        """Stored tensors that the model's class does not declare harmless."""
        patterns = [re.compile(p) for p in getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        return [
            name
            for name in self._unused
            if not any(p.search(name) for p in patterns) and "rotary_emb.inv_freq" not in name
        ]

    def names(self) -> list[str]:
        return list(self._plan)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._plan[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        stored = self._plan[name].dtype
        return self._given_dtype if self._given_dtype is not None and stored.is_floating_point else stored

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        made: Made = self._plan[name]
        wanted = dtype or (self._given_dtype if made.dtype.is_floating_point else None)
        if made.recipe.rule is None:
            return self._load(made.recipe.inputs[0][0], wanted)
        results = made.recipe.make(lambda key: self._load(key, None), self._model)
        value = results[made.name]
        value = value.to(wanted or value.dtype)
        own = value.untyped_storage().nbytes() == value.nbytes  # else a view would keep its siblings in memory
        return value.contiguous() if own else value.contiguous().clone()

    def skeleton(self, attn_implementation: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        model = skeleton.build(
            self.config, self._class, attn_implementation, dtype or torch.float32, limit=self._limit, where=self.where
        )
        self._untie(model)
        if dtype is None:
            for names, old, write in slots(model, ""):
                if isinstance(old, nn.Parameter) and old.is_floating_point():
                    write(nn.Parameter(old.detach().to(self.dtype_of(names[0])), requires_grad=old.requires_grad))
        if hasattr(model, "config"):
            model.config.dtype = dtype or self.dtype
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(part)
        return digest.hexdigest()[:16]

    @abstractmethod
    def _identity(self) -> Iterator[bytes]:
        """What tells these files from others."""


class Unplannable(Exception):
    """The checkpoint has to be loaded whole by transformers."""


class SafetensorsSource(Checkpoint):
    """A folder with ``config.json`` and one or several safetensors files."""

    def __init__(self, name: str, folder: Path, config: Any, dtype: torch.dtype | None = None) -> None:
        self._entries = safetensors_file.read_folder(folder)
        self.generation_config = generation_config(folder)
        super().__init__(name, folder, config, dtype)

    def _size(self) -> tuple[int, int]:
        return sum(torch.Size(entry.shape).numel() for entry in self._entries.values()), len(self._entries)

    def _describe(self, model: nn.Module) -> Stored:
        return {key: (entry.shape, entry.dtype) for key, entry in self._entries.items()}

    def _load(self, key: str, dtype: torch.dtype | None) -> Tensor:
        return safetensors_file.read_tensor(self._entries[key], key, dtype)

    def _equal(self, a: Made, b: Made) -> bool:
        if a.recipe.rule is not None or b.recipe.rule is not None:
            return super()._equal(a, b)
        return safetensors_file.same_bytes(*(self._entries[made.recipe.inputs[0][0]] for made in (a, b)))

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = folder_tokenizer(self.name, self.where)
        return self._tokenizer

    def _identity(self) -> Iterator[bytes]:
        yield (self.where / "config.json").read_bytes()
        for path in sorted({entry.path for entry in self._entries.values()}):
            yield from sample(path)

    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        skipped = {"config.json", "dither.json", "record.json"}  # what is said of the float model, not of what is made from it
        for path in sorted(self.where.iterdir()):
            name = path.name
            if name in skipped or name.endswith(".index.json") or name.startswith(".") or not name.endswith(_TEXT):
                continue
            if (
                path.is_file()
                and path.stat().st_size <= _TEXT_LIMIT
                and name.lower() not in ("license.txt", "requirements.txt")
            ):
                yield name, path.read_bytes()


def folder_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a local folder. Raises NoTokenizer where there is none, ModelError where it is damaged."""
    from transformers import AutoTokenizer

    if not any(
        (folder / n).is_file()
        for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise NoTokenizer(
            f"{name}: has no tokenizer files; copy tokenizer.json into the folder, or pass tokens instead of text"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class has its own
        raise ModelError(
            f"{name}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}); copy or download it again"
        ) from None


def generation_config(folder: Path) -> Any:
    """The generation settings of a folder, or None. Damaged ones count as none."""
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None


def sample(path: Path, pieces: int = 64, length: int = 4096) -> Iterator[bytes]:
    """The size of a file, its first 64 KiB (the header or most of it), and pieces spread evenly over the rest."""
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with open(path, "rb") as file:
        yield file.read(1 << 16)
        for i in range(pieces):
            file.seek(i * max(size - length, 0) // max(pieces - 1, 1))
            yield file.read(length)
