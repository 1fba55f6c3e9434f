"""Folders of images, one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from ..recipe import DataSection
from .errors import DataError
from .examples import EncodedExamples, Examples, FileContents
from .locate import TRAINING_NAMES, VALIDATION_NAMES, folders_in, split_folder
from .opened import HELD_OUT_EVERY, Opened, Split, held_out_in_classes

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
_OTHERS = (".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga")
IMAGE_SUFFIXES = frozenset((*_JPEG, *_OTHERS))
_LAYOUT = "expected PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE, or PATH/CLASS/IMAGE"


def open_folder(section: DataSection, channels: int) -> Opened:
    """Examples of an image folder.

    Either there are folders for training and validation with class folders in them, or class folders only; then every
    tenth image of each class is held out for validation. Classes are numbered in the order of their names. Examples
    are in the order first of each class, second of each class, and so on.

    Raises:
        DataError: no class folders, no images, or a class in validation that training does not have.
    """
    root = Path(section.path).expanduser()
    train = split_folder(root, section.train, TRAINING_NAMES)
    validation = split_folder(root, section.validation, VALIDATION_NAMES)
    if train is None and validation is None:
        train = root
    classes = _classes(train or validation or root)
    notes: list[str] = []
    if validation is None:
        notes.append(f"{train}: no folder for validation; every {HELD_OUT_EVERY}th image of each class is held out")

    @cache
    def listed(folder: Path) -> Examples:
        return _examples(folder, classes, channels, notes)

    def split(wanted: Split) -> Examples | None:
        if train is not None and validation is None:
            held_out = held_out_in_classes(listed(train).labels)
            return listed(train).at(np.flatnonzero(held_out == (wanted == "validation")))
        folder = train if wanted == "train" else validation
        return None if folder is None else listed(folder)

    return Opened(classes, split, notes)


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(place.name for place in folders_in(folder))
    if not names:
        loose = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())
        found = f"only {loose} images without a label" if loose else "and no images"
        raise DataError(f"data: {folder} has no class folders, {found}; {_LAYOUT}")
    return names


def _examples(folder: Path, classes: tuple[str, ...], channels: int, notes: list[str]) -> Examples:
    numbers = {name: number for number, name in enumerate(classes)}
    found: list[tuple[int, int, str]] = []
    others: Counter[str] = Counter()
    places = folders_in(folder)
    if not places:
        raise DataError(f"data: {folder} has no class folders, so its images have no labels; {_LAYOUT}")
    for place in places:
        if place.name not in numbers:
            raise DataError(
                f"data: {folder} has a class {place.name!r} that is not among the {len(classes)} classes of training; "
                "the class folders of both must have the same names"
            )
        images = 0
        for file in _files(place):
            ending = os.path.splitext(file)[1].lower()
            if ending in IMAGE_SUFFIXES:
                found.append((images, numbers[place.name], file))
                images += 1
            else:
                others[ending or "no ending"] += 1
    if not found:
        raise DataError(f"data: there is no image in the class folders of {folder}; {_LAYOUT}")
    if others:
        left_out = ", ".join(sorted(others))
        notes.append(f"{folder}: {others.total()} files left out, no images by their names ({left_out})")
    found.sort(key=lambda entry: entry[:2])
    labels = np.array([label for _, label, _ in found], np.int64)
    return EncodedExamples(str(folder), FileContents(folder, [file for *_, file in found]), labels, channels)


def _files(folder: Path) -> list[str]:
    """All files at any depth, sorted, hidden ones left out."""
    files: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)
