"""Text for calibration and evaluation, from whatever a user has, and token windows drawn from it.

Sampling rule: all text is joined and tokenized once (special tokens only where the tokenizer adds them of its own
accord), cut into windows of ``length`` tokens that do not overlap, and ``samples`` of them are taken in the order of a
permutation under ``seed``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dither.errors import CalibrationError, UsageError

SUFFIXES = (".txt", ".md", ".raw", ".tokens", ".json", ".jsonl")
Part = Literal["calibration", "evaluation"]
Text = str | Path | Sequence[str | Path] | Tensor | Sequence[Sequence[int]] | None

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_CHARACTERS_PER_TOKEN = 16  # of a data set that is streamed: more than any tokenizer needs on average


def calibration_tokens(source: Text, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Token windows ``[samples, length]``, int64.

    ``source``: None (the embedded text), a text, a file or folder of text, a list of texts or files, a hub data set
    ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``; or tokens: one stream ``[N]``, or windows ``[N, L]`` (a tensor or lists of
    one length), which are all used as given. Raises CalibrationError where the text cannot be read or is too short;
    ValueError for tokens that cannot be tokens.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and length must be positive, got {samples} and {length}")
    if isinstance(source, Tensor) or _is_token_lists(source):
        tokens = _as_tokens(source)
        if tokens.dim() == 2:
            return tokens
        stream, where = tokens, "the given tokens"
    else:
        content, where = _gather(source, samples * length * _CHARACTERS_PER_TOKEN)  # type: ignore[arg-type]
        stream = torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)
    return windows(stream, samples, length, seed, where)


def windows(stream: Tensor, samples: int, length: int, seed: int, where: str) -> Tensor:
    """``samples`` windows ``[samples, length]`` of a token stream ``[N]``. Raises CalibrationError where it is too
    short."""
    count = stream.numel() // length
    if count < samples:
        raise CalibrationError(
            f"calibration text ({where}): has {stream.numel()} tokens, but {samples} samples of {length} need "
            f"{samples * length}; "
            f"lower samples to {count} or less, shorten length, or give more text"
            if count
            else f"calibration text ({where}): has {stream.numel()} tokens, fewer than one sample of {length}; "
            "shorten length or give more text"
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return stream[: count * length].reshape(count, length)[chosen].contiguous()  # (samples, length)


def _is_token_lists(source: Any) -> bool:
    return (
        isinstance(source, Sequence)
        and not isinstance(source, str)
        and len(source) > 0
        and not isinstance(source[0], str | Path)
    )


def _as_tokens(source: Any) -> Tensor:
    """One stream ``[N]`` or windows ``[N, L]``."""
    if not isinstance(source, Tensor):
        rows = [torch.as_tensor(row) for row in source]
        stackable = len({tuple(row.shape) for row in rows}) == 1
        source = torch.stack(rows) if stackable else torch.cat([row.reshape(-1) for row in rows])
    if (
        source.is_floating_point()
        or source.is_complex()
        or source.dtype == torch.bool
        or source.dim() not in (1, 2)
        or source.numel() == 0
    ):
        raise ValueError(
            f"calibration tokens must be integers of shape [N, L] or [N], got {source.dtype} {list(source.shape)}"
        )
    if int(source.min()) < 0:
        raise ValueError(f"calibration tokens must not be negative, got {int(source.min())}")
    tokens: Tensor = source.to("cpu", torch.int64)
    return tokens


def _gather(source: str | Path | Sequence[str | Path] | None, characters: int) -> tuple[str, str]:
    """``(text, what to call it in errors)``. ``characters``: how much of an endless source is enough."""
    if source is None:
        return embedded_text("calibration"), "the embedded text"
    if isinstance(source, Path):
        return read_text(source), str(source)
    if not isinstance(source, str):
        if len(source) == 0:
            raise CalibrationError("calibration text: the list is empty; give at least one text")
        return "\n\n".join(
            read_text(item) if isinstance(item, Path) else item for item in source
        ), f"{len(source)} texts"
    path = _existing(source)
    if path is not None:
        return read_text(path), source
    if _DATASET_ID.fullmatch(source) and not source.endswith(SUFFIXES) and not Path(source).parent.exists():
        return _dataset_text(source, characters), source
    one_word = not any(c.isspace() for c in source) or ("\n" not in source and source.endswith(SUFFIXES))
    if one_word and len(source) < 256:  # a mistyped path, not a text
        raise CalibrationError(
            f"{source}: there is no such file or folder of text, and it is no hub data set (OWNER/NAME)"
        )
    return source, "the given text"


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such user, null characters
        return None


def read_text(path: str | Path) -> str:
    """The text of a file, or of all text files of a folder (sorted by name, joined by blank lines).

    UTF-8, with or without a byte order mark; line ends stay as they are. ``.json`` and ``.jsonl`` give their strings
    and "text" fields. Raises CalibrationError (missing, empty, not UTF-8: with the byte offset; no text in the JSON).
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        if not files:
            raise CalibrationError(f"{path}: holds no text files ({', '.join('*' + s for s in SUFFIXES)})")
        return "\n\n".join(read_text(file) for file in files)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"{path}: there is no such text file") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from None
    mark = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + mark
        raise CalibrationError(
            f"{path}: is not UTF-8 text (byte 0x{raw[at]:02x} at offset {at}); convert it to UTF-8"
        ) from None
    if path.suffix.lower() in (".json", ".jsonl"):
        text = _json_text(path, text)
    if not text.strip():
        raise CalibrationError(f"{path}: is empty; give a file with text")
    return text


def _json_text(path: Path, content: str) -> str:
    """The strings and "text" fields of a JSON array, object, or of JSON lines, joined by blank lines."""
    try:
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            whole = json.loads(content)
            rows = whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: is not valid JSON ({error})") from None
    return "\n\n".join(_row_texts(path, rows))


def _row_texts(where: object, rows: Iterable[Any]) -> Iterable[str]:
    for i, row in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise CalibrationError(f'{where}: row {i} is neither a string nor an object with a "text" field')
        yield text


def _dataset_text(name: str, characters: int) -> str:
    """The first ``characters`` of the "text" column of a hub data set's training split (or its first split)."""
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"{name}: there is no such file; as a hub data set it needs the datasets package: pip install datasets, "
            "or give a text file"
        ) from None
    repository, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(repository, config or None, streaming=True)
        rows = splits["train"] if "train" in splits else splits[next(iter(splits))]
        parts, total = [], 0
        for text in _row_texts(name, rows):
            parts.append(text)
            total += len(text)
            if total >= characters:
                break
    except CalibrationError:
        raise
    except Exception as error:  # network, missing configs, foreign loaders
        raise CalibrationError(
            f"{name}: the data set cannot be read ({' '.join(str(error).split())[:160]}); give a text file"
        ) from None
    return "".join(part if part.endswith("\n") else part + "\n\n" for part in parts)


def embedded_text(part: Part) -> str:
    """English that every Python has: the language reference in ``pydoc_data.topics``, in two parts without a common
    paragraph.

    A topic belongs to the evaluation if the SHA-256 of its name, modulo 4, is 1: stable over Python versions, and about
    2/5 of the text. Topics quote each other, so a paragraph that the evaluation has (or that came before) is left out
    of the calibration.
    """
    if part not in ("calibration", "evaluation"):
        raise UsageError(f"embedded text: there is no part {part!r}; choose calibration or evaluation")
    return _embedded()[part]


@cache
def _embedded() -> dict[str, str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: dict[str, list[str]] = {"evaluation": [], "calibration": []}
    for kept in ("evaluation", "calibration"):
        for name in sorted(topics):
            digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
            if ("evaluation" if digest % 4 == 1 else "calibration") != kept:
                continue
            for paragraph in re.split(r"\n\s*\n", topics[name]):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    found[kept].append(paragraph.strip("\n"))
    return {kept: "\n\n".join(paragraphs) + "\n" for kept, paragraphs in found.items()}


def wikitext_join(raw: str) -> str:
    """The raw WikiText file as papers feed it to models: its rows (a blank line is the empty row, any other keeps its
    line end) joined by blank lines."""
    lines = raw.split("\n")
    if lines[-1] == "":
        lines.pop()
    return "\n\n".join("" if line == " " else line + "\n" for line in lines)
