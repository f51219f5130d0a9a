"""``dither eval``: perplexity of a language model or checkpoint, accuracy of one of images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dither.cli import options as o


def command(
    model: o.Model,
    text: o.Text = None,
    windows: o.Windows = None,
    length: o.WindowLength = 2048,
    join: o.Join = "none",
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32 or bfloat16.")] = "float32",
    images: Annotated[
        str | None,
        typer.Option(help="Labelled images, for a model of images: an .npz file (images, labels).", show_default="Fashion-MNIST's, if it knows them"),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images to judge on, the first ones.", show_default="all")] = None,
    json: o.Json = False,
) -> None:
    """Perplexity, as the field computes it: windows that do not overlap, each read on its own. Of a model of images: its top-1 accuracy.

    Example: dither eval smollm2 --text wiki.test.raw --join wikitext --windows 16
    """
    import dither
    from dither.quant.evaluate import open_model

    given = o.evaluation_text(text, join) if text is not None or join != "none" else None  # a wrong name is told before a model is read
    network, tokenizer = open_model(model, dtype)
    if dither.models.takes_images(getattr(network, "config", None)):
        _accuracy(model, network, images, count, json)
        return
    content = o.evaluation_text(text, join) if given is None else given
    with o.window_progress(f"eval {model}") as progress:
        result = dither.perplexity(network, content, tokenizer, windows=windows, length=length, progress=progress)
    if json:
        o.emit({"perplexity": result.perplexity, "tokens": result.tokens, "seconds": result.seconds})
    else:
        print(
            f"perplexity {result.perplexity:.3f} on {result.windows} windows of {length} tokens ({result.seconds:.1f} s)"
        )


def _accuracy(model: str, network: Any, images: str | None, count: int | None, json: bool) -> None:
    import dither

    settings = dither.models.preprocessor(model)
    pixels, labels = dither.models.labelled_images(images, network.config, settings, count)
    with o.window_progress(f"eval {model}") as progress:
        result = dither.accuracy(network, pixels, labels, progress=progress)
    if json:
        o.emit({"accuracy": result.accuracy, "images": result.images, "seconds": result.seconds})
    else:
        print(f"accuracy {result.accuracy:.4f} on {result.images} images ({result.seconds:.1f} s)")
