"""Labelled images that are read on the way, in the order of a stream, for data that no disk or memory here holds."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...decoding import UnreadableImage, decode_image
from ..recipe import DataSection
from .columns import SUFFIXES, class_names, column_names, load, load_hub, place_of, with_rows
from .errors import DataError
from .labels import check_classes, check_range, integer_labels
from .locate import Kind, split_files
from .opened import Split

_ROWS_AT_ONCE = 64


class StreamItem(NamedTuple):
    """One encoded example."""

    content: bytes
    label: int
    name: str


class StreamedExamples:
    """Examples in the order of a stream.

    Args:
        name: what to call them in messages.
        rows: a Hugging Face ``IterableDataset`` of encoded images and labels.
        image, label: its columns.
        channels: 1 or 3.
        classes: how many there are.
        length: how many examples there are, as far as that is known.
        buffer: how many examples are shuffled among.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        image: str,
        label: str,
        channels: int,
        classes: int,
        length: int | None,
        buffer: int,
    ):
        self.name, self.channels, self.length, self.buffer = name, channels, length, buffer
        self._rows, self._image, self._label, self._classes = rows, image, label, classes

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"nobody knows how many examples {self.name} has")
        return self.length

    def stream(self, seed: int | None = None) -> Iterator[StreamItem]:
        """All examples, shuffled by a seed, or in the order of the files.

        Raises:
            DataError: a label is missing, no integer or out of range.
        """
        rows = self._rows if seed is None else self._rows.shuffle(seed=seed, buffer_size=self.buffer)
        for number, row in enumerate(rows):
            image = row[self._image]
            content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            name = str(path or f"example {number} of the stream")
            yield StreamItem(content or b"", self._checked(row[self._label], name), name)

    def describe(self, item: StreamItem) -> str:
        return item.name

    def label(self, item: StreamItem) -> int:
        return item.label

    def load(self, item: StreamItem) -> Image.Image:
        return decode_image(item.content, self.channels)

    def sample(self, count: int) -> list[Image.Image]:
        """The first images of the files; unreadable ones are left out."""
        images = []
        for item in itertools.islice(self.stream(), count):
            try:
                images.append(self.load(item))
            except UnreadableImage:
                continue
        return images

    def _checked(self, label: Any, name: str) -> int:
        if isinstance(label, bool) or not isinstance(label, int):
            found = "no label" if label is None else f"the label {label!r}, no integer"
            raise DataError(f"data: {name} of {self.name} has {found}; name the column with data.label_column")
        if not 0 <= label < self._classes:
            raise DataError(
                f"data: {name} of {self.name} has the label {label}, out of range for {self._classes} classes "
                f"(0 to {self._classes - 1})"
            )
        return label


class OpenedStream(NamedTuple):
    """Classes and streams."""

    classes: tuple[str, ...]
    streams: dict[Split, StreamedExamples | None]
    notes: list[str]


def open_streams(section: DataSection, kind: Kind, splits: Sequence[Split], channels: int) -> OpenedStream:
    """Streams of Parquet files, WebDataset shards or a data set of the hub.

    The labels of local files are read and checked beforehand; with them the number of examples is known.

    Raises:
        DataError: what :func:`open_columns` raises, or nothing is named for validation: nothing is held out of a
            stream.
    """
    if section.holdout is not None:
        raise DataError("data.holdout: not for streaming; name files for validation with data.validation")
    files = {} if kind == "hub" else _named_files(section, kind, splits)
    remote = {split: load_hub(section, split, streaming=True) for split in splits} if kind == "hub" else {}
    features = next(iter(remote.values())).features if remote else _features(kind, next(iter(files.values())), section)
    if features is None:
        raise DataError(f"data: {section.path} does not say which columns it has; it cannot be streamed")
    image, label = column_names(features, section)
    labels = {split: _labels(kind, paths, label, place_of(section, split)) for split, paths in files.items()}
    notes: list[str] = []
    classes = _classes(features[label], labels, section.path, notes)
    for split, values in labels.items():
        check_range(values, classes, place_of(section, split))
    if "train" in splits and "train" in labels:
        check_classes(labels["train"][: section.limit], classes, place_of(section, "train"))

    def stream(split: Split) -> StreamedExamples | None:
        if split not in files and split not in remote:
            return None
        rows = _encoded(remote[split], image, label) if remote else _rows(kind, files[split], image, label, section)
        limit = section.limit if split == "train" else section.validation_limit
        counts = [count for count in (len(labels[split]) if labels else None, limit) if count is not None]
        return StreamedExamples(
            place_of(section, split),
            rows if limit is None else rows.take(limit),
            image,
            label,
            channels,
            len(classes),
            min(counts, default=None),
            section.shuffle_buffer,
        )

    return OpenedStream(classes, {split: stream(split) for split in splits}, notes)


def _classes(feature: Any, labels: Mapping[Split, np.ndarray], path: str, notes: list[str]) -> tuple[str, ...]:
    """Names from the metadata, else numbers up to the highest label."""
    names = class_names(feature)
    if names is not None:
        return names
    if not labels:
        raise DataError(f"data: {path} does not name its classes; it cannot be streamed")
    highest = max(int(values.max(initial=-1)) for values in labels.values())
    notes.append(f"{path}: no class names; labels run from 0 to {highest}")
    return tuple(str(number) for number in range(highest + 1))


def _named_files(section: DataSection, kind: Kind, splits: Sequence[Split]) -> dict[Split, list[Path]]:
    files = split_files(section.path, SUFFIXES[kind], section.train, section.validation)
    if files.held_out and "validation" in splits:
        raise DataError(
            f"data: nothing in {section.path} is named for validation, and nothing is held out of a stream; "
            "name files with data.validation"
        )
    named: dict[Split, list[Path]] = {"train": files.train, "validation": [] if files.held_out else files.validation}
    found: dict[Split, list[Path]] = {}
    for split, paths in named.items():
        if paths:
            found[split] = with_rows(paths) if kind == "parquet" else paths
            if not found[split]:
                raise DataError(f"data: there is no example in {place_of(section, split)}: its tables have no rows")
    return found


def _features(kind: Kind, files: Sequence[Path], section: DataSection) -> Any:
    """Names and types of the columns, in the terms of ``datasets``."""
    if kind == "webdataset":
        return _shards(files, section).features
    import datasets
    import pyarrow.parquet as pq

    return datasets.Features.from_arrow_schema(pq.read_schema(files[0]))


def _rows(kind: Kind, files: Sequence[Path], image: str, label: str, section: DataSection) -> Any:
    if kind == "webdataset":
        return _encoded(_shards(files, section), image, label)
    import datasets

    # the packaged reader of Parquet streams sleeps for seconds at the end of every pass, for the sake of remote files
    options = {"files": [str(file) for file in files], "columns": (image, label)}
    return datasets.IterableDataset.from_generator(_parquet_rows, gen_kwargs=options)


def _parquet_rows(files: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as table:
            for rows in table.iter_batches(_ROWS_AT_ONCE, columns=list(columns)):
                yield from rows.to_pylist()


def _shards(files: Sequence[Path], section: DataSection) -> Any:
    paths = {"data": [str(file) for file in files]}
    return load("webdataset", section.path, data_files=paths, split="data", streaming=True)


def _encoded(rows: Any, image: str, label: str) -> Any:
    """Rows of two columns whose images stay bytes."""
    import datasets

    rows = rows.select_columns([image, label])
    if isinstance(rows.features[image], datasets.Image):
        return rows.cast_column(image, datasets.Image(decode=False))
    return rows


def _labels(kind: Kind, files: Sequence[Path], label: str, place: str) -> np.ndarray:
    """(N,) int64: all labels of local files, without reading their images."""
    if kind == "webdataset":
        return np.array([value for file in files for value in _shard_labels(file, label, place)], np.int64)
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = []
    for file in files:
        if label not in pq.read_schema(file).names:
            raise DataError(f"data: {file} has no column {label!r}, so its labels are missing")
        columns += pq.read_table(file, columns=[label]).column(0).chunks
    return integer_labels(pa.chunked_array(columns), label, place)


def _shard_labels(file: Path, label: str, place: str) -> Iterator[int]:
    """Labels of a shard, from its members NAME.LABEL; their contents are a few bytes."""
    try:
        with tarfile.open(file) as shard:
            for member in shard:
                if member.isfile() and member.name.rpartition(".")[2] == label:
                    content = shard.extractfile(member)
                    text = content.read() if content is not None else b""
                    if not text.strip().lstrip(b"-").isdigit():
                        raise DataError(f"data: {member.name} of {place} holds {text[:20]!r}, not an integer")
                    yield int(text)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"data: {file} is no readable tar file: {error}") from None
