"""What a run says while it goes on: rows in CSV files, TensorBoard, a bar or lines for whoever watches."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from ..files import write_text

Say = Callable[[str], None]


class TableLog:
    """A CSV file that grows by a row at a time.

    Args:
        path: the file; made with its header if it is not there.
        columns: of every row; the first one counts upwards.
        keep_up_to: rows whose first column is larger are dropped: what a run that is gone on with had written after
            its last checkpoint.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], keep_up_to: int = 0):
        self.path, self.columns = path, columns
        rows: list[list[str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                kept = [line.split(",") for line in file.read().replace("\0", "").splitlines()[1:]]
            rows = [row for row in kept if len(row) == len(columns) and row[0].isdecimal()]
            rows = [row for row in rows if int(row[0]) <= keep_up_to]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([list(columns), *rows])
        write_text(path, text.getvalue())

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row. Floating-point numbers get six significant digits."""
        values = [row.get(column, "") for column in self.columns]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(
            [f"{value:.6g}" if isinstance(value, float) else value for value in values]
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())


class TensorBoardLog:
    """Scalars and figures for TensorBoard; nothing if it is not wanted.

    Args:
        folder: None if it is not.
        keep_up_to: what was written of later steps is dropped.

    Raises:
        ImportError: it is wanted and not installed.
    """

    def __init__(self, folder: Path | None, keep_up_to: int = 0):
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("log.tensorboard: TensorBoard is not installed: pip install tensorboard") from None
            self._writer = SummaryWriter(str(folder), purge_step=keep_up_to + 1)  # type: ignore[no-untyped-call]

    @property
    def is_wanted(self) -> bool:
        return self._writer is not None

    def scalars(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        if self._writer is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._writer.add_scalar(f"{prefix}/{key}", value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        if self._writer is not None:
            self._writer.add_figure(name, figure, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Watcher:
    """Shows how far training is: a bar with speed and time left on a terminal, lines elsewhere.

    Args:
        total: updates in the whole run.
        done: updates that an earlier part of it has made.
        say: where lines go; None for standard error.
    """

    def __init__(self, total: int, done: int = 0, say: Say | None = None):
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._bar: Any = None
        self._total, self._start_at, self._start = total, done, time.perf_counter()
        if say is None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=total, completed=done, state="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self._say(text)

    def update(self, done: int, state: str, is_logged: bool) -> None:
        """Called after every update; ``is_logged`` says whether it is one that the log keeps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)
        elif is_logged:
            self.line(f"update {done}/{self._total}  {state}  {self._time_left(done)} left")

    def _time_left(self, done: int) -> str:
        made = done - self._start_at
        if not made:
            return "?"
        seconds = round((time.perf_counter() - self._start) / made * (self._total - done))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
