"""From what a user calls a model to its `Source`: an alias, a folder, a GGUF file, a hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.errors import CheckpointError, ModelError
from dither.models import embedded, fashion, safetensors_file, skeleton
from dither.models.checkpoint import SafetensorsSource, Unplannable, folder_tokenizer
from dither.models.memory import MemorySource
from dither.models.source import NoTokenizer, Source

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def open_source(name_or_path: str | Path, *, dtype: torch.dtype | None = None) -> Source:
    """The `Source` of an embedded model (``smollm2``, ``vit-fashion``), a folder with ``config.json`` and safetensors,
    a GGUF file (or a folder with one), or a hub id. A folder that is itself called smollm2 is ``./smollm2``.

    ``dtype``: read floating weights as this type instead of the stored one. No weight is read before it is asked for.
    Raises ModelError (no such model, no config, pickles only), CheckpointError (damaged files).
    """
    name = str(name_or_path)
    if name == embedded.ALIAS:
        return _gguf(name, embedded.embedded_file(), dtype)
    if name == fashion.ALIAS:
        return _folder(name, fashion.FOLDER, dtype)
    path = Path(name_or_path)
    if not name or not _exists(path):
        path = _hub_folder(name)
    if path.is_file():
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            return _gguf(name, path, dtype)
        raise ModelError(f"{name}: is a file, but no GGUF file; give the folder that holds config.json and the weights")
    return _folder(name, path, dtype)


def load(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The whole float model in memory, in eval mode, and its tokenizer (None where it comes with none).

    Raises what `open_source` raises, and CheckpointError for weights that hold NaN or infinity.
    """
    source = open_source(name_or_path)
    if isinstance(source, MemorySource):
        model = source.model.to(dtype)
    else:
        model = source.skeleton(dtype=dtype)
        source.fill(model)
    try:
        tokenizer = source.tokenizer()
    except NoTokenizer:
        tokenizer = None
    return model.eval(), tokenizer


def check_folder(folder: str | Path) -> None:
    """Raises CheckpointError unless the safetensors files of a folder are whole: headers, sizes, shards."""
    safetensors_file.read_folder(Path(folder))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, null characters
        return False


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def _gguf(name: str, path: Path, dtype: torch.dtype | None) -> Source:
    from dither.models import gguf_file

    try:
        return gguf_file.GGUFSource(name, path, dtype)
    except Unplannable as reason:
        return gguf_file.whole(name, path, dtype, str(reason))


def _folder(name: str, folder: Path, dtype: torch.dtype | None) -> Source:
    has_weights = any(folder.glob("*.safetensors")) or (folder / safetensors_file.INDEX).is_file()
    ggufs = sorted(folder.glob("*.gguf"))
    if not has_weights and len(ggufs) == 1:
        return _gguf(name, ggufs[0], dtype)
    if not has_weights and ggufs:
        raise ModelError(f"{name}: holds {len(ggufs)} GGUF files; give the path of one, such as {ggufs[0]}")
    config = skeleton.read_config(folder)
    if not has_weights:
        pickles = sorted(p for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{name}: has only {pickles[0].name}, a pickle, which can run any code when read; dither never does. "
                "Convert it to safetensors (save_pretrained of transformers on a machine that trusts it) and give "
                "that folder"
            )
        raise ModelError(f"{name}: has config.json but no weights; copy or download the safetensors files too")
    if getattr(config, "quantization_config", None) is not None:
        safetensors_file.read_folder(folder)
        return _whole(name, folder, config, dtype, "its weights are already quantized")
    try:
        return SafetensorsSource(name, folder, config, dtype)
    except Unplannable as reason:
        return _whole(name, folder, config, dtype, str(reason))


def _whole(name: str, folder: Path, config: Any, dtype: torch.dtype | None, reason: str) -> Source:
    """Let transformers load everything into memory: for checkpoints that cannot be read one parameter at a time."""
    options = {"dtype": dtype or "auto", "local_files_only": True, "use_safetensors": True}
    try:
        model, info = skeleton.auto_class(config).from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # anything can go wrong in foreign loaders
        raise ModelError(f"{name}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
    lost = sorted(set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]})
    if lost:  # transformers fills these with random numbers
        raise CheckpointError(f"{folder}: lacks the tensor {lost[0]} ({len(lost)} missing); copy or download it again")
    note = f"{name}: loaded whole into memory by transformers ({reason})"
    try:
        tokenizer = folder_tokenizer(name, folder)
    except NoTokenizer:
        tokenizer = None
    return MemorySource(model.eval(), tokenizer, name=name, notes=[note])


def _hub_folder(name: str) -> Path:
    """The local copy of a hub repository: safetensors, JSON and tokenizer files only. Raises ModelError."""
    near = _near(name)
    local = "/" in name and Path(name).parent.is_dir()
    if not _HUB_ID.fullmatch(name) or len(name) > 96 or name.endswith(".gguf") or local or (near and "/" not in name):
        raise ModelError(f"{name}: there is no such file or folder{near}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise ModelError(f"{name}: is gated; accept its terms on the hub and log in with: hf auth login") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: there is no such folder, and no such model on the hub{near}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise ModelError(
            f"{name}: there is no such folder, and the hub cannot be reached ({why}){near}; go online, or give a folder"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name}: the hub repository has no safetensors weights (pickles are never read); "
            "choose one that has, or a GGUF file"
        )
    return folder


def _near(name: str) -> str:
    """``"; did you mean ...?"`` from the aliases and the neighbours on disk, or nothing."""
    path = Path(name)
    try:
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        siblings = []
    known = [embedded.ALIAS, fashion.ALIAS, *siblings]
    lowered = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(lowered[f] for f in found)}?" if found else ""
