"""ONNX, which onnxruntime runs: ``model.onnx``, the forward pass of the model with few-bit layers as ``com.microsoft.MatMulNBits``.

    B            uint8 [O, ceil(I / block), block b / 8]   codes of b = 4 or 8 bits, LSB first; a shorter last block is padded
    scales       float32 [O, ceil(I / block)]
    zero_points  uint8 [O, ceil(ceil(I / block) b / 8)]    left out where all are in the middle, 2^(b-1)
    y = x W^T,  W[o, i] = scales (B - zero_points)

Blocks are powers of two from 16; a group of ours is cut into blocks that repeat its scale, so groups are multiples of 16, or rows. Codes of fewer
bits are stored in 4 or 8 with the values they have, so W is ours; products are summed in another order than ours. ``accuracy_level`` is 1: x stays
float32 (a runtime may round it to 8 bits where that is 4).

The graph is what torch.export traces: float32, any batch and length, no cache of keys and values, no padding. Everything else than the few-bit
layers is float32, embeddings and heads too. Needs the packages onnx and onnxscript.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import ExportError, UsageError
from dither.formats import Int, QTensor, Scheme, channel, group
from dither.formats.packing import pack_rows
from dither.models.source import tied_names
from dither.quant.assemble import fill, tie
from dither.quant.export.gptq_layout import zero_points
from dither.quant.export.target import Misfits, Opened, Target, Weight, divisor, no_integers, no_layer
from dither.quant.store import write_text

FILE = "model.onnx"
BLOCKS = (128, 64, 32, 16)
INSIDE = 10**9  # bytes of weights up to which they lie in the file itself, which can have 2 GiB


class MatMulNBits(nn.Module):
    """A Linear that traces as one node of few-bit weights; it does not compute."""

    def __init__(self, tensor: QTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.outputs, self.inputs = tensor.shape
        self.bits, self.block = width(tensor.grid), block(tensor.grid, self.inputs)
        for name, value in packed(tensor).items():
            self.register_buffer(name, value)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, *self.buffers(recurse=False)),
            attrs={"K": self.inputs, "N": self.outputs, "bits": self.bits, "block_size": self.block, "accuracy_level": 1},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.outputs),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def width(scheme: Scheme) -> int:
    """Bits of a stored code."""
    return 4 if scheme.format.bits <= 4 else 8


def block(scheme: Scheme, inputs: int) -> int:
    """The largest block that a group is a whole number of; a row of any length is, because its last block may be shorter."""
    size = scheme.blocks.columns(inputs)
    return divisor(inputs if size >= inputs else size, BLOCKS) or BLOCKS[-1]


def packed(tensor: QTensor) -> dict[str, Tensor]:
    """The inputs of the node behind x, in their order."""
    scheme, (rows, inputs) = tensor.grid, tensor.shape
    assert isinstance(scheme.format, Int)
    bits, size = width(scheme), block(scheme, inputs)
    count = -(-inputs // size)
    codes = torch.zeros(rows, count * size, dtype=torch.uint8)
    codes[:, :inputs] = tensor.codes
    at = scheme.column_groups(inputs)[::size]  # the group of each block
    zero = zero_points(tensor)[:, at]
    found = {
        "B": pack_rows(codes, bits).view(rows, count, -1),  # whole blocks are whole words: no padding between rows
        "scales": tensor.params["scale"][:, at].contiguous(),
    }
    if not bool((zero == 1 << (bits - 1)).all()):
        found["zero_points"] = pack_rows(zero.contiguous(), bits)[:, : -(-count * bits // 8)].contiguous()
    return found


def misfits(weights: Sequence[Weight]) -> Misfits:
    return {weight.name: why for weight in weights if (why := _misfit(weight))}


def _misfit(weight: Weight) -> str:
    if why := no_layer(weight) or no_integers(weight.scheme):
        return why
    assert isinstance(weight.scheme, Scheme)
    size = weight.scheme.blocks.columns(weight.shape[1])
    return f"its groups of {size} are not whole blocks of {BLOCKS[-1]}" if size < weight.shape[1] and size % BLOCKS[-1] else ""


def nearest(weights: Sequence[Weight], bits: int) -> dict[str, Scheme]:
    """Integers with zero points, in groups of 128 to 16, or rows."""
    found = {}
    for weight in weights:
        if _misfit(weight) and not no_layer(weight):
            size = divisor(weight.shape[1], BLOCKS)
            found[weight.name] = Int(bits) @ (channel() if size is None else group(size))
    return found


def write(checkpoint: Opened, out: Path) -> list[str]:
    """Memory: the model with few-bit layers, and twice that while it is written."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"--to onnx: needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    network, nbytes = _model(checkpoint)
    with _quiet():
        try:
            program: Any = torch.onnx.export(Forward(network), dynamo=True, verbose=False, **_traced(network))
        except Exception as error:  # tracing fails in as many ways as there are models
            text = " ".join(str(error).split())
            raise ExportError(f"onnx: torch cannot trace this model ({type(error).__name__}: {text[:200]})") from None
        program.save(str(out / FILE), external_data=nbytes > INSIDE)
    checkpoint.sidecars(out)
    write_text(out / "config.json", json.dumps(checkpoint.plain_config(), indent=2, sort_keys=True))
    return ["the graph has no cache of keys and values: each token that is generated reads the whole text again"] if _reads_tokens(network) else []


class Forward(nn.Module):
    """``model(input)`` as a function of one tensor to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: Tensor) -> Tensor:
        options = {"use_cache": False} if _reads_tokens(self.model) else {}
        found: Tensor = self.model(data, **options).logits
        return found


def _reads_tokens(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "input_ids"


def _model(checkpoint: Opened) -> tuple[nn.Module, int]:
    """The model in float32, with few-bit layers that trace as such, and the bytes of its tensors."""
    network = checkpoint.skeleton()
    aliases = tied_names(network)
    for weight in checkpoint.to_write():
        owner, _, leaf = weight.layer.rpartition(".")
        old = network.get_submodule(weight.layer)
        setattr(network.get_submodule(owner), leaf, MatMulNBits(checkpoint.qtensor(weight), getattr(old, "bias", None)))
    fill(network, {name: t.float() if t.is_floating_point() else t for name, t in checkpoint.floats().items()})
    tie(network, aliases)
    tensors = {id(t): t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()]}
    return network.requires_grad_(False), sum(tensors.values())


def _traced(model: nn.Module) -> dict[str, Any]:
    """What torch.onnx.export is told of the input: a sample, its name, which sizes may differ."""
    config: Any = model.config
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    if _reads_tokens(model):
        longest = getattr(config, "max_position_embeddings", None) or 1 << 20
        sample, sizes = torch.zeros(2, 8, dtype=torch.long), {0: batch, 1: torch.export.Dim("length", min=2, max=longest)}
    elif getattr(model, "main_input_name", "") == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        sample, sizes = torch.zeros(2, config.num_channels, config.image_size, config.image_size), {0: batch}
    else:
        raise ExportError("onnx: can export models of tokens and of images of one size only")
    return {"args": (sample,), "dynamic_shapes": (sizes,), "input_names": [model.main_input_name], "output_names": ["logits"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch tells of packages that it could use, and of its own deprecated parts."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


TARGET = Target(
    name="onnx",
    holds="layers on integers of 1 to 8 bits in groups of 16 or multiples, or rows",
    misfits=misfits,
    nearest=nearest,
    write=write,
)
