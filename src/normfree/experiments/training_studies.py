"""Studies that train: against BatchNorm, over batch sizes, over depths, and table 1 of Brock et al. 2021, on CIFAR-10.

They begin with the recipe ``cifar10``: a ResNet-26 for 32 px, 0.25 of the table's width, 0.88 M parameters. Every
method's optimiser and learning rate are picked, from the same choices, by the accuracy on training images that were
held out, at the largest batch size of all: a rate that is scaled down from there stays in reach, one that is scaled up
need not. (``full_width`` and ``depth`` have theirs written down.) Test images are looked at once for each run, at its
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import result_table
from .one_device import OneDeviceRunner
from .report import Claim
from .result_table import Results, number
from .settings import Settings
from .study import StudyReport
from .tuned_study import FIRST_SETTINGS, SHORT, Method, TunedStudy, Tuning, row_name

_AS_PUBLISHED = ("model.options.alpha=null", "calibrate=none")
NF = Method("normaliser-free", ("model=nf_resnet26",))
NF_DEEP = Method("normaliser-free", ("model=nf_resnet26", *_AS_PUBLISHED))  # α = 0.2
BN = Method("BatchNorm", ("model=resnetv2_26", *_AS_PUBLISHED))
BN_PLAIN = Method("BatchNorm, plain SGD", BN.overrides)  # as such networks are usually trained
SKIPINIT = Method("SkipInit", ("model=skipinit_resnet26", *_AS_PUBLISHED))
FIXUP = Method("FixUp", ("model=fixup_resnet26", *_AS_PUBLISHED, "optimizer.scalar_learning_rate=0.1"))
NEITHER = Method("neither", ("model=skipinit_resnet26", *_AS_PUBLISHED, "model.options.skip_gain=1.0"))

REGULARISED = ("model.options.drop_rate=0.25", "model.options.stochastic_depth_rate=0.1")
_HEADLINE_RATES = {"clipped": (0.6, 1.2, 2.4), "plain": (0.4, 0.8, 1.6)}
_NETWORK = "ResNet-26"


_FULL_WIDTH = (*FIRST_SETTINGS, "model.options.width=1.0", "epochs=8", "augmentation={crop: padded, crop_padding: 2}")
_FULL_WIDTH_CHOICES = {
    NF: (
        Tuning("clipped", 0.4),
        ("label_smoothing=0.05", "optimizer.scalar_learning_rate=0.1", "optimizer.warmup_epochs=1.0"),
    ),
    BN: (Tuning("clipped", 0.8), ("label_smoothing=0.1",)),
    BN_PLAIN: (Tuning("plain", 0.4), ("label_smoothing=0.1", "optimizer.weight_decay=5e-4")),
}
"""Picked by hand on 10 000 training images that were held out: docs/figures/full_width_choices.csv has all choices."""


def cifar10(settings: Settings) -> StudyReport:
    """Normaliser-free against BatchNorm at batch 64 and 128: the recipe, three seeds, rates swept for both.

    The sweep's runs are as long as the others: in short ones BatchNorm wants another optimiser than in these.
    """
    batches, methods = (64, 128), (NF, BN)
    study = TunedStudy.begin("cifar10", settings)
    with study.until_time_is_over():
        tuned = study.tune(methods, [f"batch_size={max(batches)}"], _HEADLINE_RATES)
        study.run(
            study.cell(
                {"method": method.name, "batch": batch, "seed": seed},
                [*method.overrides, f"batch_size={batch}"],
                tuned,
            )
            for seed in study.seeds(3)
            for batch in batches
            for method in methods
        )
    results = study.results("method", "batch")
    return study.report(_NETWORK, results, "batch", _ahead(results, methods, batches), result_table.bars)


def full_width(settings: Settings) -> StudyReport:
    """The comparison of ``cifar10`` at the full width, 14 M parameters, 8 epochs: a batch size's runs at once on a GPU.

    Raises:
        ValueError: runs have to be made, torch sees no GPU, and it is not the quick version.
    """
    batches, methods = (64, 128), tuple(_FULL_WIDTH_CHOICES)
    runner = partial(OneDeviceRunner, needs_gpu=not settings.quick)
    study = TunedStudy.begin("full_width", settings, runner)
    for method, (tuning, _) in _FULL_WIDTH_CHOICES.items():
        study.settle(method.name, tuning)
    with study.until_time_is_over():
        study.run(
            study.cell(
                {"method": method.name, "batch": batch, "seed": seed},
                [*_FULL_WIDTH, *method.overrides, *_FULL_WIDTH_CHOICES[method][1], f"batch_size={batch}"],
                study.tuned,
            )
            for seed in study.seeds(3)
            for batch in batches
            for method in methods
        )
    results = study.results("method", "batch")
    claims = _ahead(results, methods, batches)
    return study.report(f"{_NETWORK} of full width", results, "batch", claims, result_table.bars)


def _ahead(results: Results, methods: Sequence[Method], batches: Sequence[int]) -> list[Claim]:
    """Claims that the first method is at least a point above each other one."""
    first, *others = methods
    return [
        _claim(
            f"batch {batch}: {first.name} at least 1 point above {other.name}",
            ours[0] - theirs[0] >= 1.0,
            f"{number(ours)} against {number(theirs)}",
        )
        for other in others
        for batch in batches
        if (ours := results.get((first.name, batch))) and (theirs := results.get((other.name, batch)))
    ]


def microbatch(settings: Settings) -> StudyReport:
    """Test accuracy over batch sizes from 1 to 128, 12 000 training images, 4 epochs, learning rate in proportion.

    Then for updates of 64 examples each that go through the network 1 to 64 at a time: what a small device would do.
    Three seeds, but one for a batch of 1, and for BatchNorm with updates of 64 made 1 image at a time. Without it,
    updates of 64 have six seeds, as single runs scatter by more than the claim about them allows.
    """
    batches, methods = (1, 2, 64) if settings.quick else (1, 2, 4, 16, 64, 128), (NF, BN)
    parts, update = (2,) if settings.quick else (2, 4, 16, 1), 64
    study = TunedStudy.begin("microbatch", settings)
    first, *others = study.seeds(6)
    few, more = others[:2], others[2:]
    with study.until_time_is_over():
        tuned = study.tune(methods)
        runs: list[tuple[Sequence[Method], dict[str, Any]]] = [
            *((methods, {"batch": batch, "seed": first}) for batch in (128, 2, 64, 4, 16, 1) if batch in batches),
            *((methods, {"batch": part, "update": update, "seed": first}) for part in parts),
            *((methods, {"batch": batch, "seed": seed}) for seed in few for batch in (2, 64, 4, 16, 128)),
            *(
                ((NF,) if part == 1 else methods, {"batch": part, "update": update, "seed": seed})
                for seed in few
                for part in parts
            ),
            *(((NF,), {"batch": part, "update": update, "seed": seed}) for seed in more for part in parts),
            *(((NF,), {"batch": update, "seed": seed}) for seed in more),
        ]
        study.run(
            study.cell({"method": method.name, **labels}, [*SHORT, *method.overrides, *_sizes(labels)], tuned)
            for chosen, labels in runs
            for method in chosen
        )
    results = study.results("method", "batch")
    claims = _flat_and_ahead(results, batches, NF.name, BN.name, "")
    ours, theirs = (row_name({"method": method.name, "update": update}, "method") for method in methods)
    for row, method in ((ours, NF.name), (theirs, BN.name)):
        if (method, update) in results:
            results[row, update] = results[method, update]  # all 64 at once
    claims += _flat_and_ahead(results, (*parts, update), ours, theirs, f"updates of {update}, ")
    return study.report(_NETWORK, results, "batch", claims, result_table.lines)


def _sizes(labels: dict[str, Any]) -> list[str]:
    """Of updates, and of what goes through the network at a time if that is less."""
    if "update" in labels:
        return [f"batch_size={labels['update']}", f"microbatch_size={labels['batch']}"]
    return [f"batch_size={labels['batch']}"]


def _flat_and_ahead(results: Results, batches: Sequence[int], ours: str, theirs: str, where: str) -> list[Claim]:
    """Claims on two rows of the table: that ours is flat, and far above the other at batch 2."""
    claims = []
    accuracies = [results[ours, batch][0] for batch in batches if (ours, batch) in results]
    if len(accuracies) == len(batches):
        span = max(accuracies) - min(accuracies)
        claims.append(_claim(f"{where}normaliser-free: flat within 0.5 point", span <= 0.5, f"spans {span:.2f} points"))
    if (ours, 2) in results and (theirs, 2) in results:
        ahead = results[ours, 2][0] - results[theirs, 2][0]
        text = f"{where}batch 2: at least 15 points above BatchNorm"
        claims.append(_claim(text, ahead >= 15.0, f"{ahead:.2f} points"))
    return claims


def depth(settings: Settings) -> StudyReport:
    """Nets of 26 to 600 layers, with the method and without it or a normaliser: do they train?"""
    depths = (26, 101) if settings.quick else (26, 101, 200, 600)
    study = TunedStudy.begin("depth", settings)
    short = (*FIRST_SETTINGS, "model.options.width=0.0625", "data.limit=4000", "epochs=2", "batch_size=32")
    with study.until_time_is_over():
        study.run(
            study.cell(
                {"method": method.name, "depth": layers},
                [*short, *method.overrides, f"model={method.overrides[0].removeprefix('model=')[:-2]}{layers}"],
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
            f"{number(results[NF_DEEP.name, layers])} with, {number(results.get((NEITHER.name, layers)))} without",
        )
        for layers in depths
        if (NF_DEEP.name, layers) in results
    ]
    return study.report(f"nets of {depths[0]} to {depths[-1]} layers", results, "depth", claims, result_table.lines)


def table1(settings: Settings) -> StudyReport:
    """FixUp, SkipInit, normaliser-free and BatchNorm, plain and regularised: the paper's table 1 at CIFAR scale."""
    methods = (FIXUP, SKIPINIT, NF, BN)
    study = TunedStudy.begin("table1", settings)
    with study.until_time_is_over():
        tuned = study.tune(methods)
        study.run(
            study.cell(
                {"method": method.name, "setting": name, "seed": seed},
                [*SHORT, *method.overrides, *extra],
                tuned,
            )
            for seed in study.seeds(3)
            for name, extra in (("plain", ()), ("regularised", REGULARISED))
            for method in methods
        )
    return study.report(_NETWORK, study.results("method", "setting"), "setting", [], result_table.bars)


def _claim(text: str, holds: bool, evidence: str) -> Claim:
    return Claim(text, bool(holds), evidence)


STUDIES: dict[str, Callable[[Settings], StudyReport]] = {
    "cifar10": cifar10,
    "full_width": full_width,
    "microbatch": microbatch,
    "table1": table1,
    "depth": depth,
}
"""By name."""
