"""What is read lazily is bit for bit what transformers loads, for models of every build: parameters, buffers, ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dither import models

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WITHOUT_HEAD_DIM = {k: v for k, v in COMMON.items() if k != "head_dim"}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
SPEECH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", COMMON | {"rope_parameters": ROPE | {"original_max_position_embeddings": 32}}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", COMMON),
    "Phi3ForCausalLM": ("Phi3Config", WITHOUT_HEAD_DIM),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "GptOssForCausalLM": ("GptOssConfig", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config", WITHOUT_HEAD_DIM | LATENT | EXPERTS | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPTForCausalLM": ("OPTConfig", WITHOUT_HEAD_DIM | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    "T5ForConditionalGeneration": (
        "T5Config", {"vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        SPEECH | {"vocab_size": 96, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_source_positions": 20},
    ),
    "SwinForImageClassification": (
        "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_same_as_transformers(name: str, save: Callable[..., Path]) -> None:
    import transformers

    config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    folder = save(model)
    theirs = getattr(transformers, name).from_pretrained(folder)
    source = models.open(folder)
    assert not isinstance(source, models.MemorySource) and source.notes == []
    ours, _ = models.load(folder)
    assert type(ours) is type(theirs)
    state = theirs.state_dict()
    assert set(source.names()) == set(state)
    for key, tensor in state.items():
        assert torch.equal(source.tensor(key), tensor), key
    for kind in ("named_parameters", "named_buffers"):
        expected, got = dict(getattr(theirs, kind)()), dict(getattr(ours, kind)())
        assert set(got) == set(expected)
        for key, tensor in expected.items():
            assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
