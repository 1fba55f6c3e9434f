"""The command line: parses, calls, prints."""

from __future__ import annotations

import typer

from .catalogue import gain, models
from .console import report_errors
from .reproduce import reproduce
from .signals import diagnose, predict, spp
from .training import evaluate, train

app = typer.Typer(
    help="Build, diagnose and train deep networks that need no activation normalisation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (models, gain, spp, predict, diagnose, reproduce, train):
    app.command()(report_errors(command))
app.command("eval")(report_errors(evaluate))


def main() -> None:
    """The command ``normfree``. Exit code 0, or 2 with one line on standard error for anything that it cannot do."""
    app()
