"""``dither run``: text from a model or checkpoint."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from dither.cli import lean
from dither.cli import options as o


def command(
    model: o.Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at the most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 = all.")] = 0,
    presence_penalty: Annotated[float, typer.Option(min=-2.0, max=2.0, help="Taken off the score of a token that was made.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(min=-2.0, max=2.0, help="Taken off for each time that it was made.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may repeat.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    seed: o.Seed = 0,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32 or bfloat16.")] = "float32",
    json: o.Json = False,
) -> None:
    """Generate text, streamed as it comes.

    Example: dither run smollm2-w4 "The capital of France is" --max-tokens 20
    """
    from dither.errors import UsageError

    if not prompt:
        raise UsageError("the prompt is empty")
    if stop and not all(stop):
        raise UsageError("--stop: a stop string is empty")
    with lean.imports():
        from dither.quant.evaluate import open_model
        from dither.quant.generate import Sampling, generate

        sampling = Sampling(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ()),
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        )  # fmt: skip
        network, tokenizer = open_model(model, dtype)
    started = time.perf_counter()
    first: list[float] = []

    def show(piece: str) -> None:
        if not first:
            first.append(time.perf_counter() - started)
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    result = generate(network, tokenizer, prompt, sampling, chat=chat, on_text=show)
    if json:
        record: dict[str, Any] = {
            "text": result.text,
            "tokens": result.tokens,
            "prompt_tokens": result.prompt_tokens,
            "stopped_by": result.stopped_by,
            "seconds": result.seconds,
            "prompt_seconds": result.prompt_seconds,
            "tokens_per_second": result.tokens_per_second,
            "first_text_seconds": first[0] if first else None,
            "seed": seed,
        }
        o.emit(record)
    else:
        print()
        o.say(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s")
