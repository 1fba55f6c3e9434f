"""Images from a folder or a Parquet file as batches for a network; what cannot be read is skipped and counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageBatches:
    """Batches of images: an iterable of (N, 3, size, size) float32 tensors of about zero mean and unit variance.

    An image is turned to RGB, its largest centred square is resized, and the channels are normalised with ImageNet's
    mean and standard deviation. Every pass reads from the start and counts anew.

    Args:
        path: a folder, searched through all its levels in sorted order (hidden files left out); a Parquet file with
            a column ``image`` of bytes or of structs with a field ``bytes`` (the Hugging Face layout); or one image.
        size: height and width in pixels.
        batch_size: images per batch; the last batch may hold fewer.
        limit: stop after so many images.

    Attributes:
        read: images that the last pass gave.
        skipped: names and reasons of what it could not read.

    Raises:
        ValueError: nothing there, no images in it (after the first pass over it), or no such column.
    """

    def __init__(self, path: str | os.PathLike[str], size: int = 224, batch_size: int = 8, limit: int | None = None):
        self.path = Path(path)
        if not self.path.exists():
            raise ValueError(f"input: there is no file or folder {self.path}")
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size: expected positive numbers, got {size} and {batch_size}")
        self.size, self.batch_size, self.limit = size, batch_size, limit
        self.read = 0
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Tensor]:
        self.read, self.skipped = 0, []
        batch: list[Tensor] = []
        for name, content in self._contents():
            try:
                batch.append(decode_image(content, self.size))
            except Exception as error:
                self.skipped.append((name, f"{error}" or type(error).__name__))
                continue
            self.read += 1
            if len(batch) == self.batch_size:
                yield torch.stack(batch)
                batch = []
            if self.limit is not None and self.read >= self.limit:
                break
        if batch:
            yield torch.stack(batch)
        if not self.read:
            reason = f"; {len(self.skipped)} files could not be read as images" if self.skipped else ""
            raise ValueError(f"input: there is no image in {self.path}{reason}")

    def note(self) -> str | None:
        """What was skipped, in a sentence; None if nothing was."""
        if not self.skipped:
            return None
        names = ", ".join(name for name, _ in self.skipped[:3]) + (", …" if len(self.skipped) > 3 else "")
        return f"{len(self.skipped)} of {self.read + len(self.skipped)} files skipped, not readable as images: {names}"

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        if self.path.suffix.lower() == ".parquet":
            yield from _parquet_contents(self.path)
            return
        files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*"))
        for file in files:
            hidden = any(part.startswith(".") for part in file.relative_to(self.path).parts)
            if file.is_file() and not hidden:
                yield str(file.relative_to(self.path) if file != self.path else file.name), file.read_bytes()


def decode_image(content: bytes, size: int) -> Tensor:
    """(3, size, size) float32 from an encoded image of any mode and shape: centred square, resized, normalised.

    Raises:
        ValueError: the bytes are no image that Pillow can read, or break off.
    """
    from PIL import Image, ImageOps

    from .decoding import decode_image as decode

    square = ImageOps.fit(decode(content), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 255.0
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (pixels - mean) / std


def _parquet_contents(path: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"input: {path} is no readable Parquet file: {str(error).splitlines()[0]}") from None
    names = table.schema_arrow.names
    if "image" not in names:
        raise ValueError(f"input: {path} has no column 'image', only {', '.join(names)}")
    row = 0
    for group in table.iter_batches(batch_size=64, columns=["image"]):
        for cell in group.column(0):
            content: Any = cell.as_py()
            content = content.get("bytes") if isinstance(content, dict) else content
            yield f"row {row}", content if isinstance(content, bytes) else b""
            row += 1
