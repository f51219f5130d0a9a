"""The errors that dither raises on purpose. Each is one line: what went wrong, where, and what to do about it.

The command line prints the line and exits with ``exit_code``; a traceback appears only under ``--debug``.
Wrong values passed to a Python function raise plain ``ValueError``/``TypeError``; the classes here are for what a
correct call can still meet: files, models, budgets.
"""

from __future__ import annotations


class DitherError(Exception):
    """A job failed. ``exit_code`` 1."""

    exit_code = 1


class UsageError(DitherError, ValueError):
    """The call itself was wrong: an unknown method, a bad option, a missing argument. ``exit_code`` 2."""

    exit_code = 2


class ModelError(DitherError):
    """A model could not be found, read or understood."""


class CheckpointError(ModelError):
    """A file is damaged, incomplete, or says things that cannot be true."""


class CalibrationError(DitherError):
    """The calibration data is missing, empty or too short."""


class SiteError(DitherError):
    """A transform found no place in the model where it provably leaves the float function unchanged."""


class ExportError(DitherError):
    """A checkpoint cannot be expressed in the asked format without changing its numbers."""
