"""A tokenizer as GGUF metadata: from the ``tokenizer.json`` of a checkpoint, or carried over from another GGUF file.

Only byte-level BPE can be told from a ``tokenizer.json``: vocabulary, merges, kinds of tokens, special ids, chat template, and the name of the
pre-tokenizer, by which llama.cpp knows how text is cut before merging. Names are found by rule:

    ByteLevel with its own pattern                      gpt-2
    single digits, then that                            smollm
    Split by a pattern, then ByteLevel without          the name under which transformers' table for reading has the pattern

Everything else is refused with its reason: sentencepiece vocabularies need scores that ``tokenizer.json`` does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import CheckpointError, ExportError
from dither.models.checkpoint import folder_tokenizer
from dither.models.gguf_metadata import optional_module
from dither.models.source import NoTokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
IGNORES_MERGES, KEEPS_MERGES = "llama-bpe", "dbrx"  # names of one pattern; the first takes a word that is in the vocabulary whole
Metadata = dict[str, Any]


def of_folder(folder: Path, rows: int, config: Any) -> Metadata:
    """``tokenizer.*`` of the tokenizer that lies in ``folder``, for an embedding of ``rows`` tokens; where there is none, only the special ids of the
    model's ``config``.

    Raises ExportError where llama.cpp could not cut text as this tokenizer does.
    """
    try:
        tokenizer = folder_tokenizer(str(folder), folder)
    except NoTokenizer:
        return {"tokenizer.ggml.model": "none", **_special(config)}
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(f"gguf: {folder} has a tokenizer, but no tokenizer.json; give one of a GGUF file with --tokenizer")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = _vocabulary(data, rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no readable tokenizer ({type(error).__name__}: {error}); get the checkpoint again") from None
    found |= _special(tokenizer)
    ids = tokenizer("a")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = bool(ids and ids[0] == tokenizer.bos_token_id)
    found["tokenizer.ggml.add_eos_token"] = bool(ids and ids[-1] == tokenizer.eos_token_id)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    return found


def _special(holder: Any) -> Metadata:
    ids = {key: getattr(holder, name, None) for key, name in SPECIAL.items()}
    return {f"tokenizer.ggml.{key}_token_id": token for key, token in ids.items() if isinstance(token, int)}


def _vocabulary(data: Mapping[str, Any], rows: int) -> Metadata:
    model = data["model"]
    if model["type"] != "BPE" or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise ExportError(
            f"gguf: its tokenizer is {model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}, not byte-level BPE, so that "
            "tokenizer.json does not hold what llama.cpp needs (the scores of sentencepiece); give one of a GGUF file with --tokenizer"
        )
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    by_id = {i: token for token, i in model["vocab"].items()} | {i: entry["content"] for i, entry in added.items()}
    if max(by_id) >= rows:
        raise ExportError(f"gguf: its tokenizer has a token {max(by_id)}, the embedding only {rows} rows")
    kinds = {i: CONTROL if entry["special"] else USER_DEFINED for i, entry in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer(data),
        "tokenizer.ggml.tokens": [by_id.get(i, f"[PAD{i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": [kinds.get(i, NORMAL if i in by_id else UNUSED) for i in range(rows)],
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
    }


def pre_tokenizer(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer of a ``tokenizer.json`` cuts text. Raises ExportError where it has none that is known here."""
    cuts = data.get("pre_tokenizer") or {}
    steps = cuts["pretokenizers"] if cuts.get("type") == "Sequence" else [cuts]
    normal = data.get("normalizer") or {}
    plain = not normal or normal == {"type": "Sequence", "normalizers": []}
    match [(step.get("type"), step.get("use_regex", True)) for step in steps]:
        case [("ByteLevel", True)] if plain and not steps[0].get("add_prefix_space"):
            return "gpt-2"
        case [("Digits", _), ("ByteLevel", True)] if plain and steps[0].get("individual_digits") and not steps[1].get("add_prefix_space"):
            return "smollm"
        case [("Split", _), ("ByteLevel", False)] if plain or normal.get("type") == "NFC":
            pattern = steps[0].get("pattern", {}).get("Regex")
            theirs = optional_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
            names = [name for name, regex in getattr(theirs, "GGUF_PRE_TOKENIZER_SPLITS", {}).items() if regex == pattern]
            if IGNORES_MERGES in names:
                names = [IGNORES_MERGES if data["model"].get("ignore_merges") else KEEPS_MERGES]
            if names and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return str(names[0])
    shown = json.dumps(cuts)
    shown = shown if len(shown) < 300 else shown[:300] + "..."
    raise ExportError(
        f"gguf: llama.cpp's name for this pre-tokenizer is not known here: {shown}; give the tokenizer of a GGUF file with --tokenizer"
    )


def of_file(path: Path, rows: int) -> Metadata:
    """``tokenizer.*`` of a GGUF file, as it is. Raises ExportError where it has none, or one of another size than ``rows``."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    tokens = found.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ExportError(f"{path}: holds no tokenizer")
    if len(tokens) != rows:
        raise ExportError(f"{path}: its tokenizer has {len(tokens)} tokens, the embedding {rows} rows; is it of this model?")
    return found
