"""Models and text, read without trust and without haste.

`open` gives a `Source`: a checkpoint (hub id, folder, GGUF file, the embedded ``smollm2``) whose weights are read
tensor by tensor when asked for. `load` gives the whole float model. `calibration_tokens` turns whatever text a user has
into token windows. Nothing is ever unpickled, and no code that a checkpoint brings along is run.
"""

from __future__ import annotations

from dither.models.images import calibration_images, labelled_images, normalised, preprocessor, takes_images
from dither.models.memory import MemorySource, RewrittenSource
from dither.models.opening import check_folder, load
from dither.models.opening import open_source as open
from dither.models.sharing import Shares, UntiedSource, find_shares, separate
from dither.models.skeleton import auto_class
from dither.models.source import Source, empty, return_freed_memory
from dither.models.text import calibration_tokens, embedded_text, read_text, wikitext_join

__all__ = [
    "MemorySource",
    "RewrittenSource",
    "Shares",
    "Source",
    "UntiedSource",
    "auto_class",
    "calibration_images",
    "calibration_tokens",
    "check_folder",
    "embedded_text",
    "empty",
    "find_shares",
    "labelled_images",
    "load",
    "normalised",
    "open",
    "preprocessor",
    "read_text",
    "return_freed_memory",
    "separate",
    "takes_images",
    "wikitext_join",
]
