"""``dither eval``: perplexity of a model or checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli import options as o


def command(
    model: o.Model,
    text: o.Text = None,
    windows: o.Windows = None,
    length: o.WindowLength = 2048,
    join: o.Join = "none",
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32 or bfloat16.")] = "float32",
    json: o.Json = False,
) -> None:
    """Perplexity, as the field computes it: windows that do not overlap, each read on its own.

    Example: dither eval smollm2 --text wiki.test.raw --join wikitext --windows 16
    """
    import dither
    from dither.quant.evaluate import open_model

    content = o.evaluation_text(text, join)
    network, tokenizer = open_model(model, dtype)
    with o.window_progress(f"eval {model}") as progress:
        result = dither.perplexity(network, content, tokenizer, windows=windows, length=length, progress=progress)
    if json:
        o.emit({"perplexity": result.perplexity, "tokens": result.tokens, "seconds": result.seconds})
    else:
        print(
            f"perplexity {result.perplexity:.3f} on {result.windows} windows of {length} tokens ({result.seconds:.1f} s)"
        )
