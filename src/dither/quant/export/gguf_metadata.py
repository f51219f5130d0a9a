"""What a GGUF file says about the model: transformers' config under the keys that llama.cpp reads.

transformers' own table for reading says which key is which attribute. It leaves some out that llama.cpp wants; those that are plain attributes of a
config are here. What GGUF, as transformers reads it, would lose of a config is found by reading the file again and comparing (`lost`).
"""

from __future__ import annotations

from typing import Any

from dither.quant.export.gguf_names import Architecture

# Key -> attributes, of which the first that a config has is written where transformers' table has none: configs of different ages call one thing by
# several names, and that table misses some.
EXTRA = {
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "rope.freq_base": ("rope_theta",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# Attributes that no forward pass of an evaluation depends on, or that follow from others. Token ids are the tokenizer's.
IDLE = {
    "_name_or_path", "_model_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "eos_token_id", "hidden_dropout", "initializer_range", "initializer_factor", "max_window_layers",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "return_dict", "torch_dtype", "transformers_version",
    "use_cache", "is_encoder_decoder", "problem_type", "id2label", "label2id", "router_aux_loss_coef", "output_router_logits", "head_dim",
    "sliding_window_pattern", "_sliding_window_pattern", "unk_token_id",
}


def described(architecture: Architecture, config: Any, hidden: int | None) -> dict[str, Any]:
    """Metadata key -> value, of one model; ``hidden``: outputs of the first layer of a block's feed-forward part, for configs that do not say.
    Attributes that the config lacks are left out."""
    found = {}
    for key in {**architecture.keys, **EXTRA}:
        names = ([theirs] if (theirs := architecture.keys.get(key)) else []) + list(EXTRA.get(key, ()))
        value = next((v for name in names if (v := attribute(config, name)) is not None), None)
        if value is not None:
            found[key] = value
    if hidden is not None:
        found.setdefault("feed_forward_length", hidden)
    size = attribute(config, "head_dim")
    if "rope.dimension_count" in architecture.keys and size is not None:
        found["rope.dimension_count"] = int(size * (attribute(config, "partial_rotary_factor") or 1))
    return {f"{architecture.name}.{key}": value for key, value in found.items()}


def attribute(config: Any, name: str) -> Any:
    """``config.name``, looked for in its rotary parameters too; the size of a head follows from the others where it is not given."""
    value = getattr(config, name, None)
    rotary = getattr(config, "rope_parameters", None)
    if value is None and isinstance(rotary, dict):
        value = rotary.get(name)
    if value is None and name == "head_dim" and getattr(config, "num_attention_heads", None):
        value = config.hidden_size // config.num_attention_heads
    return value


def lost(config: Any, read: Any) -> list[str]:
    """What ``read``, the config that transformers makes of the file, says otherwise than ``config``. What only one of them has is no attribute of
    this kind of config, so its model does not look at it."""
    ours, theirs = config.to_dict(), read.to_dict()
    found = []
    for key in sorted((ours.keys() & theirs.keys()) - IDLE):
        a, b = _plain(ours.get(key)), _plain(theirs.get(key))
        if a != b:
            found.append(f"{key}: {ours.get(key)} is read as {theirs.get(key)}")
    if attribute(config, "head_dim") != attribute(read, "head_dim"):
        found.append(f"head_dim: {attribute(config, 'head_dim')} is read as {attribute(read, 'head_dim')}")
    return found


def _plain(value: Any) -> Any:
    """``value`` as metadata can hold it: floats are float32."""
    if isinstance(value, float):
        return f"{value:.6e}"
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value
