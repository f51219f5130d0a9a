"""A tiny random Llama with a tokenizer of one token a character, saved as its users would get it: for tests of whole commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import tiny_models


def tokenizer() -> Any:
    """One token a character of 93, anything else is ``<unk>``; fits the vocabulary of `tiny_models`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(c) for c in range(32, 127))][: tiny_models.VOCABULARY - 3]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(folder: Path, name: str = "llama-tied") -> nn.Module:
    """Write the model and the tokenizer into ``folder``; returns the model."""
    model, _ = tiny_models.build(name)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def text(sentences: int = 120, seed: int = 0) -> str:
    """Some words, seeded."""
    import random

    draw = random.Random(seed)
    words = ["few", "bits", "lose", "less", "when", "noise", "is", "added", "on", "purpose", "and", "every", "stored", "byte", "counts"]
    return "\n".join(" ".join(draw.choices(words, k=9)) + "." for _ in range(sentences))
