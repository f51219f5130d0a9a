"""``dither serve``: text from a model or checkpoint over HTTP, for OpenAI's clients."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from dither.cli import options as o

_NEEDS = ("fastapi", "starlette", "uvicorn", "prometheus_client")


def command(
    model: o.Model,
    host: Annotated[str, typer.Option(help="Address to listen at; beyond this machine only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DITHER_API_KEY", help="What clients must send; better given as DITHER_API_KEY.", show_default="none")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.", show_default="the folder's name")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts made at once; 8 share one reading of the weights.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are refused (429).")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text at the most.")] = 1024,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and text together.", show_default="what the model can place")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request at the most.")] = 4 << 20,
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32 or bfloat16.")] = "float32",
    json: o.Json = False,
) -> None:
    """Serve the model as OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models; and /health, /metrics.

    Example: dither serve smollm2-w4 --port 8000
    """
    from dither.errors import DitherError, UsageError
    from dither.quant.evaluate import open_model

    try:
        from dither.serve.server import Server, bind
        from dither.serve.service import Limits, Service
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDS:
            raise
        raise DitherError(f"dither serve needs {error.name}: pip install 'dither[serve]'") from None
    if api_key is not None and not api_key.strip():
        raise UsageError("--api-key: is empty")
    if api_key is None and not _is_loopback(host):
        raise UsageError(f"--host {host}: anybody who reaches it could use the model; give --api-key too")
    bound = bind(host, port)
    try:
        network, tokenizer = open_model(model, dtype)
        limits = Limits(slots=slots, queue=queue, max_tokens=max_tokens, context=context, max_body=max_body)
        service = Service(network, tokenizer, name or Path(model).name or model, limits)
        address = bound.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        url = f"http://{shown}:{address[1]}/v1"

        def ready() -> None:
            way = f"{slots} texts at once" if service.batch.rows > 1 else f"texts one by one, because {service.batch.why}"
            o.say(f"{service.name} at {url}: {way}, {service.context} tokens each; Ctrl-C ends it")
            if json:
                o.emit({"url": url, "model": service.name, "slots": slots, "rows": service.batch.rows, "context": service.context})

        Server(service, bound, api_key=api_key, ready=ready).serve_until_stopped()
    finally:
        bound.close()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
