"""Tables with a column of images and one of labels, through Hugging Face datasets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe import DataSection
from .errors import DataError
from .examples import ColumnContents, EncodedExamples, Examples
from .labels import check_range, integer_labels
from .locate import Kind, SplitFiles, split_files
from .opened import HELD_OUT_EVERY, SPLITS, Opened, Split, held_out_rows

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label", "category")


def open_columns(section: DataSection, kind: Kind, channels: int) -> Opened:
    """Examples of Parquet files, WebDataset shards, or a data set of the hub.

    Where nothing is named for validation, every tenth row is held out for it.

    Raises:
        DataError: no such files, columns or splits, or labels that are no class numbers.
    """
    files = None if kind == "hub" else split_files(section.path, SUFFIXES[kind], section.train, section.validation)
    held_out = files is not None and files.held_out
    notes = []
    if held_out:
        notes.append(f"{section.path}: nothing named for validation; every {HELD_OUT_EVERY}th row is held out")

    @cache
    def table(split: Split) -> Any:
        if held_out and split == "validation":
            return table("train")
        return load_hub(section, split) if files is None else _file_table(files, kind, split, section)

    first = table("train") if files is None or files.train else table("validation")
    if first is None:
        raise DataError(f"data: there are no {kind} files in {section.path}")
    image, label = column_names(first.features, section)
    classes = class_names(first.features[label])

    @cache
    def labels(split: Split) -> np.ndarray:
        if label not in table(split).features:
            raise DataError(f"data: {place_of(section, split)} has no column {label!r}, so its labels are missing")
        values = integer_labels(table(split).data.column(label), label, place_of(section, split))
        check_range(values, classes, place_of(section, split))
        return values

    if classes is None:
        highest = max(int(labels(name).max(initial=-1)) for name in SPLITS if table(name) is not None)
        classes = tuple(str(number) for number in range(highest + 1))
        notes.append(f"{section.path}: no class names; labels run from 0 to {highest}")

    def split(wanted: Split) -> Examples | None:
        if table(wanted) is None:
            return None
        place, contents = place_of(section, wanted), ColumnContents(table(wanted).data.column(image))
        whole = EncodedExamples(place, contents, labels(wanted), channels)
        if not held_out:
            return whole
        return whole.at(np.flatnonzero(held_out_rows(len(whole)) == (wanted == "validation")))

    return Opened(classes, split, notes)


def column_names(features: Mapping[str, Any], section: DataSection) -> tuple[str, str]:
    """The columns of images and of labels: those that are named, else the only ones that can be meant.

    Raises:
        DataError: no such column, none that can be meant, or several.
    """
    image = _column(features, section.image_column, "image", _IMAGE_NAMES, _is_image)
    label = _column(features, section.label_column, "label", _LABEL_NAMES, _is_label)
    return image, label


def class_names(feature: Any) -> tuple[str, ...] | None:
    """Names that the metadata gives to the labels."""
    names = getattr(feature, "names", None)
    return tuple(names) if names else None


def _column(features: Mapping[str, Any], named: str | None, what: str, usual: tuple[str, ...], fits: Any) -> str:
    there = f"there are {', '.join(features)}"
    if named is not None:
        if named not in features:
            raise DataError(f"data.{what}_column: there is no column {named!r}; {there}")
        return named
    known = [name for name in usual if name in features]
    candidates = known[:1] or [name for name, feature in features.items() if fits(feature)]
    if len(candidates) != 1:
        found = f"several columns may hold the {what}s" if candidates else f"no column holds {what}s"
        raise DataError(f"data: {found}; {there}: name it with data.{what}_column")
    return candidates[0]


def _is_image(feature: Any) -> bool:
    if type(feature).__name__ == "Image" or (isinstance(feature, dict) and "bytes" in feature):
        return True
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel" or getattr(feature, "dtype", "").startswith(("int", "uint"))


def place_of(section: DataSection, split: str) -> str:
    """What to call a split in messages."""
    return f"{section.path} ({split})"


def _file_table(files: SplitFiles, kind: Kind, split: Split, section: DataSection) -> Any:
    named = files.train if split == "train" else files.validation
    if not named:
        return None
    paths = with_rows(named) if kind == "parquet" else named
    if not paths:
        raise DataError(f"data: there is no example in {place_of(section, split)}: its tables have no rows")
    return load(kind, section.path, data_files={split: [str(path) for path in paths]}, split=split)


def with_rows(files: Sequence[Path]) -> list[Path]:
    """Parquet files that are not empty; ``datasets`` stumbles over those that are.

    Raises:
        DataError: a file is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for file in files:
        try:
            rows = pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"data: {file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        found += [file] if rows else []
    return found


def load_hub(section: DataSection, split: Split, **options: Any) -> Any:
    """A split of ``hub:NAME`` or ``hub:NAME:CONFIGURATION``."""
    name, _, configuration = section.path.removeprefix("hub:").partition(":")
    named = (section.train if split == "train" else section.validation) or split
    return load(name, section.path, name=configuration or None, split=named, **options)


def load(source: str, place: str, **options: Any) -> Any:
    """``datasets.load_dataset`` without progress bars, its errors in a sentence.

    Raises:
        DataError: it cannot be loaded.
        ImportError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face datasets is needed here: pip install datasets") from error
    try:
        with _quiet(datasets):
            return datasets.load_dataset(source, **options)
    except Exception as error:
        cause = error.__cause__ or error
        message = str(cause).strip().splitlines()
        raise DataError(f"data: {place} cannot be read: {message[0] if message else type(cause).__name__}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
