"""The entry point: ``dither VERB ...``. One file a verb; this one turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong call. A traceback appears only under ``--debug``.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import typer

from dither import process
from dither.cli import (
    bench,
    bessel,
    claims,
    compare,
    demo,
    evaluate,
    export,
    inspect,
    methods,
    quantize,
    run,
    serve,
    swht,
)

app = typer.Typer(
    name="dither",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Neural networks in few bits: quantize, judge, compare, run, and export to the runtimes of others.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb, command in (
    ("quantize", quantize.command),
    ("eval", evaluate.command),
    ("compare", compare.command),
    ("inspect", inspect.command),
    ("run", run.command),
    ("serve", serve.command),
    ("export", export.command),
    ("claims", claims.command),
    ("methods", methods.command),
    ("bench", bench.command),
    ("bessel", bessel.command),
    ("demo", demo.command),
    ("swht", swht.command),
):
    app.command(verb)(command)


# typer brings its own click in newer versions and uses the installed one in older: its errors are found through what it exports
_WrongCall: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_RESUMES = ("quantize", "compare", "demo")

_LONG = (*_RESUMES, "claims", "inspect")  # not run and serve: threads that sleep between the short products of a token halve their speed


def _version(value: bool) -> None:
    if value:
        import dither

        print(f"dither {dither.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback where something fails; may stand anywhere."),
) -> None:
    """Options that stand before the verb."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns normally."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    given = [a for a in given[:end] if a != "--debug"] + given[end:]
    if given[:1] and given[0] in _LONG and "torch" not in sys.modules:
        process.prepare_for_long_work()
    try:
        result = app(given or ["--help"], standalone_mode=False, prog_name="dither")
        if result == 130:  # how typer reports a KeyboardInterrupt that it caught
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            traceback.print_exc()
        resumes = next((a for a in given if not a.startswith("-")), "") in _RESUMES
        _fail("stopped by Ctrl-C" + ("; the same command goes on after the last finished block" if resumes else ""), 1)
    except BrokenPipeError:
        _hang_up()
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, _WrongCall):
            _fail(_wrong_call(error), 2)
        else:
            _fail(_line(error), getattr(error, "exit_code", 1))
        sys.exit(getattr(error, "exit_code", 1))


def _wrong_call(error: Exception) -> str:
    """``No such option: --bit (see 'dither quantize --help')``."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "dither"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(f"{message} (see '{where} --help')".split())


def _line(error: Exception) -> str:
    """One line for an error of any kind; what dither did not raise on purpose says its type and how to see more."""
    from dither.errors import DitherError

    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 1000 else text[:997] + "..."
    if isinstance(error, DitherError | OSError):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory ({text}); lower --samples or --length"
    if isinstance(error, ValueError | FloatingPointError) and _is_ours(error):
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _is_ours(error: Exception) -> bool:
    """Whether a line of dither's raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__", "")).startswith("dither.")


def _fail(text: str, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
        print(f"dither: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _hang_up()
    sys.exit(code)


def _hang_up() -> NoReturn:
    """Nobody reads what we print (as under ``| head``): end without a word, also from the interpreter's last flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    sys.exit(1)


if __name__ == "__main__":
    main()
