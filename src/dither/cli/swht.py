"""``dither swht``: the large Walsh-Hadamard coefficients of a table of values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli import options as o

if TYPE_CHECKING:
    import numpy as np

NAME = "f"


def command(
    npz: Annotated[
        Path, typer.Option("--npz", help="File of numpy with all 2^n values, under the name 'f' or as its only array.", show_default=False)
    ],
    k: Annotated[int | None, typer.Option("--k", min=1, help="About how many coefficients there are.", show_default="found out")] = None,
    sigma: Annotated[str, typer.Option(help="Standard deviation of the noise; 'auto' estimates it.")] = "0",
    mode: Annotated[
        str | None, typer.Option(help="noiseless, nso, so, ml or low_degree.", show_default="noiseless without noise, else nso")
    ] = None,
    degree: Annotated[
        int | None, typer.Option(min=1, help="No coefficient joins more than so many bits: fewer samples.", show_default="any")
    ] = None,
    seed: o.Seed = 0,
    top: Annotated[int, typer.Option(min=0, help="Coefficients to print, the largest first.")] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save support and values as a file of numpy.", show_default="nothing is saved")
    ] = None,
    json: o.Json = False,
) -> None:
    """Find the large Walsh-Hadamard coefficients of sparse data from few of its values, and tell which were looked at.

    Example: dither swht --npz samples.npz --k 64
    """
    import numpy as np

    from dither.errors import UsageError
    from dither.quant.store import explained
    from dither.special import sparse_wht

    values = read(npz)
    try:
        noise = None if sigma == "auto" else float(sigma)
    except ValueError:
        raise UsageError(f"--sigma {sigma}: must be a number or 'auto'") from None
    found = sparse_wht(values, k=k, sigma=noise, mode=mode, seed=seed, degree=degree)
    if output is not None:
        with explained(output), output.open("wb") as file:
            np.savez(file, support=found.support, values=found.values)
    as_number = complex if np.iscomplexobj(found.values) else float
    shown = [(int(s), as_number(v)) for s, v in zip(found.support[:top], found.values[:top], strict=True)]
    if json:
        o.emit(_record(found, shown))
        return
    share = 100 * found.n_queries / len(values)
    print(f"{found.mode}: {len(found.support)} coefficients from {found.n_queries} of {len(values)} values ({share:.3g} %)")
    print(f"{found.bins - found.unresolved} of {found.bins} bins explained; noise {found.sigma:.4g}, left {found.residual:.4g}")
    for mask, value in shown:
        bits = ",".join(str(i) for i in range(found.n) if mask >> i & 1) or "constant"
        print(f"{mask:>{len(str(len(values)))}}  {value:>12.6g}  {bits}")


def read(path: Path) -> np.ndarray:
    """The values in a file. Raises CheckpointError where it holds none, or not only numbers."""
    import zipfile

    import numpy as np

    from dither.errors import CheckpointError

    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array, not an archive; save it with numpy.savez")
        with file:
            names = list(file)
            name = NAME if NAME in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"it holds {', '.join(names) or 'nothing'}; must hold 'f' or one array")
            values = np.asarray(file[name])
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    if values.dtype.kind not in "fciub":
        raise CheckpointError(f"{path}: {name} holds {values.dtype}, must hold numbers")
    return values


def _record(found: Any, shown: list[tuple[int, float | complex]]) -> dict[str, Any]:
    return {
        "n": found.n,
        "mode": found.mode,
        "coefficients": len(found.support),
        "queries": found.n_queries,
        "bins": found.bins,
        "unresolved": found.unresolved,
        "complete": found.complete,
        "sigma": found.sigma,
        "residual": found.residual,
        "largest": [{"mask": mask, "value": [v.real, v.imag] if isinstance(v, complex) else v} for mask, v in shown],
    }
