"""What open_data finds, and what it says about data that cannot be used."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from normfree.decoding import decode_image
from normfree.training.data import DataError, ImageData, UnreadableImage, open_data
from normfree.training.recipe import DataSection


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def pixels(number: int, height: int = 6, width: int = 6) -> np.ndarray:
    """An image that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(number: int, size: tuple[int, int] = (6, 6)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number, *size)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, numbers: list[int], labels: list | pa.Array, names: list[str] | None = None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array([{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers])
    table = pa.table({columns.get("image", "image"): image, columns.get("label", "label"): labels})
    if names:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, path)


def write_folder(root: Path, classes: dict[str, list[int]]) -> None:
    for name, numbers in classes.items():
        (root / name).mkdir(parents=True)
        for number in numbers:
            (root / name / f"{number:03}.png").write_bytes(encoded(number))


def write_shard(path: Path, numbers: list[int], labels: list) -> None:
    with tarfile.open(path, "w") as shard:
        for number, label in zip(numbers, labels, strict=True):
            for ending, content in (("png", encoded(number)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def found(data: ImageData, split: str) -> list[tuple[int, bytes]]:
    examples = getattr(data, split)
    return [(examples.label(i), examples.load(i).tobytes()) for i in range(len(examples))]


def expected(numbers: list[int], labels: list[int]) -> list[tuple[int, bytes]]:
    return [(label, pixels(number).tobytes()) for number, label in zip(numbers, labels, strict=True)]


def test_digits_are_those_of_scikit_learn_and_a_fifth_of_each_class_is_held_out() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = open_data(DataSection(), channels=1)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.validation) == 1797
    for label, count in enumerate(np.bincount(bunch.target)):
        assert int((data.validation.labels == label).sum()) == count // 5
    seen = sorted(
        examples.load(i).tobytes() for examples in (data.train, data.validation) for i in range(len(examples))
    )
    truth = sorted(np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes() for image in bunch.images)
    assert seen == truth


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_a_folder_with_splits(tmp_path: Path, validation: str) -> None:
    write_folder(tmp_path / "train", {"cat": [0, 1, 2], "ant": [3, 4]})
    write_folder(tmp_path / validation, {"ant": [5], "cat": [6, 7]})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    data = open_data(DataSection(path=str(tmp_path)))
    assert data.classes == ("ant", "cat")
    assert found(data, "train") == expected([3, 0, 4, 1, 2], [0, 1, 0, 1, 1])
    assert sorted(found(data, "validation")) == sorted(expected([5, 6, 7], [0, 1, 1]))
    assert any("1 files left out" in note and ".txt" in note for note in data.notes)


def test_a_folder_of_classes_holds_out_every_tenth_image_of_each(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": list(range(25)), "b": list(range(100, 104)), "c": [200]})
    data = open_data(DataSection(path=str(tmp_path)))
    assert sorted(found(data, "validation")) == sorted(expected([9, 19, 103], [0, 0, 1]))
    assert len(data.train) == 27
    assert not set(found(data, "train")) & set(found(data, "validation"))
    assert any("held out" in note for note in data.notes)


def test_a_limit_takes_from_every_class_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": list(range(9)), "b": list(range(10, 19)), "c": list(range(20, 29))})
    write_folder(tmp_path / "val", {"a": [50], "b": [51], "c": [52]})
    data = open_data(DataSection(path=str(tmp_path), limit=6))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("where", ["{}", "{}/*.parquet", "{}/data"])
def test_parquet_files_are_sorted_into_splits_by_their_names(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "data" if where != "{}/*.parquet" else tmp_path
    names = ["no", "yes"]
    write_parquet(folder / "train-00000-of-00002.parquet", [0, 1, 2], [0, 1, 1], names)
    write_parquet(folder / "train-00001-of-00002.parquet", [3], [0], names)
    write_parquet(folder / "test-00000-of-00001.parquet", [4, 5], [1, 0], names)
    data = open_data(DataSection(path=where.format(tmp_path)))
    assert data.classes == ("no", "yes")
    assert found(data, "train") == expected([0, 1, 2, 3], [0, 1, 1, 0])
    assert found(data, "validation") == expected([4, 5], [1, 0])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_one_file_holds_out_every_tenth_row(tmp_path: Path, kind: str) -> None:
    numbers, labels = list(range(21)), [n % 3 for n in range(21)]
    path = tmp_path / f"pictures.{kind}"
    (write_parquet if kind == "parquet" else write_shard)(path, numbers, labels)
    data = open_data(DataSection(path=str(path)))
    assert data.classes == ("0", "1", "2")
    assert found(data, "validation") == expected([9, 19], [0, 1])
    assert len(found(data, "train")) == 19
    assert set(tmp_path.iterdir()) == {path, tmp_path / "cache"}


def test_validation_is_preferred_to_test_and_patterns_to_both(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "validation", "test", "extra")):
        write_parquet(tmp_path / f"{name}.parquet", [10 * number, 10 * number + 1], [0, 1])
    found_by_name = open_data(DataSection(path=str(tmp_path)))
    assert found(found_by_name, "validation") == expected([10, 11], [0, 1])
    chosen = open_data(DataSection(path=str(tmp_path), train="ex*.parquet", validation="test"))
    assert found(chosen, "train") == expected([30, 31], [0, 1])
    assert found(chosen, "validation") == expected([20, 21], [0, 1])


def test_other_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    table = pa.table({"left": [encoded(0), encoded(1)], "right": [encoded(2), encoded(3)], "a": [0, 1], "b": [1, 0]})
    pq.write_table(table, path)
    section = DataSection(path=str(path), validation="train.parquet", image_column="right", label_column="b")
    assert found(open_data(section), "train") == expected([2, 3], [1, 0])
    with pytest.raises(DataError, match=r"several columns may hold the images.*data\.image_column"):
        open_data(DataSection(path=str(path)))
    with pytest.raises(DataError, match=r"no column 'middle'; there are left, right, a, b"):
        open_data(DataSection(path=str(path), image_column="middle"))


def test_holdout_takes_from_training_and_leaves_validation_alone(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", list(range(20)), [n % 2 for n in range(20)])
    write_parquet(tmp_path / "test.parquet", [50, 51], [0, 1])
    whole = found(open_data(DataSection(path=str(tmp_path))), "train")
    data = open_data(DataSection(path=str(tmp_path), holdout=5))
    train, validation = found(data, "train"), found(data, "validation")
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(train + validation) == sorted(whole)
    alone = open_data(DataSection(path=str(tmp_path), holdout=5), splits=("validation",))
    assert alone.train is None
    assert found(alone, "validation") == validation
    with pytest.raises(DataError, match="leave none to train on"):
        open_data(DataSection(path=str(tmp_path), holdout=20))


def test_kept_images_are_those_that_are_decoded_each_time(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    sizes = {"a": [(4, 9), (7, 5)], "b": [(6, 6), (8, 3)]}
    for name, shapes in sizes.items():
        (tmp_path / "train" / name).mkdir()
        for number, shape in enumerate(shapes):
            (tmp_path / "train" / name / f"{number}.png").write_bytes(encoded(number, shape))
    (tmp_path / "train" / "b" / "2.png").write_bytes(b"broken")
    section = DataSection(path=str(tmp_path), validation="train")
    kept, fresh = (open_data(section.model_copy(update={"keep_decoded": k})).train for k in (True, False))
    assert type(kept) is not type(fresh)
    for index in range(4):
        assert kept.load(index).tobytes() == fresh.load(index).tobytes()
        assert kept.load(index).size == fresh.load(index).size
    for examples in (kept, fresh):
        assert examples.describe(4) == "b/2.png"
        with pytest.raises(UnreadableImage, match="not an image"):
            examples.load(4)


def test_no_progress_bar_and_a_quiet_log(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], [0, 1])
    shown = not datasets.are_progress_bars_disabled()
    open_data(DataSection(path=str(tmp_path), validation="train"))
    assert capfd.readouterr() == ("", "")
    assert shown == (not datasets.are_progress_bars_disabled())


def test_colour_images_for_one_channel_are_turned_to_grey_with_a_note(tmp_path: Path) -> None:
    write_parquet(tmp_path / "colour" / "train.parquet", [0, 1], [0, 1])
    (tmp_path / "grey").mkdir()
    table = pq.read_table(tmp_path / "colour" / "train.parquet").to_pydict()
    for row in table["image"]:
        file = io.BytesIO()
        Image.open(io.BytesIO(row["bytes"])).convert("L").save(file, "PNG")
        row["bytes"] = file.getvalue()
    pq.write_table(pa.table(table), tmp_path / "grey" / "train.parquet")
    noted = {}
    for name in ("colour", "grey"):
        data = open_data(DataSection(path=str(tmp_path / name), validation="train"), channels=1)
        assert data.channels == data.train.channels == 1
        expected_image = Image.fromarray(pixels(0)).convert("L")
        assert data.train.load(0).tobytes() == expected_image.tobytes()
        noted[name] = any("turned to grey" in note for note in data.notes)
    assert noted == {"colour": True, "grey": False}
    with pytest.raises(DataError, match=r"expected 1 .grey. or 3"):
        open_data(DataSection(), channels=4)


MODES = ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB", "YCbCr"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_converted(mode: str) -> None:
    picture = Image.fromarray(pixels(1, 5, 7)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert decode_image(file.getvalue()).tobytes() == picture.convert("RGB").tobytes()
    grey = decode_image(file.getvalue(), channels=1)
    assert (grey.mode, grey.size) == ("L", (7, 5))


def test_sixteen_bits_keep_their_range() -> None:
    values = np.array([[0, 257, 32896], [65535, 128 * 257, 1000]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.asarray(decode_image(file.getvalue(), channels=1)).tolist() == [[0, 1, 128], [255, 128, 4]]


def test_images_are_turned_upright() -> None:
    original = Image.fromarray(pixels(2, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    file = io.BytesIO()
    original.save(file, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode_image(file.getvalue())), np.rot90(np.asarray(original), k=-1))


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(0)[:60], encoded(0)[:-30]])
def test_broken_images_are_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode_image(content)


def test_wrong_labels(tmp_path: Path) -> None:
    cases: list[tuple[pa.Array, list[str] | None, str]] = [
        (pa.array([0, None, 1]), None, r"1 of 3 labels .* are missing, the first in row 1"),
        (pa.array([0, -1, 1]), None, r"has the label -1 \(row 1\), and labels count from 0"),
        (pa.array([0, 1, 2]), ["a", "b"], r"has the label 2 \(row 2\), out of range for 2 classes \(0 to 1\)"),
        (pa.array([0.5, 1.0, 2.0]), None, r"column 'label' .* holds double, not integers.*data\.label_column"),
        (pa.array(["x", "y", "z"]), None, r"holds string, not integers"),
        (pa.array([1, 1, 1]), ["a", "b"], r"all 3 training examples .* are of one class \(b\)"),
    ]
    for number, (labels, names, message) in enumerate(cases):
        folder = tmp_path / str(number)
        write_parquet(folder / "train.parquet", [0, 1, 2], labels, names)
        for streaming in (False, True):
            section = DataSection(path=str(folder), validation="train", streaming=streaming)
            with pytest.raises(DataError, match=message):
                open_data(section)


def test_labels_missing_altogether(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(0)], "caption": ["a cat"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no column holds labels; there are image, caption: .*data\.label_column"):
        open_data(DataSection(path=str(tmp_path)))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder nowhere"):
        open_data(DataSection(path="nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no class folders, and no images; expected PATH/train/CLASS/IMAGE"):
        open_data(DataSection(path=str(tmp_path / "empty")))
    (tmp_path / "empty" / "cat").mkdir()
    with pytest.raises(DataError, match="no image in the class folders"):
        open_data(DataSection(path=str(tmp_path / "empty")))
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "0.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match="only 1 images without a label"):
        open_data(DataSection(path=str(tmp_path / "loose")))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match="neither Parquet"):
        open_data(DataSection(path=str(tmp_path / "table.csv")))
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet"):
        open_data(DataSection(path=str(tmp_path / "train.parquet")))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation.parquet", [0, 1], [0, 1])
    with pytest.raises(DataError, match=r"has nothing that is named for training; .*data\.train"):
        open_data(DataSection(path=str(tmp_path)))
    assert len(open_data(DataSection(path=str(tmp_path)), splits=("validation",)).validation) == 2
    with pytest.raises(DataError, match=r"data\.train: no file fits 'tr\*' in"):
        open_data(DataSection(path=str(tmp_path), train="tr*"))


def test_a_class_that_training_does_not_have(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": [0], "b": [1]})
    write_folder(tmp_path / "val", {"a": [2], "dog": [3]})
    with pytest.raises(DataError, match=r"has a class 'dog' that is not among the 2 classes"):
        open_data(DataSection(path=str(tmp_path)))


def test_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    image = pa.array([], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, "label": pa.array([], pa.int64())}), path)
    for streaming in (False, True):
        with pytest.raises(DataError, match="its tables have no rows"):
            open_data(DataSection(path=str(path), validation="train", streaming=streaming))
    write_parquet(tmp_path / "train-more.parquet", [0, 1], [0, 1])
    assert len(open_data(DataSection(path=str(tmp_path), validation="train-more.parquet")).train) == 2
