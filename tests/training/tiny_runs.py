"""Runs of a second or less on the digits, for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.training import Recipe, load_recipe, train
from normfree.training.checkpoint import load_checkpoint

NET = "model={name: nf_resnet26, options: {width: 0.0625, stem: small}}"
TINY = (
    NET,
    "data={path: digits, limit: 64, validation_limit: 40, size: 8}",
    "epochs=2",
    "batch_size=16",
    "optimizer={learning_rate: 0.2, learning_rate_batch: null, warmup_epochs: 0.5}",
    "log={every: 3}",
    "checkpoint={every_epochs: 1, every_minutes: null}",
    "channels_last=false",
    "device=cpu",  # where runs are the same bit for bit, and two processes find as many
)
"""Eight updates in two epochs."""

EVERYTHING = (
    "model.options.drop_rate=0.2",
    "model.options.stochastic_depth_rate=0.3",
    "augmentation.mixup=0.2",
    "augmentation.cutmix=1.0",
    "microbatch_size=8",
    "ema_decay=0.9",
    "label_smoothing=0.1",
    "optimizer.adaptive_clipping=0.1",
    "optimizer.clip_norm=2.0",
)
"""All that is random or has a state."""


def tiny(*overrides: str) -> Recipe:
    return load_recipe({}, [*TINY, *overrides])


def quiet(line: str) -> None:
    pass


def run(recipe: Recipe | None, out: Path | None = None, **options: Any) -> dict[str, Any]:
    """Trains without a word and returns the last checkpoint."""
    result = train(recipe, out, say=quiet, **options)
    return load_checkpoint(result.folder / "checkpoints" / "last.pt")


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state, by place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inner, f"{name}/{key}")


def learned(state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of model, optimiser and average."""
    return dict(tensors({key: state[key] for key in ("model", "optimizer", "average")}))


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    left, right = learned(one), learned(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for key in ("update", "best", "losses", "is_settled"):
        assert one[key] == other[key], key


def table(path: Path, without: tuple[str, ...] = ()) -> list[list[str]]:
    """The cells of a CSV file, but for some columns."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if name not in without]
    return [[row[place] for place in kept] for row in rows]


def tables(folder: Path) -> list[list[list[str]]]:
    """What a run has written down, but for times."""
    times = ("images_per_second", "data_wait")
    return [table(folder / "log.csv", times), table(folder / "evaluations.csv")]
