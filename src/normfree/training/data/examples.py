"""Labelled images that can be had by number: encoded ones that are decoded when asked for, and decoded ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...decoding import UnreadableImage, decode_image, header_size, is_grey

KEPT_BYTES = 512 * 2**20
_SAMPLED_HEADERS = 256
_WORTH_A_THREAD = 2**16  # bytes of an image; for smaller ones threads wait for each other


class Examples(Protocol):
    """Labelled images by number, from 0 to ``len(examples) - 1``.

    Attributes:
        name: what to call them in messages.
        labels: (len,) int64.
        channels: 1 or 3.
    """

    name: str
    labels: np.ndarray
    channels: int

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """What to call one example: its file or its row."""

    def label(self, index: int) -> int:
        """The number of its class."""

    def at(self, rows: np.ndarray, name: str | None = None) -> Examples:
        """Some of the examples, in this order."""

    def load(self, index: int) -> Image.Image:
        """An image in mode RGB or L.

        Raises:
            UnreadableImage: it cannot be decoded.
        """


class Contents(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str: ...

    def at(self, rows: np.ndarray) -> Contents: ...

    def read(self, index: int) -> bytes:
        """The bytes of an encoded image; empty if there is none.

        Raises:
            OSError: the file is gone or cannot be read.
        """


class EncodedExamples:
    """Examples that are decoded every time they are asked for."""

    def __init__(self, name: str, contents: Contents, labels: np.ndarray, channels: int):
        self.name, self.contents, self.labels, self.channels = name, contents, labels, channels

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self, index: int) -> str:
        return self.contents.describe(index)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def at(self, rows: np.ndarray, name: str | None = None) -> EncodedExamples:
        return EncodedExamples(name or self.name, self.contents.at(rows), self.labels[rows], self.channels)

    def load(self, index: int) -> Image.Image:
        try:
            content = self.contents.read(index)
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror or error}") from None
        return decode_image(content, self.channels)


class DecodedExamples:
    """Examples whose pixels are in memory.

    Args:
        name: what to call them in messages.
        images: (H, W, C) uint8 arrays, or (N, H, W, C) if all have one size; None stands for one that failed.
        labels: (N,) int64.
        names: of the examples.
        failures: reasons, by number, of those that could not be decoded.

    Attributes:
        uniform: (N, H, W, C) uint8, if all images have one size; else None. What failed is black there.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray | Sequence[np.ndarray | None],
        labels: np.ndarray,
        names: Sequence[str],
        failures: dict[int, str] | None = None,
    ):
        self.name, self.labels, self.names = name, labels, names
        self.failures = failures or {}
        shapes = {images.shape[1:]} if isinstance(images, np.ndarray) else {i.shape for i in images if i is not None}
        self.channels = next(iter(shapes))[2] if shapes else 3
        self.uniform: np.ndarray | None = None
        if isinstance(images, np.ndarray):
            self.uniform = images
        elif len(shapes) == 1:
            empty = np.zeros(next(iter(shapes)), np.uint8)
            self.uniform = np.stack([empty if image is None else image for image in images])
        self._images = images if self.uniform is None else self.uniform

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self, index: int) -> str:
        return self.names[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def at(self, rows: np.ndarray, name: str | None = None) -> DecodedExamples:
        images = self.uniform[rows] if self.uniform is not None else [self._images[row] for row in rows.tolist()]
        failures = {new: self.failures[old] for new, old in enumerate(rows.tolist()) if old in self.failures}
        names = [self.names[row] for row in rows.tolist()]
        return DecodedExamples(name or self.name, images, self.labels[rows], names, failures)

    def load(self, index: int) -> Image.Image:
        if index in self.failures:
            raise UnreadableImage(self.failures[index])
        return as_image(self._images[index])  # type: ignore[arg-type]


def as_image(pixels: np.ndarray) -> Image.Image:
    """A PIL image from (H, W, 1 or 3) uint8."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def as_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 1 or 3) uint8 from an image in mode L or RGB."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def keep_decoded(examples: Examples, wanted: bool | str = "auto") -> Examples:
    """The examples with all pixels in memory, if that is wanted or, for ``"auto"``, if they take up to 512 MiB."""
    if not isinstance(examples, EncodedExamples):
        return examples
    if wanted == "auto":
        wanted = decoded_bytes(examples) <= KEPT_BYTES
    if not wanted:
        return examples
    failures: dict[int, str] = {}

    def pixels(index: int) -> np.ndarray | None:
        try:
            return as_pixels(examples.load(index))
        except UnreadableImage as error:
            failures[index] = str(error)
            return None

    if decoded_bytes(examples) < _WORTH_A_THREAD * len(examples):
        images = [pixels(index) for index in range(len(examples))]
    else:
        with ThreadPoolExecutor(2) as pool:  # Pillow decodes outside of the interpreter's lock
            images = list(pool.map(pixels, range(len(examples))))
    names = [examples.describe(index) for index in range(len(examples))]
    return DecodedExamples(examples.name, images, examples.labels, names, failures)


def decoded_bytes(examples: EncodedExamples) -> float:
    """About how much memory the pixels of all examples take, from the headers of some of them."""
    known = [width * height * examples.channels for width, height in sample_sizes(examples)]
    return float(np.mean(known)) * len(examples) if known else float("inf")


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` numbers below ``length``, evenly spread."""
    return sorted(set(np.linspace(0, length - 1, min(length, count)).round().astype(int).tolist())) if length else []


def sample_images(examples: Examples, count: int) -> list[Image.Image]:
    """Up to ``count`` images, evenly spread over the examples and always the same; unreadable ones are left out."""
    images = []
    for index in spread(len(examples), count):
        try:
            images.append(examples.load(index))
        except UnreadableImage:
            continue
    return images


def has_colour(examples: Examples) -> bool:
    """Whether one of up to 256 encoded images, evenly spread over the examples, is in colour by its header."""
    if not isinstance(examples, EncodedExamples):
        return False
    return not all(is_grey(_content(examples, index)) for index in spread(len(examples), _SAMPLED_HEADERS))


def sample_sizes(examples: Examples) -> list[tuple[int, int]]:
    """(width, height) of up to 256 images, evenly spread over the examples; unreadable ones are left out."""
    if isinstance(examples, EncodedExamples):
        sizes = [header_size(_content(examples, index)) for index in spread(len(examples), _SAMPLED_HEADERS)]
        return [size for size in sizes if size is not None]
    return [image.size for image in sample_images(examples, _SAMPLED_HEADERS)]


def _content(examples: EncodedExamples, index: int) -> bytes:
    try:
        return examples.contents.read(index)
    except OSError:
        return b""


class FileContents:
    """Image files."""

    def __init__(self, root: Path, files: Sequence[str]):
        self.root, self.files = root, files

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        return os.path.relpath(self.files[index], self.root)

    def at(self, rows: np.ndarray) -> FileContents:
        return FileContents(self.root, [self.files[row] for row in rows.tolist()])

    def read(self, index: int) -> bytes:
        return Path(self.files[index]).read_bytes()


class ColumnContents:
    """A column of an Arrow table: bytes, or structs with bytes and the path of a file.

    Args:
        column: ``pyarrow.ChunkedArray``.
        rows: the rows that are meant, in order; by default all.
    """

    def __init__(self, column: Any, rows: np.ndarray | None = None):
        self.column = column
        self.rows = np.arange(len(column)) if rows is None else rows
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, index: int) -> str:
        path = self._value(index)[1]
        return f"row {self.rows[index]}" + (f" ({path})" if path else "")

    def at(self, rows: np.ndarray) -> ColumnContents:
        return ColumnContents(self.column, self.rows[rows])

    def read(self, index: int) -> bytes:
        content, path = self._value(index)
        if content is None and path:
            return Path(path).read_bytes()
        return content or b""

    def _value(self, index: int) -> tuple[bytes | None, str | None]:
        row = int(self.rows[index])
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self.column.chunk(chunk)[row - int(self._starts[chunk])].as_py()
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return value, None
