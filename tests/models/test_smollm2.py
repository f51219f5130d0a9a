"""The embedded model against transformers' own reading of the same file."""

from __future__ import annotations

import pytest
import torch

from dither import models
from dither.models import embedded

pytestmark = pytest.mark.slow


def test_logits_are_those_of_transformers() -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = models.open("smollm2")
    model, tokenizer = models.load("smollm2")
    reference = source.skeleton()
    path = str(embedded.embedded_file())
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=source.skeleton())["tensors"]
    reference.load_state_dict(theirs, strict=False, assign=True)
    reference.tie_weights()
    assert not any(p.is_meta for p in reference.parameters())
    for name, tensor in theirs.items():
        assert torch.equal(source.tensor(name), tensor), name
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ours, others = model(**batch).logits, reference(**batch).logits
    assert torch.allclose(ours, others, atol=1e-5)
    assert tokenizer.decode(ours[0, -1].argmax()) == " Paris"


def test_reading_one_block_costs_one_block() -> None:
    import psutil

    source = models.open("smollm2")
    skeleton = source.skeleton()
    process = psutil.Process()
    for i in range(30):
        block = skeleton.get_submodule(f"model.layers.{i}")
        if i == 1:
            before = process.memory_info().rss
        source.fill(block, f"model.layers.{i}")
        size = sum(p.nbytes for p in block.parameters())
        if i >= 1:
            assert process.memory_info().rss - before < size + 40e6
        source.release(block)
