"""Finds the chain of repeated blocks by which a model can be streamed, from its module tree alone (no weight is read)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def block_chain(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Names and modules of the blocks, in order; None where the model is not one chain.

    A chain is a list of modules of one class that holds most of the parameters outside of embeddings and head, and is not
    inside another such list. Encoder-decoder models and pyramids have several: those are handled whole.
    """
    lists: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(name.startswith(n + ".") for n, _ in lists):
            continue
        children = list(module.named_children())
        if len(children) > 0 and len({type(m) for _, m in children}) == 1 and _layers(module) > 0:
            own = children[0][1]
            if isinstance(own, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
                continue  # a stack of bare layers has no block boundary worth pausing at
            if not _one_width(m for _, m in children):
                continue  # stages of a pyramid: what one returns is not what the next takes
            lists.append((name, [(f"{name}.{n}" if name else n, m) for n, m in children]))
    if not lists:
        return None
    total = _layers(model)
    name, blocks = max(lists, key=lambda item: sum(_layers(m) for _, m in item[1]))
    outside = total - sum(_layers(m) for _, m in blocks)
    return blocks if outside - _head(model) <= 0.02 * total else None


def every_block(model: nn.Module) -> list[str]:
    """Names of the blocks of the chain; none where there is no chain. Blocks that stand in the list several times count under their first name if
    the whole list is repeated (they are one block, called again and again), else under all."""
    names = [name for name, _ in block_chain(model) or ()]
    if not names:
        return names
    path = names[0].rpartition(".")[0]
    listed = model.get_submodule(path)._modules
    order = [id(block) for block in listed.values()]
    if order == order[: len(names)] * (len(order) // len(names)):
        return names
    return [f"{path}.{key}" if path else key for key in listed]


def _one_width(blocks: Iterable[nn.Module]) -> bool:
    """Whether the factors of norms (vectors called weight) have one size in all blocks that have them."""
    sizes: dict[str, torch.Size] = {}
    for block in blocks:
        for name, p in block.named_parameters():
            if p.dim() == 1 and name.rpartition(".")[2] == "weight" and sizes.setdefault(name, p.shape) != p.shape:
                return False
    return True


def _head(model: nn.Module) -> int:
    """Weights of the layer that transformers calls the output embedding, unless it is tied (then `_layers` leaves it out already)."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return _layers(model) - _layers_without(model, head) if isinstance(head, nn.Linear) else 0


def _layers_without(model: nn.Module, head: nn.Module) -> int:
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in embedded)


def _layers(module: nn.Module) -> int:
    """Parameters with two or more dimensions, embeddings aside."""
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in embedded)
