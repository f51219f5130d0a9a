"""What a figure was measured with: processor, threads, versions, date."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """``{"machine": {cpu, threads, versions}, "date": ISO 8601, UTC}`` of this process, now."""
    import dither

    return {
        "machine": {
            "cpu": _processor(),
            "threads": torch.get_num_threads(),
            "versions": {
                "dither": dither.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "transformers")},
            },
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
