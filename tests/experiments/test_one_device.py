"""Runs of a study that are trained side by side in one process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from normfree.experiments import Settings
from normfree.experiments.one_device import OneDeviceRunner
from normfree.experiments.study import Cell, OutOfTime
from normfree.experiments.training_studies import BN, BN_PLAIN, NF, full_width
from normfree.training import load_recipe, train

TINY = (
    "model.options={width: 0.0625, alpha: 1.0, stem: small}",
    "data={path: digits, limit: 64, validation_limit: 50}",
    "epochs=1",
    "optimizer.learning_rate=0.05",
    "precision=float32",
    "device=cpu",
)


def cell(*overrides: str) -> Cell:
    return Cell({"method": "a", "batch": 16}, load_recipe("cifar10", [*TINY, "batch_size=16", *overrides]))


def test_a_run_is_kept_as_others_are_and_not_made_again(tmp_path: Path) -> None:
    cells, said = [cell(), cell("seed=1"), cell("batch_size=32")], list[str]()
    outcomes = OneDeviceRunner(tmp_path, say=said.append).finish(cells)
    assert [outcome.cell for outcome in outcomes] == cells
    assert sum("networks side by side" in line for line in said) == 2, "one group for each batch size"
    alone = train(cells[0].recipe, tmp_path / "alone", say=said.append).evaluation
    assert (outcomes[0].top1, outcomes[0].loss) == (
        pytest.approx(alone.top1, abs=2.1),
        pytest.approx(alone.loss, rel=1e-3),
    )
    assert {outcome.started["device"] for outcome in outcomes} == {"cuda" if torch.cuda.is_available() else "cpu"}
    assert all(outcome.seconds > 0.0 for outcome in outcomes)
    silent: list[str] = []
    assert OneDeviceRunner(tmp_path, say=silent.append, needs_gpu=True).finish(cells) == outcomes
    assert silent == []


def test_time_and_divergence(tmp_path: Path) -> None:
    steep = cell("optimizer.learning_rate=1e7", "optimizer.adaptive_clipping=null", "optimizer.warmup_epochs=0")
    (diverged,) = OneDeviceRunner(tmp_path, say=[].append).finish([steep])
    assert diverged.diverged
    with pytest.raises(OutOfTime, match="2 of 3 runs are not finished"):
        OneDeviceRunner(tmp_path, minutes=0.0, say=[].append).finish([steep, cell(), cell("seed=1")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_of_full_width_is_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="18 runs of this size need a GPU, and torch sees none"):
        full_width(Settings(data="digits", folder=tmp_path, say=[].append))
    assert not (tmp_path / "runs").exists()


def test_the_quick_study(tmp_path: Path) -> None:
    report = full_width(Settings(quick=True, folder=tmp_path, say=[].append))
    files = report.write(tmp_path)
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["batch"]) for row in rows] == [
        (method.name, batch) for batch in ("64", "128") for method in (NF, BN, BN_PLAIN)
    ]
    assert len(report.claims) == 4
    tuned = json.loads(files[2].read_text())["settings"]["tuned"]
    assert tuned[BN_PLAIN.name] == {"optimizer": "plain", "rate": 0.4}
    recipes = {outcome.cell.labels["method"]: outcome.cell.recipe for outcome in report.outcomes}
    assert recipes[BN_PLAIN.name].optimizer.adaptive_clipping is None
    assert recipes[NF.name].optimizer.scalar_learning_rate == 0.1
    assert all(recipe.augmentation.crop == "padded" for recipe in recipes.values())
