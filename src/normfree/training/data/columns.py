"""Tables with a column of images and one of labels, through Hugging Face datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from ..recipe import DataSection
from .errors import DataError
from .examples import ColumnContents, EncodedExamples, Examples, keep_decoded
from .labels import check_range, integer_labels
from .locate import Kind, SplitFiles, split_files
from .opened import HELD_OUT_EVERY, Opened, held_out_rows

_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label", "category")


def open_columns(section: DataSection, kind: Kind, splits: Collection[str], channels: int) -> Opened:
    """Examples of Parquet files, WebDataset shards, or a data set of the hub.

    Raises:
        DataError: no such files, columns or splits, or labels that are no class numbers.
    """
    tables, held_out = _tables(section, kind, splits)
    notes = []
    if held_out:
        notes.append(f"{section.path}: nothing named for validation; every {HELD_OUT_EVERY}th row is held out")
    image, label = column_names(next(iter(tables.values())).features, section)
    labels = {
        split: integer_labels(table.data.column(label), label, _place(section, split))
        for split, table in tables.items()
    }
    classes = class_names(next(iter(tables.values())).features[label])
    for split, values in labels.items():
        check_range(values, classes, _place(section, split))
    if classes is None:
        classes = tuple(str(number) for number in range(1 + max(int(v.max(initial=-1)) for v in labels.values())))
        notes.append(f"{section.path}: no class names; labels run from 0 to {len(classes) - 1}")
    limits = {"train": section.limit, "validation": section.validation_limit}
    opened: dict[str, Examples] = {}
    for split in splits:
        if split not in tables:
            continue
        table = tables[split]
        chosen = held_out_rows(len(table)) if held_out else np.full(len(table), split == "validation")
        rows = np.flatnonzero(chosen == (split == "validation"))[: limits[split]]
        contents = ColumnContents(table.data.column(image), rows)
        encoded = EncodedExamples(_place(section, split), contents, labels[split][rows], channels)
        opened[split] = keep_decoded(encoded, section.keep_decoded)
    return Opened(opened.get("train"), opened.get("validation"), classes, tuple(notes))


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


def _place(section: DataSection, split: str) -> str:
    return f"{section.path} ({split})"


def _tables(section: DataSection, kind: Kind, splits: Collection[str]) -> tuple[dict[str, Any], bool]:
    """The splits that are wanted and there, and whether they are the same rows, some of which are held out."""
    if kind == "hub":
        return _hub_tables(section, splits), False
    files = split_files(section.path, _SUFFIXES[kind], section.train, section.validation)
    return _file_tables(files, kind, splits, section), files.held_out


def _file_tables(files: SplitFiles, kind: Kind, splits: Collection[str], section: DataSection) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for split, paths in (("train", files.train), ("validation", files.validation)):
        if split not in splits or not paths:
            continue
        if files.held_out and tables:
            tables[split] = next(iter(tables.values()))
            continue
        tables[split] = load(kind, f"{section.path}", data_files={split: [str(path) for path in paths]}, split=split)
    return tables


def _hub_tables(section: DataSection, splits: Collection[str]) -> dict[str, Any]:
    name, _, configuration = section.path.removeprefix("hub:").partition(":")
    named = {"train": section.train or "train", "validation": section.validation or "validation"}
    return {split: load(name, section.path, name=configuration or None, split=named[split]) for split in splits}


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
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
