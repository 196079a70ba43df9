"""How the command talks: tables, progress bars, JSON, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from ..errors import SerialLoraError

OUT, ERR = Console(highlight=False), Console(stderr=True, highlight=False)
FAILED, NOT_VERIFIED, INTERRUPTED = 1, 3, 130
"""Exit codes, besides 0 and typer's own 2 for a wrong usage."""

LINES = 10
"""Lines of progress that a long step prints where there is no terminal."""


class PlainErrors(TyperGroup):
    """A group of commands whose errors are one line with the remedy, and a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # What typer raises for a wrong usage knows how to show itself.
            if hasattr(error, "format_message") or ctx.meta.get("debug"):
                raise
            kind = "" if isinstance(error, SerialLoraError) else f"{type(error).__name__}: "
            ERR.print(f"[bold red]error:[/] {_escape(kind + ' '.join(str(error).split()))}", soft_wrap=True)
            if not isinstance(error, SerialLoraError):
                ERR.print("[dim]--debug shows where it happened.[/]")
            raise typer.Exit(FAILED) from error


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().meta["debug"] = True
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks.", callback=_remember_debug, is_eager=True, expose_value=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Go through items under a progress bar on standard error, or with some plain lines where that is no terminal."""
    if not ERR.is_terminal:
        yield from _with_lines(items, description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:
        yield from progress.track(items, description=description)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is going on: beside a spinner, or in a plain line where there is no terminal."""
    if ERR.is_terminal:
        with ERR.status(what):
            yield
    else:
        _line(f"{what} ...")
        yield


@contextmanager
def drawing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give what shows progress when it is told of the steps done and of all steps."""
    if not ERR.is_terminal:
        _line(f"{what} ...")
        yield lambda done, steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, steps: progress.update(task, completed=done, total=steps)


def _with_lines(items: Sequence[Any], description: str) -> Iterable[Any]:
    count = len(items)
    for done, item in enumerate(items, start=1):
        yield item
        if done == count or done % max(1, count // LINES) == 0:
            _line(f"{description}: {done}/{count}")


def _line(text: str) -> None:
    """A line of plain text: no colours, and not wrapped."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show(result: Any, as_json: bool) -> None:
    """Print a result, as JSON or as text."""
    if as_json:
        sys.stdout.write(json.dumps(plain(result), indent=2) + "\n")
    else:
        OUT.print(_escape(str(result)), soft_wrap=True)


def plain(value: Any) -> Any:
    """A result in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        ERR.print(f"[yellow]warning:[/] {_escape(' '.join(str(message).split()))}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
