"""Image folders and Parquet files, whole and broken."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from normfree.images import IMAGENET_MEAN, IMAGENET_STD, ImageBatches, decode_image


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), kind: str = "PNG", value: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "P", "1") else (value,) * len(mode)).save(buffer, kind)
    return buffer.getvalue()


def test_a_grey_image_has_the_normalised_value() -> None:
    pixels = decode_image(encoded(value=51), 8)
    expected = (0.2 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert pixels.shape == (3, 8, 8)
    assert torch.allclose(pixels, expected.view(3, 1, 1).expand(3, 8, 8), atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_images_of_every_mode(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(mode, kind=kind), 16).shape == (3, 16, 16)


def test_sixteen_bits_are_eight_bits_with_more_of_them() -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    pictures = []
    for values in (grey.astype(np.uint8), grey * 257):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        pictures.append(decode_image(buffer.getvalue(), 16))
    assert torch.allclose(pictures[0], pictures[1], atol=1e-6)


def test_the_centre_is_kept() -> None:
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue(), 20) > 1.5).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for name in ("1.png", "2.png", "a/3.png"):
        (tmp_path / name).write_bytes(encoded())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(encoded(kind="JPEG", size=(200, 200))[:400])
    (tmp_path / ".hidden.png").write_bytes(encoded())
    return tmp_path


def test_what_is_no_image_is_skipped_and_counted(folder: Path) -> None:
    images = ImageBatches(folder, size=8, batch_size=2)
    assert [len(batch) for batch in images] == [2, 1]
    assert images.read == 3
    assert sorted(name for name, _ in images.skipped) == ["broken.jpg", "notes.txt"]
    assert images.note() == "2 of 5 files skipped, not readable as images: broken.jpg, notes.txt"
    assert [len(batch) for batch in ImageBatches(folder, 8, 2, limit=2)] == [2]


def test_parquet_files(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(value=10 * i), "path": f"{i}.png"} for i in range(3)]
    rows.append({"bytes": b"nothing", "path": "x"})
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2, 3]}), tmp_path / "images.parquet")
    images = ImageBatches(tmp_path / "images.parquet", 8, 8)
    (batch,) = list(images)
    assert torch.equal(batch[1], decode_image(encoded(value=10), 8))
    assert [name for name, _ in images.skipped] == ["row 3"]
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column 'image', only pixels"):
        list(ImageBatches(tmp_path / "other.parquet"))
    (tmp_path / "fake.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="no readable Parquet file"):
        list(ImageBatches(tmp_path / "fake.parquet"))


def test_empty_and_missing_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        ImageBatches(tmp_path / "missing")
    with pytest.raises(ValueError, match="there is no image in"):
        list(ImageBatches(tmp_path))
    (tmp_path / "x.jpg").write_text("x")
    with pytest.raises(ValueError, match="1 files could not be read"):
        list(ImageBatches(tmp_path))
