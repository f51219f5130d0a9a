"""PB-LLM (arXiv 2310.00034): a small share of salient weights at 8 bits saves a model whose other weights have one bit each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dither import models
from dither.claims.claim import Claim, Figures, Say, Test
from dither.claims.work import CAVEAT, MODEL, SAMPLES, TOKENS, WORK, data, float_perplexity, measured, texts
from dither.formats import Int, PartialBinary, group
from dither.quant.chain import block_chain
from dither.quant.evaluate import open_model
from dither.quant.recipes import GPTQ, PBLLM, RTN
from dither.quant.rounding.nearest import nearest
from dither.quant.rounding.partial_binary import PartialBinaryColumns, row_errors
from dither.quant.statistics import HESSIAN, Statistics

SHARES = (0.1, 0.3, 0.5)
BASELINE = Int(2) @ group(64)  # of layer errors
ARMS = {
    **{f"{way} {metric}": {"metric": metric, "compensate": way == "GPTQ"} for way, metric in product(("GPTQ", "RTN"), ("hessian", "magnitude"))},
    **{f"{way} reference": {"stats": "reference", "compensate": way == "GPTQ"} for way in ("GPTQ", "RTN")},
}


def layer_errors(model: nn.Module, tokens: Tensor) -> Figures:
    """Output error ``tr(E H E^T)`` of each arm at each share, over that of 2-bit round-to-nearest in groups of 64, summed over the linear layers
    of the block at a third of the depth, whose inputs on ``tokens [N, L]`` are the float model's."""
    chain = block_chain(model)
    assert chain is not None
    block = chain[len(chain) // 3][1]
    layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
    inputs = gather(model, block, layers, tokens)
    total: Figures = {}
    for layer in layers:
        weight, statistics = layer.weight.detach().float(), inputs[layer]

        def add(name: str, decoded: Tensor, weight: Tensor = weight, hessian: Tensor = statistics.hessian) -> None:
            total[name] = total.get(name, 0.0) + float(row_errors(decoded.double() - weight.double(), hessian).sum())

        add("base", nearest(weight, BASELINE).dequantize())
        for share, (arm, knobs) in product(SHARES, ARMS.items()):
            rounded = PartialBinaryColumns(**knobs).round(weight, PartialBinary(share), {}, statistics)  # type: ignore[arg-type]
            add(f"layer {arm} {share:g}", rounded.tensor.dequantize())
    base = total.pop("base")
    return {name: value / base for name, value in total.items()}


class _Seen(Exception):
    """The block has run: what follows is not needed."""


@torch.no_grad()
def gather(model: nn.Module, block: nn.Module, layers: list[nn.Linear], tokens: Tensor) -> dict[nn.Linear, Statistics]:
    """Statistics of the input of each layer of a block; layers that read one tensor share them."""
    found: dict[nn.Linear, Statistics] = {}
    by_input: dict[int, Statistics] = {}
    seen: set[int] = set()

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        key = id(args[0])
        if module not in found:
            found[module] = by_input.setdefault(key, Statistics(module.in_features, frozenset({HESSIAN})))
        if key not in seen:
            seen.add(key)
            held.append(args[0])  # an id is only its own while the tensor lives
            found[module].update(args[0].reshape(-1, module.in_features))

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Seen

    held: list[Tensor] = []
    handles = [*(layer.register_forward_pre_hook(look) for layer in layers), block.register_forward_hook(stop)]
    try:
        for batch in _batches(tokens):
            held.clear()
            seen.clear()
            by_input.clear()
            with suppress(_Seen):
                model(input_ids=batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _batches(tokens: Tensor) -> Iterator[Tensor]:
    yield from torch.split(tokens, max(1, 2048 // tokens.shape[1]))


@lru_cache(maxsize=1)
def _float_model() -> tuple[nn.Module, Any]:
    return open_model(MODEL)


def measure(seed: int, say: Say) -> Figures:
    figures: Figures = {"float perplexity": float_perplexity()}
    model, tokenizer = _float_model()
    tokens = models.calibration_tokens(texts()[0], tokenizer, samples=SAMPLES, length=TOKENS, seed=seed)
    figures |= layer_errors(model, tokens)
    for share in SHARES:
        figures |= measured(PBLLM(salient=share), seed, say, f"PB-GPTQ {100 * share:g} %")
    figures |= measured(PBLLM(salient=0.1, compensate=False), seed, say, "RTN-PB 10 %")
    figures |= measured(PBLLM(salient=0, metric="magnitude", compensate=False), seed, say, "binary")
    figures |= measured(RTN(bits=2, group=64), seed, say, "RTN 2-bit")
    figures |= measured(GPTQ(bits=2, group=64), seed, say, "GPTQ 2-bit")
    figures |= measured(GPTQ(bits=3, group=64), seed, say, "GPTQ 3-bit")
    return figures


def _everywhere(figures: Figures, arm: str, other: str, factor: float = 1.0) -> bool:
    """Whether ``arm``'s layer error is at most ``factor`` of ``other``'s at every share."""
    return all(figures[f"layer {arm} {s:g}"] <= factor * figures[f"layer {other} {s:g}"] for s in SHARES)


CLAIM = Claim(
    name="pb-llm",
    sentence="A small share of salient weights at 8 bits keeps the language ability that plain binarisation destroys.",
    source="Shang et al., ICLR 2024, arXiv 2310.00034; repository hahnyuan/PB-LLM",
    work=f"{WORK}; layer errors on one block",
    data=data,
    measure=measure,
    tests=(
        Test("compensation leaves at most 40 % of the layer error at every share", lambda f: _everywhere(f, "GPTQ hessian", "RTN hessian", 0.4)),
        Test(
            "salient by the Hessian is no worse than by magnitude in the layers, with compensation",
            lambda f: _everywhere(f, "GPTQ hessian", "GPTQ magnitude"),
        ),
        Test(
            "least-squares levels are no worse than the authors' in the layers, with compensation",
            lambda f: _everywhere(f, "GPTQ hessian", "GPTQ reference"),
        ),
        Test(
            "perplexity falls as the salient share rises",
            lambda f: f["PB-GPTQ 50 % perplexity"] < f["PB-GPTQ 30 % perplexity"] < f["PB-GPTQ 10 % perplexity"],
        ),
        Test(
            "plain binarisation is ten times worse than any other arm of the method",
            lambda f: f["binary perplexity"]
            >= 10 * max(f["RTN-PB 10 % perplexity"], *(f[f"PB-GPTQ {100 * s:g} % perplexity"] for s in SHARES)),
        ),
        Test(
            "10 % salient is better than round-to-nearest at 2 bits, at nearly the same true bits",
            lambda f: f["PB-GPTQ 10 % perplexity"] < f["RTN 2-bit perplexity"],
        ),
    ),
    caveat=CAVEAT + " At 1.7 to 2.7 bits a model of this size is broken in absolute terms: the order is the claim.",
)
