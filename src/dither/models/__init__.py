"""Models and text, read without trust and without haste.

`open` gives a `Source`: a checkpoint (hub id, folder, GGUF file, the embedded ``smollm2``) whose weights are read
tensor by tensor when asked for. `load` gives the whole float model. `calibration_tokens` turns whatever text a user has
into token windows. Nothing is ever unpickled, and no code that a checkpoint brings along is run.
"""

from __future__ import annotations

from dither.models.memory import MemorySource
from dither.models.opening import check_folder, load
from dither.models.opening import open_source as open
from dither.models.skeleton import auto_class
from dither.models.source import Source, return_freed_memory
from dither.models.text import calibration_tokens, embedded_text, read_text, wikitext_join

__all__ = [
    "MemorySource",
    "Source",
    "auto_class",
    "calibration_tokens",
    "check_folder",
    "embedded_text",
    "load",
    "open",
    "read_text", "return_freed_memory",
    "wikitext_join",
]
