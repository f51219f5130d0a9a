"""transformers' reading of GGUF metadata, without its cost for large vocabularies.

transformers turns a vocabulary of 50 000 tokens and as many merges into 150 000 array objects, twice (config and
tokenizer), to use no more than their number: 5 seconds for a small model. Within `short_arrays` the gguf package's
reader skips over long arrays instead: they keep their length, and every element reads as the first. The tokenizer
itself reads the file by another way, which this leaves alone.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

_LONG = 1024  # elements; the arrays that configs are made of have one a layer
_ARRAY, _STRING = 9, 8


@contextmanager
def short_arrays() -> Iterator[None]:
    """Skip long arrays in every ``gguf.GGUFReader`` that is made within. Not for concurrent use."""
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc,unused-ignore]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != _ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            raw: Any = self.data
            inner, count = struct.unpack_from("<IQ", raw, orig_offs)
            if count <= _LONG:
                return super()._get_field_parts(orig_offs, raw_type)
            size, parts, data, types = super()._get_field_parts(orig_offs + 12, inner)
            end = orig_offs + 12
            if inner == _STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", raw, end)[0]
            else:
                end += count * size
            head = [self._get(orig_offs, "uint32"), self._get(orig_offs + 4, "uint64")]
            plain = [np.asarray(part) for part in parts]  # a mapped file's array is slow to go through, and is gone through count times
            return end - orig_offs, [*head, *plain], [2 + i for i in data] * count, [gguf.GGUFValueType.ARRAY, *types]

    with mock.patch.object(gguf, "GGUFReader", Reader):
        yield


def quickly(call: Callable[[], Any]) -> Any:
    """``call()`` within `short_arrays`; without, should that fail (another version of gguf, damaged metadata)."""
    if not hasattr(optional_module("transformers.integrations.gguf"), "get_gguf_tokenizer"):
        return call()  # this transformers takes the vocabulary from the reader too
    try:
        with short_arrays():
            return call()
    except Exception:  # whatever is wrong, the plain way reports it
        return call()


def optional_module(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
