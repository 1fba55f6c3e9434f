"""Predicted against measured signals, network by network: ``python -m normfree.experiments.prediction_table``.

Measures every network of the list with N(0, 1) input over several seeds, predicts the same networks, and writes a
Markdown table with the worst point of each: the one at which the prediction is furthest off, none left out.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_text
from ..signal import SignalPropagation, predict_spp, spp, without_weights
from ..sources import load_model

_SMALLEST_MEAN = 1e-3  # squared means below it are not compared
_SMALLEST_VARIANCE = 1e-12  # nor are branches that are zero but for rounding


@dataclass(frozen=True)
class Case:
    """One network at one input size.

    Attributes:
        model: as on the command line.
        size: height and width.
        batch: examples per seed.
        seeds: how many networks are averaged over.
        options: of the model.
        reach: largest relative error of a variance that was aimed at.
        declared: predict the mean over all seeds, from the initialisation that the layers declare, in place of each
            seed's own weights: where one network is far from the next, a few of them are no mean.
    """

    model: str
    size: int
    batch: int = 8
    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    reach: float = 0.15
    declared: bool = False

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.model} ({options})" if options else self.model


@dataclass(frozen=True)
class Worst:
    """The point where one statistic is furthest off.

    ``uncertainty`` is the relative standard error of the measured mean over seeds; ``certain`` the largest error at any
    point, this one or another, once two standard errors are taken off it.
    """

    name: str
    measured: float
    predicted: float
    uncertainty: float = 0.0
    certain: float = 0.0

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1.0

    def __str__(self) -> str:
        error = f"{100 * self.error:+.1f} (± {100 * self.uncertainty:.1f}) %"
        return f"{error} at {self.name} ({self.measured:.3g} → {self.predicted:.3g})"


@dataclass(frozen=True)
class Row:
    """What one case showed; a statistic that there was nothing to compare of is None."""

    case: Case
    points: int
    variance: Worst | None
    residual: Worst | None
    squared_mean: Worst | None
    notes: tuple[str, ...]

    @property
    def met(self) -> str:
        """Whether both variances are within the reach, and where not, whether the measurement could tell."""
        outside = [worst for worst in (self.variance, self.residual) if worst and abs(worst.error) > self.case.reach]
        if not outside:
            return "yes"
        return "no" if any(worst.certain > self.case.reach for worst in outside) else "within 2 standard errors"


_ONE = {"skip_gain": 1.0}
_HE = {"weights": "he", "alpha": 1.0}
_PEERS = (
    *("timm:resnet18", "timm:resnet50", "timm:resnext50_32x4d", "timm:wide_resnet50_2", "timm:seresnet50"),
    *("timm:regnetx_002", "timm:regnety_002", "timm:convnext_atto", "timm:mobilenetv2_100"),
    *("timm:mobilenetv3_small_100", "timm:efficientnet_b0", "torchvision:resnet50", "torchvision:mobilenet_v3_small"),
    *("torchvision:efficientnet_b0", "torchvision:regnet_y_400mf", "torchvision:convnext_tiny"),
    *("torchvision:vgg11_bn", "torchvision:densenet121"),
)
CASES: tuple[Case, ...] = (
    Case("nf_resnet50", 224, 8, 4, reach=0.03),
    Case("nf_resnet50", 64, 32, 8, reach=0.03),
    Case("nf_resnet200", 64, 32, 6, reach=0.03),
    Case("nf_resnet600", 64, 16, 6, reach=0.03),
    Case("resnetv2_50", 224, reach=0.03),
    Case("resnetv2_50", 64, 32, 4, reach=0.03),
    Case("resnetv2_200", 64, 32, 2, reach=0.03),
    Case("resnetv2_50_relu_bn", 224, reach=0.03),
    Case("resnetv2_50_relu_bn", 64, 32, 4, reach=0.03),
    Case("resnetv2_200_relu_bn", 64, 32, 2, reach=0.03),
    Case("skipinit_resnet50", 224, 2, 240, _ONE, reach=0.03, declared=True),
    Case("skipinit_resnet50", 64, 2, 240, _ONE, reach=0.03, declared=True),
    Case("nf_resnet50", 224, 2, 240, _HE, reach=0.03, declared=True),
    Case("nf_resnet50", 64, 2, 240, _HE, reach=0.03, declared=True),
    Case("skipinit_resnet26", 64, 2, 60, {**_ONE, "width": 2.0}, reach=0.03, declared=True),
    Case("nf_resnet26", 64, 2, 60, {**_HE, "width": 2.0}, reach=0.03, declared=True),
    Case("nf_regnet_b0", 96, 16, 12, reach=0.05),
    Case("nf_regnet_b0", 192, 8, 6, reach=0.05),
    Case("nf_regnet_b1", 96, 16, 8, reach=0.05),
    Case("nfnet_f0", 96, 16, 4, _ONE, reach=0.05),
    Case("nfnet_f0", 192, 4, 2, _ONE, reach=0.05),
    *(Case(model, size, 8 if size == 224 else 32, 2) for model in _PEERS for size in (224, 64)),
    Case("fixup_resnet50", 64, 8, 16),
    Case("timm:vit_tiny_patch16_224", 224, 4, 2),
)


def compare(case: Case) -> Row:
    """Measures and predicts one case: both are means over the same networks, or the prediction is that of all."""
    measured, predicted = [], []
    for seed in range(case.seeds):
        torch.manual_seed(seed)
        model = _model(case)
        shape = (case.batch, 3, case.size, case.size)
        measured.append(spp(model, torch.randn(shape)))
        if not case.declared:
            predicted.append(predict_spp(model, shape))
    if case.declared:
        with without_weights():
            model = _model(case)
        predicted = [predict_spp(model, (case.batch, 3, case.size, case.size))]
    return Row(
        case,
        len(measured[0].points),
        _worst(measured, predicted, "avg_channel_variance", lambda value: value > _SMALLEST_VARIANCE),
        _worst(measured, predicted, "residual_avg_channel_variance", lambda value: value > _SMALLEST_VARIANCE),
        _worst(measured, predicted, "avg_channel_squared_mean", lambda value: value > _SMALLEST_MEAN),
        predicted[0].notes,
    )


def _model(case: Case) -> nn.Module:
    model = load_model(case.model, **case.options)
    return model.eval()


def _worst(
    measured: Sequence[SignalPropagation],
    predicted: Sequence[SignalPropagation],
    statistic: str,
    counts: Callable[[float], bool],
) -> Worst | None:
    compared = []
    for index, point in enumerate(measured[0].points):
        values = [signal.values(statistic)[index] for signal in measured]
        others = [signal.values(statistic)[index] for signal in predicted]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            continue
        mean = sum(known) / len(known)
        if counts(mean):
            spread = statistics.stdev(known) / mean / len(known) ** 0.5 if len(known) > 1 else 0.0
            compared.append(Worst(point.name, mean, sum(value or 0.0 for value in others) / len(others), spread))
    if not compared:
        return None
    certain = max(abs(worst.error) - 2.0 * worst.uncertainty for worst in compared)
    return replace(max(compared, key=lambda worst: abs(worst.error)), certain=certain)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| network | pixels | seeds × batch | variance: worst point (measured → predicted) | residual variance "
        "| squared mean, where above 0.001 | aimed at | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row.case
        cells = [
            case.name,
            str(case.size),
            f"{case.seeds} × {case.batch}",
            *(str(worst) if worst is not None else "–" for worst in (row.variance, row.residual, row.squared_mean)),
            f"{100 * case.reach:.0f} %",
            row.met,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    noted = [f"- {row.case.name} at {row.case.size} px: {note}" for row in rows for note in row.notes]
    if noted:
        lines += ["", "Operators without a rule:", "", *noted]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints or writes the table; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m normfree.experiments.prediction_table", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; by default the table is printed")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--seeds", type=int, help="in place of each case's own number")
    options = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        if options.only not in case.name:
            continue
        if options.seeds is not None:
            case = replace(case, seeds=options.seeds)
        start = time.perf_counter()
        row = compare(case)
        rows.append(row)
        seconds = time.perf_counter() - start
        worst = [str(w) for w in (row.variance, row.residual, row.squared_mean) if w is not None]
        print(f"{case.name} {case.size} ({seconds:.0f} s): {'; '.join(worst)}", file=sys.stderr, flush=True)
    words = shlex.join(["python", "-m", "normfree.experiments.prediction_table", *(arguments or sys.argv[1:])])
    text = f"Made by `{words}`, torch {torch.__version__}.\n\n{as_markdown(rows)}"
    if options.out is None:
        print(text)
    else:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
