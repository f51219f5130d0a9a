"""The entry point: ``dither VERB ...``. One file a verb; this one turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong call. A traceback appears only under ``--debug``.
"""

from __future__ import annotations

import sys

import click
import typer

from dither.cli import claims, compare, demo, evaluate, export, inspect, methods, quantize, run

app = typer.Typer(
    name="dither",
    no_args_is_help=True,
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
    ("export", export.command),
    ("claims", claims.command),
    ("methods", methods.command),
    ("demo", demo.command),
):
    app.command(verb)(command)


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
) -> None:
    """Options that stand before the verb."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns normally."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    try:
        result = app(given, standalone_mode=False, prog_name="dither")
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Abort:
        _fail("stopped", 1)
    except click.ClickException as error:
        where = (
            f" (see 'dither {error.ctx.info_name} --help')" if isinstance(error, click.UsageError) and error.ctx else ""
        )
        _fail(error.format_message().replace("\n", " ") + where, 2)
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("stopped by Ctrl-C; the same command goes on from the last finished block", 1)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _fail(_line(error), getattr(error, "exit_code", 1))


def _line(error: Exception) -> str:
    """One line for an error of any kind."""
    from dither.errors import DitherError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, DitherError | ValueError | FileNotFoundError | PermissionError | FloatingPointError):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory ({text}); lower --samples or --length"
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _fail(text: str, code: int) -> None:
    print(f"dither: {text}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
