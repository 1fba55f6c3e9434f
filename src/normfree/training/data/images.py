"""From a recipe's data section to labelled images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np

from ..recipe import DataSection
from .columns import open_columns
from .digits import digits
from .errors import DataError
from .examples import Examples, has_colour, keep_decoded, spread
from .folder import open_folder
from .labels import check_classes, check_range
from .locate import Kind, kind_of
from .opened import SPLITS, Opened, Split
from .streaming import StreamedExamples, open_streams

Source = Examples | StreamedExamples
_Source = TypeVar("_Source", Examples, StreamedExamples)
_PURPOSES = {"train": "training", "validation": "validation"}


@dataclass(frozen=True)
class ImageData:
    """Labelled images for training and for validation.

    Attributes:
        train, validation: the examples; None for a split that was not asked for.
        classes: names, by label.
        channels: 1 or 3.
        notes: what was assumed, such as which examples were held out; a sentence each.
        training_examples: gives the examples for training also where they were not asked for, for their mean and
            standard deviation; None if there are none.
    """

    train: Source | None
    validation: Source | None
    classes: tuple[str, ...]
    channels: int
    notes: tuple[str, ...] = ()
    training_examples: Callable[[], Source | None] = field(default=lambda: None, repr=False)


def open_data(
    section: DataSection, seed: int = 0, *, splits: Collection[Split] = SPLITS, channels: int = 3
) -> ImageData:
    """The examples that a recipe names, ready to be decoded.

    Args:
        section: of the recipe.
        seed: of the run. What is held out for validation does not depend on it.
        splits: those that are wanted.
        channels: 3 gives RGB, and grey images three equal channels; 1 gives grey images.

    Raises:
        DataError: no data, or not the split that is wanted; labels that are missing, no integers or out of range;
            one class only. The message names the place and the remedy.
    """
    if channels not in (1, 3):
        raise DataError(f"channels: expected 1 (grey) or 3 (RGB), got {channels}")
    kind = kind_of(section.path)
    if section.streaming and kind not in ("digits", "folder"):
        return _streamed(section, kind, tuple(splits), channels)
    opened = _opened(section, kind, channels)
    limits = {"train": section.limit, "validation": section.validation_limit}

    @cache
    def split(wanted: Split) -> Examples | None:
        examples = opened.split(wanted) if section.holdout is None else _held_out(opened, section.holdout, wanted)
        limit = limits[wanted]
        if examples is None or limit is None or limit >= len(examples):
            return examples
        return examples.at(np.arange(limit))

    found: dict[Split, Examples] = {}
    for wanted in splits:
        examples = _checked(split(wanted), wanted, opened, section.path)
        found[wanted] = examples
    notes = list(opened.notes)
    if section.holdout is not None:
        notes.append(f"{section.path}: {section.holdout} training examples, evenly spread, are held out for validation")
    if channels == 1 and any(has_colour(examples) for examples in found.values()):
        notes.append(f"{section.path}: colour images are turned to grey, for a network with one input channel")
    kept = {wanted: keep_decoded(examples, section.keep_decoded) for wanted, examples in found.items()}
    return ImageData(
        kept.get("train"),
        kept.get("validation"),
        opened.classes,
        channels,
        tuple(notes),
        lambda: split("train"),
    )


def _streamed(section: DataSection, kind: Kind, splits: tuple[Split, ...], channels: int) -> ImageData:
    opened = open_streams(section, kind, splits, channels)
    found = {split: _present(opened.streams[split], split, section.path) for split in splits}
    return ImageData(
        found.get("train"),
        found.get("validation"),
        opened.classes,
        channels,
        tuple(opened.notes),
        lambda: open_streams(section, kind, ("train",), channels).streams["train"],
    )


def _opened(section: DataSection, kind: Kind, channels: int) -> Opened:
    if kind == "digits":
        return digits(channels)
    if kind == "folder":
        return open_folder(section, channels)
    return open_columns(section, kind, channels)


def _held_out(opened: Opened, count: int, wanted: Split) -> Examples | None:
    """Some of the training examples, evenly spread over them, or the rest."""
    whole = opened.split("train")
    if whole is None:
        return None
    if count >= len(whole):
        raise DataError(f"data.holdout: {count} of {len(whole)} examples of {whole.name} leave none to train on")
    held_out = np.isin(np.arange(len(whole)), spread(len(whole), count))
    return whole.at(np.flatnonzero(held_out == (wanted == "validation")))


def _checked(examples: Examples | None, split: Split, opened: Opened, path: str) -> Examples:
    present = _present(examples, split, path)
    if not len(present):
        raise DataError(f"data: there is no example for {_PURPOSES[split]} in {present.name}")
    check_range(present.labels, opened.classes, present.name)
    if split == "train":
        check_classes(present.labels, opened.classes, present.name)
    return present


def _present(examples: _Source | None, split: Split, path: str) -> _Source:
    if examples is None:
        raise DataError(
            f"data: {path} has nothing that is named for {_PURPOSES[split]}; name its files or folder with data.{split}"
        )
    return examples
