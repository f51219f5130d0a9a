"""Tiny checkpoints and a tiny tokenizer, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 96


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a word of three known ones, else one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _tiny(kind: str, **changes: Any) -> nn.Module:
    """A random model of a few thousand weights."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = common | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**(llama | changes)),
        "mixtral": lambda: t.MixtralConfig(**(llama | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes)),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(
            **(
                llama
                | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
                | {"shared_expert_intermediate_size": 24}
                | changes
            )
        ),
        "gpt2": lambda: t.GPT2Config(
            **(common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | changes)
        ),
        "bert": lambda: t.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        "vit": lambda: t.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    }
    torch.manual_seed(0)
    config = configs[kind]()
    classes = {"bert": "BertForMaskedLM", "vit": "ViTForImageClassification"}
    maker = getattr(t, classes[kind])._from_config if kind in classes else t.AutoModelForCausalLM.from_config
    model: nn.Module = maker(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a tensor in the wrong place shows
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """``tiny(kind, **config_changes)``: a random model of a few thousand weights."""
    return _tiny


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model as its users would get it: one file, or shards of at most ``shard`` bytes."""

    def write(model: Any, shard: str = "5GB", name: str = "model") -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard)
        return folder

    return write
