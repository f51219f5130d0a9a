"""What a run tells: progress while it works, a report layer by layer, and the result."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither import kernels
from dither.errors import CheckpointError
from dither.quant.statistics import ROWS, Statistics

REPORT = "dither.json"
JUDGED_ROWS = 256  # of a layer's kept inputs, for its output error where there is no Hessian


@dataclass(frozen=True)
class Event:
    """One step of progress, for a bar or a line."""

    done: int
    blocks: int
    what: str
    error: float | None = None  # mean relative weight error of the block just finished
    bits: float | None = None
    memory: int = 0


@dataclass
class LayerReport:
    """What happened to one layer."""

    name: str
    block: int
    shape: tuple[int, ...]
    scheme: str
    bits: float = 0.0
    weight_error: float = 0.0  # ||W_hat - W||^2 / ||W||^2
    output_error: float | None = None  # the same through the layer's inputs: tr(D H D^T) / tr(W H W^T)
    loss: float | None = None
    damp: float | None = None
    tokens: int = 0
    fallback: str | None = None
    inputs: str | None = None  # how its input is rounded at run time
    facts: dict[str, Any] = field(default_factory=dict)  # what its rounding tells

    def measure(
        self, weight: Tensor, decoded: Tensor, statistics: Statistics | None, judged_in: torch.dtype = torch.float32
    ) -> None:
        """Fill in the errors of ``decoded [O, I]`` against ``weight [O, I]``. ``judged_in``: the type of the products with kept inputs."""
        difference = decoded - weight
        self.weight_error = _ratio(float(difference.square().sum()), float(weight.square().sum()))
        if statistics is not None and (measured := powers(weight, decoded, statistics, judged_in)) is not None:
            self.output_error = _ratio(*measured)


def powers(
    weight: Tensor, decoded: Tensor, statistics: Statistics, judged_in: torch.dtype = torch.float32
) -> tuple[float, float] | None:
    """The power of what a layer's output lost, and of the output: ``tr(D H D^T)`` and ``tr(W H W^T)``, or their estimate from kept inputs. None
    where the statistics do not tell."""
    if statistics.tokens == 0:
        return None
    difference = decoded - weight
    if statistics.has_hessian:
        return _power(difference, statistics.hessian), _power(weight, statistics.hessian)
    if ROWS in statistics.needs:
        rows = statistics.rows[:: -(-len(statistics.rows) // JUDGED_ROWS)].to(judged_in)
        noise, signal = (float((rows @ m.to(judged_in).T).float().square().sum()) for m in (difference, weight))
        return noise, signal
    return None


def _power(matrix: Tensor, hessian: Tensor) -> float:
    """``tr(M H M^T) = <M^T M, H>``: by symmetry half the operations of ``M H``."""
    gram = torch.zeros_like(hessian)
    kernels.gram_update(gram, matrix.contiguous())
    return float(torch.dot(kernels.gram_finish(gram).view(-1), hessian.view(-1)))


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


@dataclass
class Report:
    """What a run did, layer by layer, and what it cost. Times and memory are of this process only, and are not stored with a
    checkpoint: the same job gives the same bytes."""

    layers: list[LayerReport] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    proved: list[dict[str, Any]] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept_float: list[str] = field(default_factory=list)
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    resumed_blocks: int = 0

    TRANSIENT = ("seconds", "cpu_seconds", "peak_memory_bytes", "resumed_blocks")

    def stored(self) -> dict[str, Any]:
        """The part that the job's settings decide."""
        return {k: v for k, v in asdict(self).items() if k not in self.TRANSIENT}

    @classmethod
    def read(cls, out: Path) -> Report:
        """The report of a finished checkpoint. Raises CheckpointError where it is damaged."""
        try:
            data = json.loads((out / REPORT).read_text())["report"]
            layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in data.pop("layers")]
            return cls(layers=layers, **data)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{out / REPORT}: is damaged ({error}); quantize again") from None


@dataclass
class Quantized:
    """The result: ``.model`` (loaded from ``.out`` when first asked for, if the run wrote there), ``.report``, ``.bits_per_weight``."""

    report: Report
    out: Path | None = None
    built: nn.Module | None = None
    load: Callable[[Path], nn.Module] | None = None

    @property
    def model(self) -> nn.Module:
        if self.built is None:
            assert self.out is not None and self.load is not None
            self.built = self.load(self.out)
        return self.built

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, all of them, over the number of weights quantized."""
        return self.report.bits_per_weight

    def __repr__(self) -> str:
        return f"Quantized({len(self.report.layers)} layers, {self.bits_per_weight:.3f} bits a weight, out={self.out})"


def peak_memory() -> int:
    """Peak resident memory of this process alone, bytes. (``ru_maxrss`` passes through fork and exec on Linux, so the small child of a
    large parent would report the parent's; it is only asked where there is no ``/proc``.)"""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_dtype(model: nn.Module) -> torch.dtype:
    """The type of a model's first floating parameter, else float32."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
