"""Studies that train: against BatchNorm, over batch sizes, over depths, and table 1 of Brock et al. 2021, on CIFAR-10.

All of them use the recipe ``cifar10``: a ResNet-26 for 32 px, 0.25 of the table's width, 0.88 M parameters. Every
method's optimiser and learning rate are picked, from the same choices, by the accuracy on training images that were
held out, at the largest batch size of all: a rate that is scaled down from there stays in reach, one that is scaled up
need not. Test images are looked at once for each run, at its end.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..training.recipe import load_recipe
from .report import Claim
from .settings import Settings
from .study import Cell, Outcome, OutOfTime, Runner, StudyReport, mean_and_spread

_Results = dict[tuple[Any, Any], tuple[float, float, int]]
"""Of each row and column of a table: mean accuracy, spread, number of seeds."""


@dataclass(frozen=True)
class Method:
    """A way to train a deep network: its name in tables, and what it changes in the recipe."""

    name: str
    overrides: tuple[str, ...]


NF = Method("normaliser-free", ("model=nf_resnet26", "model.options.alpha=1.0"))
NF_DEEP = Method("normaliser-free", ("model=nf_resnet26", "calibrate=none"))  # α = 0.2, as in the paper
BN = Method("BatchNorm", ("model=resnetv2_26", "calibrate=none"))
SKIPINIT = Method("SkipInit", ("model=skipinit_resnet26", "calibrate=none"))
FIXUP = Method("FixUp", ("model=fixup_resnet26", "calibrate=none", "optimizer.scalar_learning_rate=0.1"))
NEITHER = Method("neither", ("model=skipinit_resnet26", "calibrate=none", "model.options.skip_gain=1.0"))

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


REGULARISED = ("model.options.drop_rate=0.25", "model.options.stochastic_depth_rate=0.1")
_EXTENSIONS = 3  # times that a rate beyond the end of those tried is tried, too
_HEADLINE = ("epochs=5", "optimizer.warmup_epochs=0.5")
_SHORT = ("data.limit=12000", "epochs=4", "batch_size=128")
_CLIPPED_AT_64 = "optimizer.adaptive_clipping_batch=64"  # λ = 0.02 √(64 / 32) in the runs over depths
_QUICK = ("model.options.width=0.0625", "epochs=2", "data.limit=256", "data.size=16")  # BatchNorm needs 2×2 at the end


def cifar10(settings: Settings) -> StudyReport:
    """Normaliser-free against BatchNorm at batch 64 and 128, all training images, three seeds, rates swept for both."""
    batches, methods = (64, 128), (NF, BN)
    study = _Study.begin("cifar10", settings)
    with study.until_time_is_over():
        tuned = study.tune(methods)
        study.run(
            study.cell(
                {"method": method.name, "batch": batch, "seed": seed},
                [*method.overrides, *_HEADLINE, f"batch_size={batch}"],
                tuned,
            )
            for seed in study.seeds(3)
            for batch in batches
            for method in methods
        )
    results = study.results("method", "batch")
    claims = [
        _claim(
            f"batch {batch}: normaliser-free at least 1 point above BatchNorm",
            ours[0] - theirs[0] >= 1.0,
            f"{_number(ours)} against {_number(theirs)}",
        )
        for batch in batches
        if (ours := results.get((NF.name, batch))) and (theirs := results.get((BN.name, batch)))
    ]
    return study.report("CIFAR-10, ResNet-26: test accuracy", "method", "batch", claims, _bars)


def microbatch(settings: Settings) -> StudyReport:
    """Test accuracy over batch sizes from 1 to 128, 12 000 training images, 4 epochs, learning rate in proportion.

    Then for updates of 64 examples each that go through the network 1 to 16 at a time: what a small device would do.
    """
    batches, methods = (1, 2, 64) if settings.quick else (1, 2, 4, 16, 64, 128), (NF, BN)
    parts = (2,) if settings.quick else (2, 4, 16, 1)
    study = _Study.begin("microbatch", settings)
    with study.until_time_is_over():
        tuned = study.tune(methods)
        study.run(
            study.cell(
                {"method": method.name, "batch": batch, "seed": seed},
                [*method.overrides, *_SHORT, f"batch_size={batch}"],
                tuned,
            )
            for batch in (128, 2, 64, 4, 16, 1)
            if batch in batches
            for method in methods
            for seed in study.seeds(1)
        )
        study.run(
            study.cell(
                {"method": method.name, "batch": part, "update": 64, "seed": seed},
                [*method.overrides, *_SHORT, "batch_size=64", f"microbatch_size={part}"],
                tuned,
            )
            for part in parts
            for method in methods
            for seed in study.seeds(1)
        )
    results = study.results("method", "batch")
    ours, theirs = (_named({"method": method.name, "update": 64}, "method") for method in methods)
    claims = [
        *_flat_and_ahead("", results, [(NF.name, batch) for batch in batches], (BN.name, 2)),
        *_flat_and_ahead(
            "updates of 64, ", results, [*((ours, part) for part in sorted(parts)), (NF.name, 64)], (theirs, 2)
        ),
    ]
    return study.report("CIFAR-10, 12 000 images, 4 epochs: test accuracy", "method", "batch", claims, _lines)


def _flat_and_ahead(
    what: str, results: _Results, ours: Sequence[tuple[str, int]], theirs: tuple[str, int]
) -> Iterator[Claim]:
    """Claims on a row of the table, and on its place at the batch size of one of BatchNorm."""
    if all(place in results for place in ours):
        accuracies = [results[place][0] for place in ours]
        span = max(accuracies) - min(accuracies)
        yield _claim(f"{what}normaliser-free: flat within 0.5 point", span <= 0.5, f"spans {span:.2f} points")
    level = (ours[0][0], theirs[1])
    if level in results and theirs in results:
        ahead = results[level][0] - results[theirs][0]
        text = f"{what}batch {theirs[1]}: at least 15 points above BatchNorm"
        yield _claim(text, ahead >= 15.0, f"{ahead:.2f} points")


def depth(settings: Settings) -> StudyReport:
    """Nets of 26 to 600 layers, with the method and without it or a normaliser: do they train?"""
    depths = (26, 101) if settings.quick else (26, 101, 200, 600)
    study = _Study.begin("depth", settings)
    short = ("model.options.width=0.0625", "data.limit=4000", "epochs=2", "batch_size=32", _CLIPPED_AT_64)
    with study.until_time_is_over():
        study.run(
            study.cell(
                {"method": method.name, "depth": layers},
                [*method.overrides, *short, f"model={method.overrides[0].removeprefix('model=')[:-2]}{layers}"],
                {method.name: Tuning("clipped", 0.4)},
            )
            for layers in depths
            for method in (NF_DEEP, NEITHER)
        )
    results = study.results("method", "depth")
    claims = [
        _claim(
            f"{layers} layers: trains",
            results[NF_DEEP.name, layers][0] > 20.0,
            f"{_number(results[NF_DEEP.name, layers])} with, {_number(results.get((NEITHER.name, layers)))} without",
        )
        for layers in depths
        if (NF_DEEP.name, layers) in results
    ]
    return study.report("CIFAR-10, nets of 26 to 600 layers", "method", "depth", claims, _lines)


def table1(settings: Settings) -> StudyReport:
    """FixUp, SkipInit, normaliser-free and BatchNorm, plain and regularised: the paper's table 1 at CIFAR scale."""
    methods = (FIXUP, SKIPINIT, NF, BN)
    study = _Study.begin("table1", settings)
    with study.until_time_is_over():
        tuned = study.tune(methods)
        study.run(
            study.cell(
                {"method": method.name, "setting": name, "seed": seed},
                [*method.overrides, *_SHORT, *extra],
                tuned,
            )
            for seed in study.seeds(3)
            for name, extra in (("plain", ()), ("regularised", REGULARISED))
            for method in methods
        )
    return study.report("CIFAR-10, 12 000 images, 4 epochs: test accuracy", "method", "setting", [], _bars)


@dataclass
class _Study:
    """One study: what all of its recipes share, its runs so far, and what is missing if time was over."""

    name: str
    settings: Settings
    runner: Runner
    base: tuple[str, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    tuned: dict[str, Tuning] = field(default_factory=dict)
    missing: str = ""

    @classmethod
    def begin(cls, name: str, settings: Settings) -> _Study:
        data = settings.data
        if data is None and not settings.quick:
            raise ValueError(f"{name}: needs --data, a folder with train.parquet and test.parquet of CIFAR-10")
        base = (*(_QUICK if settings.quick else ()), f"data={data or 'digits'}", *settings.overrides)
        runner = Runner(settings.folder / "runs", settings.jobs, settings.minutes, settings.say)
        return cls(name, settings, runner, base)

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

    def tune(self, methods: Sequence[Method]) -> dict[str, Tuning]:
        """For each method, of the same choices, the one with the best accuracy on held-out images in short runs.

        Where the best is at an end of the rates that were tried, the next one is tried as well.
        """
        rates = (0.4,) if self.settings.quick else (0.4, 0.8, 1.6)
        choices = [Tuning(optimizer, rate) for rate in rates for optimizer in OPTIMIZERS]
        tried = {method.name: list(choices) for method in methods}
        self._sweep([(method, choice) for choice in choices for method in methods])
        for _ in range(0 if self.settings.quick else _EXTENSIONS):
            further = [(method, choice) for method in methods for choice in self._beyond(tried[method.name], method)]
            if not further:
                break
            self._sweep(further)
            for method, choice in further:
                tried[method.name].append(choice)
        for method in methods:
            self.tuned[method.name] = self._best(method, tried[method.name])
            self.settings.say(f"{method.name}: {self.tuned[method.name]} for 256 examples")
        return self.tuned

    def _sweep(self, asked: Sequence[tuple[Method, Tuning]]) -> None:
        holdout = f"data.holdout={300 if self.settings.quick else 5000}"
        self.run(
            self.cell(
                {"method": method.name, "stage": "sweep"}, [*method.overrides, *_SHORT, holdout], {method.name: t}
            )
            for method, t in asked
        )

    def _best(self, method: Method, tried: Sequence[Tuning]) -> Tuning:
        """Of what was tried, the first of those with the best accuracy."""
        own = [outcome for outcome in self.outcomes if outcome.cell.labels["method"] == method.name]
        trained = [outcome for outcome in own if not outcome.diverged]
        if not trained:
            raise ValueError(f"{method.name} diverged with every choice: {', '.join(map(str, tried))}")
        labels = max(trained, key=lambda outcome: outcome.top1).cell.labels
        return Tuning(labels["optimizer"], labels["rate"])

    def _beyond(self, tried: Sequence[Tuning], method: Method) -> list[Tuning]:
        """The next rate beyond those that were tried, if the best is at their end."""
        best = self._best(method, tried)
        rates = [choice.rate for choice in tried if choice.optimizer == best.optimizer]
        ends = {min(rates): best.rate / 2.0, max(rates): best.rate * 2.0}
        return [Tuning(best.optimizer, ends[best.rate])] if best.rate in ends else []

    @contextlib.contextmanager
    def until_time_is_over(self) -> Iterator[None]:
        try:
            yield
        except OutOfTime as error:
            self.missing = str(error)
            self.settings.say(f"{self.name}: time is over, {error}; the same command goes on")

    def results(self, row: str, column: str) -> _Results:
        """Mean accuracy, spread and number of seeds, without the sweep; chance where a run diverged."""
        found: dict[tuple[Any, Any], list[float]] = defaultdict(list)
        for outcome in self.outcomes:
            labels = outcome.cell.labels
            if labels.get("stage") != "sweep":
                found[_named(labels, row), labels[column]].append(10.0 if outcome.diverged else outcome.top1)
        return {key: (*mean_and_spread(values), len(values)) for key, values in found.items()}

    def report(
        self, title: str, row: str, column: str, claims: Sequence[Claim], draw: Callable[[Any, Any, str], None]
    ) -> StudyReport:
        results = self.results(row, column)
        settings = {
            "seed": self.settings.seed,
            "data": self.settings.data or "digits",
            "overrides": list(self.settings.overrides),
            "tuned": {name: asdict(tuning) for name, tuning in self.tuned.items()},
            "jobs": self.settings.jobs,
        }
        return StudyReport(
            self.name,
            title,
            tuple(self.outcomes),
            _table(results, column),
            tuple(claims),
            lambda axes: draw(axes, results, column),
            settings,
            self.missing,
        )


def _named(labels: dict[str, Any], row: str) -> Any:
    """What a row of the table is called: a label, with the size of updates where that is not the batch size."""
    return f"{labels[row]}, updates of {labels['update']}" if "update" in labels else labels[row]


def _claim(text: str, holds: bool, evidence: str) -> Claim:
    return Claim(text, bool(holds), evidence)


def _number(result: tuple[float, float, int] | None) -> str:
    """``63.21 ± 0.30 (3)``: mean, sample standard deviation, seeds."""
    if result is None:
        return "–"
    mean, spread, count = result
    return f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f} ({count})"


def _table(results: _Results, column: str) -> str:
    rows, columns = _axes(results)
    lines = [f"| {column} | " + " | ".join(str(c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {r} | " + " | ".join(_number(results.get((r, c))) for c in columns) + " |" for r in rows]
    return "\n".join(lines)


def _axes(results: _Results) -> tuple[list[Any], list[Any]]:
    columns = dict.fromkeys(c for _, c in results)
    ordered = sorted(columns) if all(isinstance(c, int) for c in columns) else list(columns)
    return list(dict.fromkeys(r for r, _ in results)), ordered


def _lines(axes: Any, results: _Results, column: str) -> None:
    rows, columns = _axes(results)
    for row in rows:
        own = [c for c in columns if (row, c) in results]
        spreads = [0.0 if math.isnan(results[row, c][1]) else results[row, c][1] for c in own]
        axes.errorbar(own, [results[row, c][0] for c in own], yerr=spreads, marker="o", capsize=3, label=row)
    axes.set_xscale("log", base=2)
    axes.set_xticks(columns, [str(c) for c in columns])
    _finish(axes, "batch size" if column == "batch" else column)


def _bars(axes: Any, results: _Results, column: str) -> None:
    rows, columns = _axes(results)
    width = 0.8 / max(1, len(rows))
    for number, row in enumerate(rows):
        own = [(place, results[row, c]) for place, c in enumerate(columns) if (row, c) in results]
        places = [place + (number - (len(rows) - 1) / 2) * width for place, _ in own]
        spreads = [0.0 if math.isnan(result[1]) else result[1] for _, result in own]
        bars = axes.bar(places, [result[0] for _, result in own], width * 0.92, yerr=spreads, capsize=3, label=row)
        axes.bar_label(bars, [f"{result[0]:.1f}" for _, result in own], fontsize=7, padding=2)
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    lowest = min((result[0] for result in results.values()), default=0.0)
    axes.set_ylim(bottom=max(0.0, math.floor(lowest / 10.0) * 10.0 - 10.0))
    _finish(axes, "batch size" if column == "batch" else column)


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


STUDIES: dict[str, Callable[[Settings], StudyReport]] = {
    "cifar10": cifar10,
    "microbatch": microbatch,
    "table1": table1,
    "depth": depth,
}
"""By name."""
