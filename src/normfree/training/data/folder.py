"""Folders of images, one folder for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..recipe import DataSection
from .errors import DataError
from .examples import EncodedExamples, Examples, FileContents, keep_decoded
from .locate import TRAINING_NAMES, VALIDATION_NAMES, folders_in, split_folder
from .opened import HELD_OUT_EVERY, Opened, held_out_in_classes

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".tga",
    ]
)
_LAYOUT = "expected PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE, or PATH/CLASS/IMAGE"


def open_folder(section: DataSection, splits: Collection[str], channels: int) -> Opened:
    """Examples of an image folder.

    Either there are folders for training and validation with class folders in them, or class folders only; then every
    tenth image of each class is held out for validation. Classes are numbered in the order of their names.

    Raises:
        DataError: no class folders, no images, or a class in validation that training does not have.
    """
    root = Path(section.path).expanduser()
    train = split_folder(root, section.train, TRAINING_NAMES)
    validation = split_folder(root, section.validation, VALIDATION_NAMES)
    notes: list[str] = []
    if train is None and validation is None:
        classes = _classes(root)
        files, labels = _listed(root, classes, notes)
        chosen = held_out_in_classes(labels)
        parts = {"train": (root, files, labels, ~chosen), "validation": (root, files, labels, chosen)}
        notes.append(_held_out_note(root))
    else:
        classes = _classes(train or validation or root)
        parts = {}
        if train is not None and (validation is None or "train" in splits):
            files, labels = _listed(train, classes, notes)
            chosen = held_out_in_classes(labels) if validation is None else np.zeros(len(labels), bool)
            parts["train"] = (train, files, labels, ~chosen)
            if validation is None:
                parts["validation"] = (train, files, labels, chosen)
                notes.append(_held_out_note(train))
        if validation is not None and "validation" in splits:
            files, labels = _listed(validation, classes, notes)
            parts["validation"] = (validation, files, labels, np.ones(len(labels), bool))
    limits = {"train": section.limit, "validation": section.validation_limit}
    opened = {split: _examples(*parts[split], limits[split], channels, section) for split in splits if split in parts}
    return Opened(opened.get("train"), opened.get("validation"), classes, tuple(notes))


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(place.name for place in folders_in(folder))
    if not names:
        loose = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())
        found = f"{loose} images without a label" if loose else "nothing to train on"
        raise DataError(f"data: {folder} has no class folders, only {found}; {_LAYOUT}")
    return names


def _listed(folder: Path, classes: tuple[str, ...], notes: list[str]) -> tuple[list[Path], np.ndarray]:
    """Image files and their labels: the first of each class, the second of each class, and so on."""
    numbers = {name: number for number, name in enumerate(classes)}
    found: list[tuple[int, int, Path]] = []
    others: Counter[str] = Counter()
    for place in folders_in(folder):
        if place.name not in numbers:
            raise DataError(
                f"data: {folder} has a class {place.name!r} that is not among the {len(classes)} classes of training; "
                "the class folders of both must have the same names"
            )
        files = sorted(file for file in place.rglob("*") if not file.name.startswith(".") and file.is_file())
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        others.update(file.suffix.lower() or "no ending" for file in files if file.suffix.lower() not in IMAGE_SUFFIXES)
        found += [(position, numbers[place.name], file) for position, file in enumerate(images)]
    if not found:
        raise DataError(f"data: there is no image in the class folders of {folder}; {_LAYOUT}")
    if others:
        endings = ", ".join(sorted(others))
        notes.append(f"{folder}: {others.total()} files that are no images by their name left out ({endings})")
    found.sort(key=lambda entry: entry[:2])
    return [file for _, _, file in found], np.array([label for _, label, _ in found], np.int64)


def _examples(
    folder: Path,
    files: list[Path],
    labels: np.ndarray,
    chosen: np.ndarray,
    limit: int | None,
    channels: int,
    section: DataSection,
) -> Examples:
    rows = np.flatnonzero(chosen)[:limit]
    contents = FileContents(folder, [files[row] for row in rows])
    encoded = EncodedExamples(str(folder), contents, labels[rows], channels)
    return keep_decoded(
        encoded, False if section.streaming and section.keep_decoded == "auto" else section.keep_decoded
    )


def _held_out_note(folder: Path) -> str:
    return f"{folder}: no folder for validation; every {HELD_OUT_EVERY}th image of each class is held out"
