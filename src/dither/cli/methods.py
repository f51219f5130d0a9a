"""``dither methods``: what each method is called, where it comes from, and its knobs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dither.cli import options as o


def command(
    name: Annotated[str | None, typer.Argument(help="One method; without it, all.", show_default=False)] = None,
    json: o.Json = False,
) -> None:
    """List the methods and their knobs, with defaults and sources.

    Example: dither methods gptq
    """
    from dither.quant import recipes

    names = [recipes.find(name).name] if name else sorted(recipes.METHODS)
    record: dict[str, dict[str, Any]] = {}
    for method in names:
        cls = recipes.find(method)
        record[method] = {
            "source": cls.source,
            "doc": " ".join((cls.__doc__ or "").split()),
            "knobs": {
                k: {"type": getattr(t, "__name__", str(t)), "default": d}
                for k, (t, d) in recipes.knobs(method).items()
                if k != "overrides"
            },
        }
    if json:
        o.emit(record)
        return
    for method, facts in record.items():
        print(f"{method}  ({facts['source']})")
        print(f"  {facts['doc']}")
        for knob, about in facts["knobs"].items():
            print(f"  --set {knob}={about['default']}  ({about['type']})")
