"""Many training runs that make one table: side by side, within a time limit, and gone on with when called again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..provenance import provenance
from ..training.recipe import Recipe
from ..training.stopping import exit_on_termination
from .report import Claim

Progress = Callable[[str], None]
_GRACE = 120.0  # seconds that a run gets to save its state


class OutOfTime(Exception):
    """The time limit has come before every run was finished."""


@dataclass(frozen=True)
class Cell:
    """One training run of a study: what it is called in the table, and its recipe."""

    labels: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Readable, and different for every recipe."""
        words = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.labels.values())
        words = "".join(c if c.isalnum() or c in "-._" else "_" for c in words.replace(" ", "_"))
        return f"{words}-{hashlib.sha256(json.dumps(self.recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Outcome:
    """A finished run, or one that ended because its loss was not finite."""

    cell: Cell
    top1: float
    loss: float
    diverged: bool
    seconds: float
    started: dict[str, Any]
    evaluations: tuple[dict[str, str], ...] = ()

    def row(self) -> dict[str, Any]:
        """For the table: labels, results, and what made them."""
        return {
            **self.cell.labels,
            "top1": round(self.top1, 3),
            "loss": round(self.loss, 5),
            "diverged": self.diverged,
            "seconds": round(self.seconds, 1),
            "device": self.started.get("device", ""),
            "threads": self.started.get("threads", ""),
            "torch": self.started.get("versions", {}).get("torch", ""),
            "time": self.started.get("time", ""),
            "run": self.cell.name,
        }


@dataclass
class Runner:
    """Runs cells in processes of their own.

    Args:
        folder: gets a folder for every run; finished ones are not run again, others are gone on with.
        jobs: runs side by side; the cores are shared out among them.
        minutes: limit for everything that this runner does; None for none. Runs that it cuts off save their state.
        say: gets a line whenever a run begins or ends.
    """

    folder: Path
    jobs: int = 1
    minutes: float | None = None
    say: Progress = print
    started: float = field(default_factory=time.monotonic)

    def finish(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Every cell's outcome, in their order.

        Raises:
            OutOfTime: before the last one was finished; those that are finished stay so.
            RuntimeError: a run failed otherwise than by diverging; its last words are in the message.
        """
        with exit_on_termination():
            self._run_all([cell for cell in cells if self.outcome(cell) is None], len(cells))
        return [outcome for cell in cells if (outcome := self.outcome(cell)) is not None]

    def _run_all(self, waiting: list[Cell], total: int) -> None:
        running: dict[subprocess.Popen[bytes], Cell] = {}
        try:
            while waiting or running:
                if self._is_over():
                    raise OutOfTime(f"{len(waiting) + len(running)} of {total} runs are not finished")
                while waiting and len(running) < self.jobs:
                    cell = waiting.pop(0)
                    self.say(f"{cell.name}: begins, {len(waiting)} more to come")
                    running[self._start(cell)] = cell
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    self._ended(running.pop(process))
        finally:
            self._stop(list(running))

    def finished(self, cells: Sequence[Cell]) -> list[Outcome]:
        """The outcomes that there are by now."""
        return [outcome for cell in cells if (outcome := self.outcome(cell)) is not None]

    def outcome(self, cell: Cell) -> Outcome | None:
        """What came out of a cell; None if it has not come to its end."""
        path = self.folder / cell.name
        starts = _read_json(path / "run.json", {"starts": [{}]})["starts"]
        evaluations: tuple[dict[str, str], ...] = ()
        if (path / "evaluations.csv").is_file():
            with (path / "evaluations.csv").open(newline="", encoding="utf-8") as file:
                evaluations = tuple(csv.DictReader(file))
        result = _read_json(path / "result.json", None)
        if result is not None:
            found = result["evaluation"]
            return Outcome(cell, found["top1"], found["loss"], False, result["seconds"], starts[0], evaluations)
        if (path / "failure").is_dir():
            return Outcome(cell, float("nan"), float("nan"), True, float("nan"), starts[0], evaluations)
        return None

    def _is_over(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.started > 60.0 * self.minutes

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        path = self.folder / cell.name
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "normfree", "train"]
        if (path / "recipe.yaml").is_file():
            command += ["--resume", str(path)]
        else:
            recipe = self.folder / f"{cell.name}.yaml"
            write_text(recipe, cell.recipe.to_yaml())
            command += [str(recipe), "--out", str(path)]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self._log(cell).open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def _log(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.log"

    def _ended(self, cell: Cell) -> None:
        outcome = self.outcome(cell)
        if outcome is None:
            lines = self._log(cell).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"{cell.name} failed: {lines[-1] if lines else 'it said nothing'}")
        what = "diverged" if outcome.diverged else f"{outcome.top1:.2f} %, {outcome.seconds / 60:.1f} min"
        self.say(f"{cell.name}: {what}")

    def _stop(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class StudyReport:
    """A study, finished or not: its runs, a table in Markdown, a picture, and what the numbers say.

    ``draw`` gets a matplotlib axes.
    """

    name: str
    title: str
    outcomes: tuple[Outcome, ...]
    table: str
    claims: tuple[Claim, ...]
    draw: Callable[[Any], None]
    settings: dict[str, Any]
    missing: str = ""

    def write(self, folder: Path) -> list[Path]:
        """NAME.md, NAME.csv (every run), NAME.json and NAME.png."""
        from matplotlib.figure import Figure

        from ..signal.propagation import without_non_finite

        folder.mkdir(parents=True, exist_ok=True)
        picture, table, numbers, words = (folder / f"{self.name}{end}" for end in (".png", ".csv", ".json", ".md"))
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        self.draw(axes)
        axes.set_title(self.title, fontsize=10)
        figure.savefig(picture, dpi=150)
        rows = [outcome.row() for outcome in self.outcomes]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(table, text.getvalue())
        write_text(numbers, json.dumps(without_non_finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n")
        write_text(words, self._in_words())
        return [picture, table, numbers, words]

    def _in_words(self) -> str:
        """Markdown: the table, the claims, and what made the numbers."""
        made_by = provenance()
        parts = [f"# {self.title}", self.table]
        parts += ["\n".join(f"* {claim.verdict}: {claim.text} ({claim.evidence})" for claim in self.claims)]
        tuned = [f"{name}: {', '.join(map(str, choice.values()))}" for name, choice in self.settings["tuned"].items()]
        if tuned:
            parts.append(
                f"Picked on training images that were held out, with rates for 256 examples: {'; '.join(tuned)}."
            )
        parts += [f"Not finished: {self.missing}."] if self.missing else []
        parts.append(
            f"`{made_by['command']}`; {made_by['machine']}, {made_by['cores']} cores, torch "
            f"{made_by['versions']['torch']}; the seed, the time and the recipe of every run are in its folder."
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "name": self.name,
            "title": self.title,
            "settings": self.settings,
            "made_by": provenance(),
            "missing": self.missing,
            "claims": [vars(claim) for claim in self.claims],
            "runs": [outcome.row() for outcome in self.outcomes],
        }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for the spread of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def _read_json(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise
