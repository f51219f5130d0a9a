"""``dither claims``: what papers say against what was measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli import options as o


def command(
    action: Annotated[
        str | None, typer.Argument(help="'run' measures; without it, the claims and their state.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Argument(help="The claim to run.", show_default=False)] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, separated by commas.", show_default="the claim's own")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where records are kept.", show_default="beside the package's claims, else the user's data folder")
    ] = None,
    json: o.Json = False,
) -> None:
    """List the claims, or measure one again and store its record. A run that was stopped goes on behind the last finished seed.

    Example: dither claims run gptq
    """
    from dither import claims
    from dither.errors import UsageError
    from dither.quant.strict import strict

    if action is None:
        records = {n: claims.stored(n, folder) for n in claims.CLAIMS}
        if json:
            o.emit(strict({n: r or {"claim": n, "verdict": "not measured"} for n, r in records.items()}))
            return
        for n, record in records.items():
            state = record["verdict"] if record else "not measured"
            print(f"{n:16} {state:14} {claims.CLAIMS[n].sentence}")
        return
    if action != "run" or name is None:
        call = " ".join(["claims", action, *([name] if name else [])])
        raise UsageError(f"{call}: is no call; say 'dither claims' or 'dither claims run NAME'")
    claim = claims.find(name, claims.CLAIMS)
    chosen = None
    if seeds is not None:
        if not all(s.strip().isdigit() for s in seeds.split(",")):
            raise UsageError(f"--seeds {seeds}: must be numbers separated by commas")
        chosen = [int(s) for s in seeds.split(",")]
    record = claims.run(claim, seeds=chosen, say=o.say, folder=folder or claims.home())
    path = claims.save(record, folder)
    if json:
        o.emit(strict(record))
        return
    _show(record)
    print(f"record: {path}")


def _show(record: dict[str, Any]) -> None:
    print(f"{record['claim']}: {record['sentence']}")
    print(f"  {record['source']}")
    print(f"  work: {record['work']}; {record['data']}; seeds {', '.join(map(str, record['seeds']))}")
    for name, value in record["paper"].items():
        print(f"  paper     {name}: {value:g}")
    for name, figure in record["figures"].items():
        spread = f" +- {figure['spread']:.2g}" if figure["spread"] is not None else ""
        print(f"  measured  {name}: {figure['mean']:.4g}{spread}")
    for test in record["tests"]:
        print(f"  {'holds' if test['holds'] else 'FAILS'}     {test['says']}")
    print(f"  verdict: {record['verdict']}. {record['caveat']}")
