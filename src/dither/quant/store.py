"""What a run leaves on disk: finished blocks while it works, one whole checkpoint at the end.

While a run works, ``OUT/.partial/`` holds ``run.json`` (what is being made: recipe, model, data, seed) and one safetensors file for every finished
block, each written beside its name, flushed, and renamed. A rerun with the same ``run.json`` goes on after the last of them; another
``run.json`` is refused. The end joins the blocks into shards, and ``config.json`` comes last: a folder without it is not a checkpoint,
so nothing half-written can pass for a whole one. The same job ends with the same bytes, however often it was killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dither.errors import CheckpointError, DitherError, UsageError
from dither.models.safetensors_file import DTYPES
from dither.quant.outcome import REPORT
from dither.quant.unit import Unit

PARTIAL, RUN, INDEX, CONFIG = ".partial", "run.json", "model.safetensors.index.json", "config.json"
SHARD_BYTES = 5 * 10**9
_CHUNK = 1 << 24


class Store:
    """The output folder of one run. ``identity`` is everything that decides the result's bytes."""

    def __init__(self, out: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.partial = self.out / PARTIAL
        self.identity = json.dumps(identity, sort_keys=True, indent=1)
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out}: is a file; give a folder for the checkpoint")
        if overwrite and self.out.exists():
            if not (self._empty() or self._ours() or (self.out / CONFIG).is_file()):
                raise UsageError(
                    f"{self.out}: is no checkpoint; --overwrite only replaces checkpoints. Choose another folder"
                )
            with explained(self.out):
                self._clear()
        found = self._found()
        if found is None and not self._empty():
            raise UsageError(
                f"{self.out}: is not empty and was not made by dither; choose another folder, or --overwrite"
            )
        if found is not None and found != self.identity:
            differs = _differences(json.loads(found), identity)
            raise UsageError(
                f"{self.out}: holds a run with other settings ({differs}); choose another folder, or --overwrite it"
            )
        if not self.complete:
            with explained(self.out):
                self.partial.mkdir(parents=True, exist_ok=True)
                write_text(self.partial / RUN, self.identity)

    def _empty(self) -> bool:
        """Whether nothing is there, or only what a run leaves that was killed before it could say what it makes."""
        names = [p.name for p in self.out.iterdir()] if self.out.exists() else []
        begun = names == [PARTIAL] and self.partial.is_dir()
        return not names or (begun and all(p.name == f"{RUN}.tmp" for p in self.partial.iterdir()))

    def _clear(self) -> None:
        """Remove everything: first what makes it look whole, last what tells that it is ours, so that the same command can follow
        one that was killed here."""
        marks = [p for p in (self.out / REPORT, self.partial / RUN, self.out / CONFIG) if p.is_file()][:1]
        found = [*self.out.iterdir(), *(self.partial.iterdir() if self.partial.is_dir() else ())]
        for path in sorted(found, key=lambda p: p.name != CONFIG):
            if path in marks or path == self.partial:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        shutil.rmtree(self.out)

    def _ours(self) -> bool:
        return (self.partial / RUN).is_file() or (self.out / REPORT).is_file()

    def _found(self) -> str | None:
        """The identity of the run that this folder holds, finished or not."""
        for path in (self.partial / RUN, self.out / REPORT):
            if path.is_file():
                try:
                    text = json.loads(path.read_text())
                except ValueError as error:
                    raise CheckpointError(f"{path}: is damaged ({error}); remove the folder and run again") from None
                return json.dumps(text.get("run", text), sort_keys=True, indent=1)
        return None

    @property
    def complete(self) -> bool:
        return (self.out / CONFIG).is_file() and not self.partial.exists()

    def block_path(self, index: int) -> Path:
        return self.partial / f"block-{index:05d}.safetensors"

    def remember(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make()`` gave, kept beside the finished blocks until the run ends: a stopped run need not find it again."""
        path = self.partial / f"{name}.safetensors"
        if not path.is_file():
            with explained(self.out):
                temporary = path.with_suffix(".tmp")
                save_file({k: _own(v) for k, v in make().items()}, temporary)
                _flush(temporary)
                os.replace(temporary, path)
        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it and run again to remake it") from None

    def finished(self, index: int) -> bool:
        return self.block_path(index).is_file()

    def write(self, unit: Unit, index: int) -> None:
        """Write one unit whole or not at all. Its facts (JSON) ride along in the header."""
        with explained(self.out):
            path = self.block_path(index)
            temporary = path.with_suffix(".tmp")
            save_file(
                {k: _own(v) for k, v in unit.tensors.items()},
                temporary,
                metadata={"format": "pt", "facts": json.dumps(unit.facts(), sort_keys=True)},
            )
            _flush(temporary)
            os.replace(temporary, path)

    def read(self, index: int) -> Unit:
        """A finished unit. Raises CheckpointError where the file is damaged."""
        path = self.block_path(index)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                return Unit.from_facts(facts, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it and run again to remake it") from None

    def finish(
        self, count: int, config: dict[str, Any], report: dict[str, Any], extra: Iterable[tuple[str, str | bytes]]
    ) -> None:
        """Join ``count`` blocks into shards, then write the report and, last of all, ``config.json``."""
        with explained(self.out):
            write_shards(self.out, [self.block_path(i) for i in range(count)])
            for name, content in extra:
                write_text(self.out / name, content)
            write_text(
                self.out / REPORT, json.dumps({"run": json.loads(self.identity), **report}, indent=1, sort_keys=True)
            )
            write_text(self.out / CONFIG, json.dumps(config, indent=2, sort_keys=True))
            shutil.rmtree(self.partial)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: safetensors refuses views that share theirs."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.contiguous().clone()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The names of the settings that differ, as ``recipe.weights.bits: 4 -> 3``."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(_differences(a, b, f"{prefix}{key}."))
        else:
            found.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return ", ".join(found)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write_shards(out: Path, files: list[Path], limit: int = SHARD_BYTES) -> None:
    """Copy the tensors of ``files`` into ``model.safetensors`` (or numbered shards with an index), byte by byte.

    Memory: one copy buffer, however large the model. Each shard is written beside its name and renamed.
    """
    plans: list[list[tuple[str, dict[str, Any], Path, int]]] = [[]]
    size = 0
    for file in files:
        header, start = read_header(file)
        for name, entry in sorted(header.items()):
            if name == "__metadata__":
                continue
            length = entry["data_offsets"][1] - entry["data_offsets"][0]
            if size and size + length > limit:
                plans.append([])
                size = 0
            plans[-1].append((name, entry, file, start))
            size += length
    names = (
        ["model.safetensors"]
        if len(plans) == 1
        else [f"model-{i + 1:05d}-of-{len(plans):05d}.safetensors" for i in range(len(plans))]
    )
    for plan, name in zip(plans, names, strict=True):
        _write_shard(out / name, plan)
    if len(plans) > 1:
        total = sum(e["data_offsets"][1] - e["data_offsets"][0] for plan in plans for _, e, _, _ in plan)
        weight_map = {tensor: name for plan, name in zip(plans, names, strict=True) for tensor, *_ in plan}
        write_text(
            out / INDEX,
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True),
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. Raises CheckpointError where a shard is missing or damaged."""
    index = folder / INDEX
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
        found: dict[str, Tensor] = {}
        for name in names:
            found |= load_file(folder / name)
        return found
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: a file of the checkpoint is missing or damaged ({error})") from None


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file that this module wrote, and where its data starts."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _write_shard(path: Path, plan: list[tuple[str, dict[str, Any], Path, int]]) -> None:
    """The widest numbers first: each tensor then starts at a multiple of its numbers' size, and a loader that maps the file need not copy it."""
    plan = sorted(plan, key=lambda one: -DTYPES[one[1]["dtype"]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry, _, _ in plan:
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as target:
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for _, entry, file, start in plan:
            begin, end = entry["data_offsets"]
            for chunk in _chunks(file, start + begin, end - begin):
                target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


def _chunks(path: Path, start: int, length: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0:
            chunk = file.read(min(length, _CHUNK))
            if not chunk:
                raise CheckpointError(f"{path}: ends early; remove it and run again to remake it")
            length -= len(chunk)
            yield chunk


def write_text(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class explained:
    """Turns the operating system's refusals into one line that says what to do."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        text = str(error)
        if isinstance(error, OSError) or (isinstance(error, SafetensorError) and "os error" in text.lower()):
            code = getattr(error, "errno", None)
            if code == errno.ENOSPC or "os error 28" in text:
                raise DitherError(
                    f"{self.out}: no space left on the device; free some and run the same command again: it resumes"
                ) from error
            if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "os error 30" in text or "os error 13" in text:
                raise DitherError(f"{self.out}: cannot be written ({text}); choose another folder with -o") from error
            raise DitherError(f"{self.out}: {text}") from error


def fingerprint(*values: Any) -> str:
    """A short stable hash of JSON values and tensors."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(str((tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()[:16]
