"""What commands print: results on standard output; progress and failures on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_console = Console(stderr=True)


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Every failure as one line and exit code 2; NORMFREE_DEBUG=1 shows where it came from."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if os.environ.get("NORMFREE_DEBUG"):
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if not isinstance(error, (ValueError, OSError)):
        message = f"{type(error).__name__}: {message}" if lines else message
    notes = [note.removeprefix("spp: raised ") for note in getattr(error, "__notes__", [])]
    return message + (f" ({'; '.join(notes)})" if notes else "")


@contextlib.contextmanager
def batch_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, plain lines in a log, nothing for a single batch in a log."""
    if not _console.is_terminal:
        yield lambda done: say(f"{name}: batch {done}") if total > 1 else None
        return
    with _progress_bar() as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def tracked(items: list[str], what: str) -> Iterator[str]:
    if not _console.is_terminal:
        yield from items
        return
    with _progress_bar() as bar:
        yield from bar.track(items, description=what)


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_console, transient=True)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def new_table(titles: list[str], numeric: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in numeric else "left", no_wrap=True)
    return table


def print_table(table: Table) -> None:
    console = Console()
    # a pipe has no width to fit into
    (console if console.is_terminal else Console(width=200)).print(table)
