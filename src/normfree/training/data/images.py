"""From a recipe's data section to labelled images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from ..recipe import DataSection
from . import columns, folder
from .digits import digits
from .errors import DataError
from .examples import Examples
from .holdout import hold_out
from .labels import check_classes, check_range
from .locate import kind_of

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
TRAINING: tuple[Split, ...] = ("train",)
VALIDATION: tuple[Split, ...] = ("validation",)


@dataclass(frozen=True)
class ImageData:
    """Labelled images for training and for validation.

    Attributes:
        train, validation: the examples; None for a split that was not asked for.
        classes: names, by label.
        channels: 1 or 3.
        notes: what was assumed, such as which examples were held out; a sentence each.
    """

    train: Examples | None
    validation: Examples | None
    classes: tuple[str, ...]
    channels: int
    notes: tuple[str, ...] = field(default=())


def open_data(
    section: DataSection, seed: int = 0, *, splits: Collection[Split] = SPLITS, channels: int = 3
) -> ImageData:
    """The examples that a recipe names, ready to be decoded.

    Args:
        section: of the recipe.
        seed: of the run; what is held out for validation does not depend on it.
        splits: those that are wanted.
        channels: 3 gives RGB, and grey images three equal channels; 1 gives grey images.

    Raises:
        DataError: no data, or not the split that is wanted; labels that are missing, no integers or out of range;
            one class only. The message names the place and the remedy.
    """
    if channels not in (1, 3):
        raise DataError(f"channels: expected 1 (grey) or 3 (RGB), got {channels}")
    kind = kind_of(section.path)
    opening: Collection[Split] = splits if section.holdout is None else TRAINING
    if kind == "digits":
        opened = digits(section, channels)
    elif kind == "folder":
        opened = folder.open_folder(section, opening, channels)
    else:
        opened = columns.open_columns(section, kind, opening, channels)
    if section.holdout is not None and opened.train is not None:
        opened = hold_out(opened, section.holdout)
    data = ImageData(
        opened.train if "train" in splits else None,
        opened.validation if "validation" in splits else None,
        opened.classes,
        channels,
        opened.notes,
    )
    _check(data, splits, section.path)
    return data


def _check(data: ImageData, splits: Collection[Split], path: str) -> None:
    for split in splits:
        examples: Examples | None = getattr(data, split)
        if examples is None:
            remedy = f"data.{split}" + (", or data.train for both" if split == "validation" else "")
            raise DataError(f"data: {path} has nothing for {_PURPOSES[split]}; name its files or folder with {remedy}")
        if not len(examples):
            raise DataError(f"data: there is no example for {_PURPOSES[split]} in {examples.name}")
        check_range(examples.labels, data.classes, examples.name)
    if data.train is not None:
        check_classes(data.train.labels, data.classes, data.train.name)


_PURPOSES = {"train": "training", "validation": "validation"}
