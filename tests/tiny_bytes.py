"""A tiny random Llama whose tokenizer is byte-level BPE, as llama.cpp wants it: rows of whole blocks of 32, 320 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiny_folder

TOKENS = 320


def tokenizer(digits: bool = True) -> Any:
    """Trained on `tiny_folder.text`; ``digits``: numbers are cut into single digits first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    inner.pre_tokenizer = pre_tokenizers.Sequence(cuts) if digits else byte_level
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - 4, special_tokens=["<s>", "</s>", "<|x|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(tiny_folder.text().split("\n"), trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


def save(folder: Path, *, tied: bool = True, digits: bool = True, seed: int = 0, **settings: Any) -> nn.Module:
    """Write model and tokenizer into ``folder``; returns the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {
        "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 2.0**-17, "tie_word_embeddings": tied,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(common | settings))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # norms and embeddings that tell apart what goes wrong
                parameter.add_(torch.randn_like(parameter) * (0.3 if "embed" in name or parameter.dim() == 1 else 0.1))
    model.save_pretrained(folder)
    tokenizer(digits).save_pretrained(folder)
    return model
