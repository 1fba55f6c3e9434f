"""A study that compares methods of training: it picks optimiser and rate for each, makes the runs, and reports."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..training.recipe import load_recipe
from .report import Claim
from .result_table import Results, markdown
from .settings import Settings
from .study import Cell, Outcome, OutOfTime, Runner, StudyReport, mean_and_spread

_EXTENSIONS = 3  # times that a rate beyond the end of those tried is tried, too
FIRST_SETTINGS = (
    "optimizer.adaptive_clipping=0.02",
    "optimizer.scalar_learning_rate=1.0",
    "optimizer.warmup_epochs=0.5",
    "label_smoothing=0.0",
)
"""The recipe's before a search over five and ten epochs. Short runs have too few updates for those that it has now."""
SHORT = ("data.limit=12000", "epochs=4", "batch_size=128", *FIRST_SETTINGS)
"""Runs of two minutes."""
SHORT_RATES = {"clipped": (0.4, 0.8, 1.6), "plain": (0.4, 0.8, 1.6)}
_QUICK = ("model.options.width=0.0625", "epochs=2", "data.limit=256", "data.size=16")  # BatchNorm needs 2×2 at the end


@dataclass(frozen=True)
class Method:
    """A way to train a deep network: its name in tables, and what it changes in the recipe."""

    name: str
    overrides: tuple[str, ...]


OPTIMIZERS = {
    "clipped": (),  # as the recipe: adaptive clipping, lower rates for gains, biases and the classifier
    "plain": (
        "optimizer.adaptive_clipping=null",
        "optimizer.vector_learning_rate=1.0",
        "optimizer.classifier_learning_rate=1.0",
    ),
}


@dataclass(frozen=True)
class Tuning:
    """What is picked for every method: one of ``OPTIMIZERS``, and the learning rate for 256 examples."""

    optimizer: str
    rate: float

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*OPTIMIZERS[self.optimizer], f"optimizer.learning_rate={self.rate}")

    def __str__(self) -> str:
        return f"{self.optimizer} SGD at {self.rate:g}"


@dataclass
class TunedStudy:
    """One study: what all of its recipes share, its runs so far, and what is missing if time was over."""

    name: str
    settings: Settings
    runner: Runner
    base: tuple[str, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    tuned: dict[str, Tuning] = field(default_factory=dict)
    missing: str = ""

    @classmethod
    def begin(cls, name: str, settings: Settings, runner: Callable[..., Runner] = Runner) -> TunedStudy:
        data = settings.data
        if data is None and not settings.quick:
            raise ValueError(f"{name}: needs --data, a folder with train.parquet and test.parquet of CIFAR-10")
        base = (*(_QUICK if settings.quick else ()), f"data={data or 'digits'}", *settings.overrides)
        own = runner(settings.folder / "runs", settings.jobs, settings.minutes, settings.say)
        return cls(name, settings, own, base)

    def seeds(self, count: int) -> list[int]:
        return [self.settings.seed + i for i in range(1 if self.settings.quick else count)]

    def cell(self, labels: dict[str, Any], overrides: Sequence[str], tuned: dict[str, Tuning]) -> Cell:
        """A run; ``tuned`` has what was picked for ``labels["method"]``, and ``labels["seed"]`` is the seed."""
        tuning = tuned[labels["method"]]
        labels = {**labels, "optimizer": tuning.optimizer, "rate": tuning.rate}
        seed = f"seed={labels.get('seed', self.settings.seed)}"
        return Cell(labels, load_recipe("cifar10", [*overrides, *self.base, *tuning.overrides, seed]))

    def run(self, cells: Iterable[Cell]) -> None:
        cells = list(cells)
        try:
            self.runner.finish(cells)
        finally:
            self.outcomes += self.runner.finished(cells)

    def tune(
        self,
        methods: Sequence[Method],
        overrides: Sequence[str] = SHORT,
        rates: Mapping[str, Sequence[float]] = SHORT_RATES,
    ) -> dict[str, Tuning]:
        """For each method, of the same choices, the one with the best accuracy on held-out images.

        Where the best is at an end of the rates that were tried, the next one is tried as well.

        Args:
            overrides: of the runs that the choice is made by.
            rates: to be tried, for each of ``OPTIMIZERS``.
        """
        choices = [
            Tuning(optimizer, rate)
            for optimizer, tried in rates.items()
            for rate in (tried[:1] if self.settings.quick else tried)
        ]
        self._sweep([(method, choice) for choice in choices for method in methods], overrides)
        for _ in range(0 if self.settings.quick else _EXTENSIONS):
            further = [(method, choice) for method in methods if (choice := self._beyond(method)) is not None]
            if not further:
                break
            self._sweep(further, overrides)
        for method in methods:
            self.settle(method.name, self._best(method))
        return self.tuned

    def settle(self, name: str, tuning: Tuning) -> None:
        """Decides what the method of this name is trained with."""
        self.tuned[name] = tuning
        self.settings.say(f"{name}: {tuning} for 256 examples")

    def _sweep(self, asked: Sequence[tuple[Method, Tuning]], overrides: Sequence[str]) -> None:
        holdout = f"data.holdout={300 if self.settings.quick else 5000}"
        self.run(
            self.cell(
                {"method": method.name, "stage": "sweep"}, [*overrides, *method.overrides, holdout], {method.name: t}
            )
            for method, t in asked
        )

    def _tried(self, method: Method) -> dict[Tuning, Outcome]:
        labelled = [(outcome.cell.labels, outcome) for outcome in self.outcomes]
        return {
            Tuning(labels["optimizer"], labels["rate"]): outcome
            for labels, outcome in labelled
            if labels["method"] == method.name and labels.get("stage") == "sweep"
        }

    def _best(self, method: Method) -> Tuning:
        """Of what was tried, the first of those with the best accuracy."""
        tried = self._tried(method)
        trained = {choice: outcome.top1 for choice, outcome in tried.items() if not outcome.diverged}
        if not trained:
            raise ValueError(f"{method.name} diverged with every choice: {', '.join(map(str, tried))}")
        return max(trained, key=trained.__getitem__)

    def _beyond(self, method: Method) -> Tuning | None:
        """The next rate beyond those that were tried, if the best is at their end."""
        best = self._best(method)
        rates = [choice.rate for choice in self._tried(method) if choice.optimizer == best.optimizer]
        ends = {min(rates): best.rate / 2.0, max(rates): best.rate * 2.0}
        return Tuning(best.optimizer, ends[best.rate]) if best.rate in ends else None

    @contextlib.contextmanager
    def until_time_is_over(self) -> Iterator[None]:
        try:
            yield
        except OutOfTime as error:
            self.missing = str(error)
            self.settings.say(f"{self.name}: time is over, {error}; the same command goes on")

    def results(self, row: str, column: str) -> Results:
        """Mean accuracy, spread and number of seeds, without the sweep; chance where a run diverged."""
        found: dict[tuple[Any, Any], list[float]] = defaultdict(list)
        for outcome in self.outcomes:
            labels = outcome.cell.labels
            if labels.get("stage") != "sweep":
                found[row_name(labels, row), labels[column]].append(10.0 if outcome.diverged else outcome.top1)
        return {key: (*mean_and_spread(values), len(values)) for key, values in found.items()}

    def report(
        self,
        subject: str,
        results: Results,
        column: str,
        claims: Sequence[Claim],
        draw: Callable[[Any, Any, str], None],
    ) -> StudyReport:
        """The table and the figure of ``results``; ``subject`` is what was trained, for their title."""
        settings = {
            "seed": self.settings.seed,
            "data": self.settings.data or "digits",
            "overrides": list(self.settings.overrides),
            "tuned": {name: asdict(tuning) for name, tuning in self.tuned.items()},
            "jobs": self.settings.jobs,
        }
        return StudyReport(
            self.name,
            self._title(subject),
            tuple(self.outcomes),
            markdown(results, column),
            tuple(claims),
            lambda axes: draw(axes, results, column),
            settings,
            self.missing,
        )

    def _title(self, subject: str) -> str:
        """What was trained, on what, how long, and what the caller made different."""
        parts = ["CIFAR-10" if self.settings.data else "digits", subject]
        recipes = [outcome.cell.recipe for outcome in self.outcomes if outcome.cell.labels.get("stage") != "sweep"]
        if recipes:
            limit = recipes[0].data.limit
            images = "all images" if limit is None else f"{limit:,} images".replace(",", " ")
            parts += [images, f"{recipes[0].epochs:g} epochs"]
        return ", ".join([*parts, *self.settings.overrides]) + ": test accuracy"


def row_name(labels: dict[str, Any], row: str) -> Any:
    """What a row of the table is called: a label, with the size of updates where that is not the batch size."""
    return f"{labels[row]}, updates of {labels['update']}" if "update" in labels else labels[row]
