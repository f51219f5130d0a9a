"""One row of a comparison in a process of its own: quantize, then judge. Time, processor time and peak memory are then the row's alone,
and a row that runs out of memory takes nothing else with it.

The child (``python -m dither.quant.arm``) reads one `Job` as JSON from standard input and writes JSON lines: ``{"event": ...}`` for each
finished block, ``{"costs": ...}`` when the checkpoint is whole, and at the end ``{"result": ...}`` or ``{"failed": "one line"}``. Whatever
else is printed goes to standard error, which the parent keeps in a log file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dither import process
from dither.quant.strict import dumps

if TYPE_CHECKING:
    from dither.formats import Scheme
    from dither.quant.outcome import LayerReport

Follow = Callable[[int, int], None]  # blocks done, blocks in all
Costs = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What one child does. ``method`` None judges the float model; ``folder`` takes the checkpoint. ``text`` is what to judge on."""

    model: str
    text: str
    windows: int | None
    window_length: int
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    calibration: str | None = None
    samples: int = 0
    length: int = 0
    seed: int = 0
    parent: int = 0


class ArmFailed(Exception):
    """The child could not do its job; the message is one line."""


def start(job: Job, log: Path, follow: Follow, costs: Costs) -> dict[str, Any]:
    """Run ``job`` in a child and return its result. ``costs`` gets what quantizing cost as soon as that is known.

    Raises ArmFailed with the child's reason.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "dither.quant.arm"]  # -P: no module of the working folder gets in
    with (
        open(log, "w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=process.ENVIRONMENT | dict(os.environ)
        ) as child,
    ):
        try:
            return _listen(child, job, log, follow, costs)
        finally:
            child.kill()


def _listen(child: subprocess.Popen[str], job: Job, log: Path, follow: Follow, costs: Costs) -> dict[str, Any]:
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # a child that died early is told of below
        child.stdin.write(json.dumps(asdict(job) | {"parent": os.getpid()}))
        child.stdin.close()
    for line in child.stdout:
        message = json.loads(line)
        if "event" in message:
            follow(*message["event"])
        elif "costs" in message:
            costs(message["costs"])
        elif "failed" in message:
            raise ArmFailed(message["failed"])
        else:
            result: dict[str, Any] = message["result"]
            return result
    code = child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        raise ArmFailed(f"the process was stopped by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
    raise ArmFailed(f"the process ended with exit code {code} ({last[0][:200]})")


def main() -> None:
    """The child."""
    process.prepare_for_long_work()  # but for what torch read when it loaded: that is in the environment which `start` gave
    job = Job(**json.load(sys.stdin))
    _die_with(job.parent)
    with _messages() as out:

        def send(**message: Any) -> None:
            print(dumps(message), file=out, flush=True)

        try:
            send(result=_work(job, send))
        except MemoryError:
            send(failed="out of memory")
        except Exception as error:
            import traceback

            traceback.print_exc()  # into the log
            text = " ".join(str(error).split())
            expected = isinstance(error, ValueError | FloatingPointError) or hasattr(error, "exit_code")
            send(failed=text if expected and text else f"{type(error).__name__}: {text}")


def _work(job: Job, send: Callable[..., None]) -> dict[str, Any]:
    from dither import models
    from dither.quant.engine import quantize
    from dither.quant.evaluate import open_model
    from dither.quant.judge import perplexity
    from dither.quant.machine import machine
    from dither.quant.recipes import build

    if job.method is None:
        model, tokenizer = open_model(job.model)
        judged = perplexity(model, job.text, tokenizer, windows=job.windows, length=job.window_length)
        bits = 8 * models.open(job.model).dtype.itemsize
        return {"perplexity": judged.perplexity, "bits": bits, **machine()}
    data = Path(job.calibration) if job.calibration and Path(job.calibration).exists() else job.calibration
    finished = (Path(job.folder) / "config.json").is_file()
    recipe = build(job.method, job.options).recipe()
    report = quantize(
        job.model,
        recipe,
        data,
        job.folder,
        samples=job.samples,
        length=job.length,
        seed=job.seed,
        progress=lambda event: send(event=[event.done, event.blocks]),
    ).report
    if not finished and not report.resumed_blocks:  # else part of the work was done, and paid for, by another process
        memory = report.peak_memory_bytes
        send(costs={"seconds": report.seconds, "cpu_seconds": report.cpu_seconds, "peak_memory_bytes": memory})
    model, tokenizer = open_model(job.folder)
    judged = perplexity(model, job.text, tokenizer, windows=job.windows, length=job.window_length)
    notes = [n for n in report.notes if not n.startswith("already complete")]
    notes += [f"{row.name}: {row.fallback}" for row in report.layers if row.fallback]
    return {
        "scheme": _scheme(report.layers[0], recipe.kv),
        "bits_per_weight": report.bits_per_weight,
        "perplexity": judged.perplexity,
        "checkpoint_bytes": sum(f.stat().st_size for f in Path(job.folder).rglob("*") if f.is_file()),
        "notes": notes,
        "layers": [vars(row) for row in report.layers],
        **machine(),
    }


def _scheme(row: LayerReport, kv: Scheme | None) -> str:
    """How the model is stored, and what it rounds at run time: ``"int8 asymmetric group(64), inputs int8 asymmetric token, kv int4 ..."``."""
    found = [row.scheme] + ([f"inputs {row.inputs}"] if row.inputs else []) + ([f"kv {kv}"] if kv else [])
    return ", ".join(part.removesuffix(" dynamic") for part in found)


@contextlib.contextmanager
def _messages() -> Iterator[TextIO]:
    """Standard output for messages alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


def _die_with(parent: int) -> None:
    """End when the parent does: a comparison that was killed and started again must not meet its own leftovers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent and os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    main()
