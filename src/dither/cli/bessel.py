"""``dither bessel``: one value of log I_v(x), log K_v(x) or I_{v+1}(x) / I_v(x), and the expression that gave it."""

from __future__ import annotations

from typing import Annotated

import typer

from dither.cli import options as o


def command(
    function: Annotated[str, typer.Argument(help="'logiv', 'logkv' or 'ratio' (of I of the next order to I).", show_default=False)],
    v: Annotated[float, typer.Option(help="The order, 0 or more.", show_default=False)],
    x: Annotated[float, typer.Option(help="The argument, 0 or more.", show_default=False)],
    table: Annotated[str, typer.Option(help="'tight' (full precision) or 'paper'.")] = "tight",
    json: o.Json = False,
) -> None:
    """Print a value to 17 digits and its region: mu_K is Hankel's expansion with K terms, U_K Debye's, small_X series and integrals up to x = X.

    Example: dither bessel logiv --v 16383 --x 72000
    """
    import torch

    from dither import special
    from dither.errors import UsageError
    from dither.kernels.bessel import REGIONS
    from dither.quant.strict import strict
    from dither.special.bessel_regions import regions_of

    if function not in ("logiv", "logkv", "ratio"):
        raise UsageError(f"bessel {function}: must be logiv, logkv or ratio")
    if function == "ratio":
        if table != "tight":
            raise UsageError("--table: ratios have one table")
        value = special.bessel_ratio(v, x)
    else:
        value = (special.log_iv if function == "logiv" else special.log_kv)(v, x, table=table)
    order, argument = (torch.tensor([number], dtype=torch.float64) for number in (v, x))
    region = REGIONS[int(regions_of(order, argument, table))]
    if json:
        o.emit(strict({"function": function, "v": v, "x": x, "value": float(value), "region": region}))
        return
    print(f"{float(value):.17g}  {region}")
