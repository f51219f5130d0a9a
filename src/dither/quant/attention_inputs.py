"""Few-bit operands of attention: q and k of Q K^T, the probabilities A and v of A V, each rounded with parameters that are stored.

transformers hands every attention of a model to one function, named in the model's configuration. `operand_attention` is such a function; in
front of each product it rounds what the module's child ``operands`` has a quantizer for:

    O = round(A) round(V),   A = softmax(round(Q) round(K)^T scaling + mask)

Nothing is renormalised after rounding: rows of round(A) need not sum to 1 (nor do they in RepQ's code). Modules without such a child are computed in
float. Which modules are attentions is seen by running: `watched` tells of every call. Attention that does not go through transformers' function
is not seen, and stays float.

Record: ``{"attention": {module name: {operand: InputQuant record}}}`` beside the other surroundings; tensors: ``<module>.operands.<operand>.*``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError, ModelError
from dither.quant.inputs import InputQuant, InputRounding

IMPLEMENTATION = "dither_operands"  # the function's name in a configuration
CHILD = "operands"
OPERANDS = ("q", "k", "v", "probabilities")

Attention = dict[str, dict[str, Any]]
"""Module name -> operand -> record of an `InputQuant`."""
Watch = Callable[[nn.Module, Mapping[str, Tensor]], None]

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class Operands(nn.Module):
    """The quantizers of one attention module, as children named after the operands; what has none is left as it is."""

    def __init__(self, quantizers: Mapping[str, InputRounding]) -> None:
        super().__init__()
        self.used = False
        for name, quantizer in quantizers.items():
            self.add_module(name, quantizer)

    def rounded(self, name: str, x: Tensor) -> Tensor:
        self.used = True
        quantizer = self._modules.get(name)
        return x if quantizer is None else quantizer(x)


def operand_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """``query [B, H, T, d]``, ``key [B, G, S, d]``, ``value [B, G, S, e]``, G divides H -> ``[B, T, H, e]`` and the probabilities as rounded.

    ``attention_mask``: added to the logits, or bool (True: seen); None is causal where the module says that it is.
    """
    operands = module._modules.get(CHILD)
    assert operands is None or isinstance(operands, Operands)

    def rounded(name: str, x: Tensor) -> Tensor:
        return x if operands is None else operands.rounded(name, x)

    q, k, v = rounded("q", query), rounded("k", key), rounded("v", value)
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scaling is None else scaling)  # (B, H, T, S)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if attention_mask is None and causal and q.shape[2] > 1:
        attention_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if attention_mask is not None:
        unseen = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~attention_mask, unseen) if attention_mask.dtype == torch.bool else logits + attention_mask
    probabilities = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    watch = _watch.get()
    if watch is not None:
        watch(module, {"q": query, "k": key, "v": value, "probabilities": probabilities})
    probabilities = nn.functional.dropout(rounded("probabilities", probabilities), dropout, module.training)
    return (probabilities @ v).transpose(1, 2).contiguous(), probabilities


def register() -> None:
    """Make transformers know `operand_attention`. Safe to call more than once."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, operand_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use_operands(model: nn.Module) -> None:
    """Let every attention of ``model`` that asks its configuration go through `operand_attention`."""
    register()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation_internal = IMPLEMENTATION  # the setter would write through to those of parts


@contextmanager
def watched(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Within it, ``watch(module, operands)`` is called for each attention of ``model`` (a copy, whose configuration is changed for good), with
    the operands before rounding."""
    use_operands(model)
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def put_operands(model: nn.Module, attention: Mapping[str, Mapping[str, Any]], device: str = "meta") -> None:
    """Give attention modules their quantizers, without values. Raises CheckpointError where the model has no such module."""
    for name, records in attention.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{name}: is in the checkpoint, but not in the model") from None
        module.add_module(CHILD, Operands({operand: InputRounding.from_json(record, device) for operand, record in records.items()}))
        module.register_forward_hook(_must_have_rounded)


def _must_have_rounded(module: nn.Module, args: Any, output: Any) -> None:
    """Another attention may have been chosen since: then the results would be those of another model, without a word."""
    operands = module._modules[CHILD]
    assert isinstance(operands, Operands)
    if not operands.used:
        raise ModelError(f"{type(module).__name__}: its attention did not round its operands; leave attn_implementation as the checkpoint has it")
    operands.used = False


def checked(attention: Mapping[str, Mapping[str, Any]]) -> Attention:
    """The record of a checkpoint. Raises ValueError, KeyError, TypeError, AttributeError where it makes no sense."""
    found: Attention = {}
    for name, records in attention.items():
        unknown = set(records) - set(OPERANDS)
        if unknown or not records:
            raise ValueError(f"attention: {name}: operands are {', '.join(OPERANDS)}, not {sorted(records)}")
        for record in records.values():
            InputRounding.from_json(record)
        found[str(name)] = {str(operand): dict(record) for operand, record in records.items()}
    return found


def tensors(name: str, operands: Mapping[str, InputQuant]) -> dict[str, Tensor]:
    """What is stored of the module ``name``, under full names."""
    return {f"{name}.{CHILD}.{operand}.{key}": value for operand, quant in operands.items() for key, value in quant.tensors().items()}


def owners(attention: Attention) -> set[str]:
    """The names of the modules that hold the stored tensors."""
    return {f"{name}.{CHILD}.{operand}" for name, records in attention.items() for operand in records}
