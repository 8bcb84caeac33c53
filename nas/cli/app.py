"""The application: all commands, and what an error looks like."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

import nas
from nas.cli import (
    bench,
    compare,
    doctor,
    evaluate,
    export,
    fused,
    layers,
    lists,
    predict,
    primitives,
    proxies,
    runs,
    search,
    supernet,
    train,
)
from search_spaces.common.errors import RunError, UserError
from search_spaces.common.names import nearest

INTERRUPTED = 130  # what the command-line library returns after Ctrl-C, and shells expect
app = typer.Typer(
    name="nas",
    help="Neural architecture search: spaces, tables of measured architectures, strategies, runs, reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("search")(search.search)
app.command("compare")(compare.compare)
app.command("resume")(search.resume)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("report")(runs.report)
app.command("plot")(runs.plot)
app.command("runs")(runs.runs)
app.command("show")(runs.show)
app.add_typer(bench.app, name="bench")
app.add_typer(layers.app, name="layers")
app.add_typer(primitives.app, name="primitives")
app.add_typer(proxies.app, name="proxies")
app.add_typer(predict.app, name="predict")
app.add_typer(fused.app, name="kernels")
app.add_typer(supernet.app, name="supernet")
app.command("spaces")(lists.spaces)
app.command("strategies")(lists.strategies)
app.command("presets")(lists.presets)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nasforge {nas.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command line; errors become one line on standard error."""
    debug = "--debug" in arguments
    try:
        result = app([a for a in arguments if a != "--debug"], standalone_mode=False)
        if result == INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _fail(2, str(error), debug)
    except RunError as error:
        return _fail(1, str(error), debug)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; a run goes on with `nas resume RUN` or the same command", debug)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(str(error))
            return 0
        if _bad_input_of_a_score(error):
            return _fail(2, str(error), debug)
        if hasattr(error, "format_message"):  # wrong usage, found by the command-line library
            return _fail(2, _usage(error, arguments), debug)
        return _fail(1, f"{type(error).__name__}: {error} (a fault of nasforge; --debug shows where)", debug)


def _bad_input_of_a_score(error: Exception) -> bool:
    """zero_cost imports nothing of the house, so it has a UserError of its own."""
    from zero_cost.errors import UserError as ScoreError

    return isinstance(error, ScoreError)


def _fail(status: int, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def _usage(error: Exception, arguments: list[str]) -> str:
    message = error.format_message()  # type: ignore[attr-defined]
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in arguments[:-1]:  # the library does not say which value it could not read
            message = f"{option} {arguments[arguments.index(option) + 1]}: {message}"
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "nas"
    if "No such command" in message and context is not None:
        wanted = message.split("'")[1]
        known = context.command.list_commands(context)
        close = nearest(wanted, known)
        message = f"{wanted!r}: expected a command ({', '.join(known)})" + (
            f"; did you mean {close!r}?" if close else ""
        )
    return f"{message.rstrip('.')} (see `{path} --help`)"
