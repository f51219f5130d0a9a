"""Tiny random models of many architectures: ``build(name) -> (model, sample)``, float32, evaluation mode, seeded, each in well under a second.

``sample`` is a dict of named arguments (a tensor for the plain torch models). ``NAMES`` lists them all; ``LANGUAGE`` those
that are causal language models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, TOKENS = 96, 11

Builder = Callable[[], tuple[nn.Module, Any]]
_BUILDERS: dict[str, Builder] = {}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """The model and a sample for it. KeyError for an unknown name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, sample = _BUILDERS[name]()
        return model.eval(), sample


def ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens))


def _language(name: str, model: str, config: str, **settings: Any) -> None:
    def builder() -> tuple[nn.Module, Any]:
        common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        made = getattr(hf, model)(getattr(hf, config)(**(common | settings)))
        return made, {"input_ids": ids()}

    _BUILDERS[name] = builder


_GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_language("llama", "LlamaForCausalLM", "LlamaConfig", **_GATED)
_language("llama-tied", "LlamaForCausalLM", "LlamaConfig", **_GATED, tie_word_embeddings=True)
_language("mistral", "MistralForCausalLM", "MistralConfig", **_GATED, sliding_window=8)
_language("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **_GATED)
_language("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **_GATED, head_dim=8)
_language("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **_GATED, head_dim=8, query_pre_attn_scalar=8)
_language(
    "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
)
_language("phi3", "Phi3ForCausalLM", "Phi3Config", **_GATED)
_language(
    "granite",
    "GraniteForCausalLM",
    "GraniteConfig",
    **_GATED,
    residual_multiplier=0.3,
    embedding_multiplier=5.0,
    logits_scaling=2.0,
)
_language("olmo2", "Olmo2ForCausalLM", "Olmo2Config", **_GATED)
_language("stablelm", "StableLmForCausalLM", "StableLmConfig", **_GATED, qk_layernorm=True, use_qkv_bias=True)
_language("mixtral", "MixtralForCausalLM", "MixtralConfig", **_GATED, num_local_experts=4, num_experts_per_tok=2)
_language(
    "qwen2-moe",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    **_GATED,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    num_experts=4,
    num_experts_per_tok=2,
)
_language(
    "qwen3-moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    **_GATED,
    head_dim=8,
    moe_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
)
_language(
    "gpt-oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    **_GATED,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
)
_language("gpt2", "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64)
_language(
    "gpt-neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
_language(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)
_language("bloom", "BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4)
_language("falcon", "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_language(
    "falcon-new",
    "FalconForCausalLM",
    "FalconConfig",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    new_decoder_architecture=True,
    bias=True,
)
_language(
    "mamba", "MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4
)
_language(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    hidden_size=32,
    num_hidden_layers=2,
    state_size=8,
    num_heads=4,
    head_dim=16,
    n_groups=2,
    chunk_size=8,
)

LANGUAGE = list(_BUILDERS)
RECORDED = ("llama", "llama-tied", "qwen2", "qwen3", "phi3", "granite", "olmo2", "stablelm", "gpt-neox")  # whose steps become programs


def _register(name: str) -> Callable[[Builder], Builder]:
    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


@_register("bert")
def _bert() -> tuple[nn.Module, Any]:
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return hf.BertForMaskedLM(config), {"input_ids": ids()}


@_register("vit")
def _vit() -> tuple[nn.Module, Any]:
    config = hf.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


@_register("swin")
def _swin() -> tuple[nn.Module, Any]:
    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return hf.SwinForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@_register("t5")
def _t5() -> tuple[nn.Module, Any]:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(tokens=7)}


@_register("whisper")
def _whisper() -> tuple[nn.Module, Any]:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": ids(tokens=7),
    }


@_register("mlp")
def _mlp() -> tuple[nn.Module, Any]:
    layers = [
        nn.Linear(12, 24),
        nn.ReLU(),
        nn.Linear(24, 20),
        nn.LeakyReLU(0.1),
        nn.Linear(20, 24),
        nn.GELU(),
        nn.Linear(24, 6),
    ]
    return nn.Sequential(*layers), torch.randn(9, 12)


@_register("conv")
def _conv() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 10, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    )
    for part in model:
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(3, 3, 12, 12)


NAMES = list(_BUILDERS)
