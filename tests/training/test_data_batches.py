"""The order of examples, and that it depends on the seed alone; what happens to images that cannot be read."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from normfree.training.augmentation import evaluation_transform, training_transform
from normfree.training.data import (
    Batch,
    DataError,
    EvaluationBatches,
    ImageData,
    TrainingBatches,
    open_data,
    workers_for,
)
from normfree.training.data.reader import BatchReader
from normfree.training.image_config import ImageConfig
from normfree.training.recipe import AugmentationSection, DataSection

CONFIG = ImageConfig(size=8, test_size=8, crop_fraction=1.0)
PLAIN = training_transform(AugmentationSection(crop="none", flip=0.0), CONFIG)
PADDED = training_transform(AugmentationSection(crop="padded", crop_padding=2), CONFIG)
RANDOM = training_transform(AugmentationSection(crop="random_resized", randaugment_operations=1), CONFIG)
EVALUATION = evaluation_transform(CONFIG)
EXAMPLES = 40


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def encoded(number: int) -> bytes:
    """An image all of whose pixels are its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, broken: Iterable[int] = (), examples: int = EXAMPLES, files: int = 1) -> str:
    """Parquet files or shards of examples whose number is in the pixels, and whose label is the number modulo 4."""
    contents = [b"broken" if n in set(broken) else encoded(n) for n in range(examples)]
    for part in range(files):
        numbers = range(part * examples // files, (part + 1) * examples // files)
        if path.suffix == ".tar":
            with tarfile.open(path.with_stem(f"{path.stem}-{part}"), "w") as shard:
                for n in numbers:
                    for ending, content in (("png", contents[n]), ("cls", str(n % 4).encode())):
                        member = tarfile.TarInfo(f"{n:03}.{ending}")
                        member.size = len(content)
                        shard.addfile(member, io.BytesIO(content))
        else:
            image = pa.array([{"bytes": contents[n], "path": f"{n}.png"} for n in numbers])
            table = pa.table({"image": image, "label": [n % 4 for n in numbers]})
            pq.write_table(table, path.with_stem(f"{path.stem}-{part}"))
    return str(path.parent)


def opened(
    tmp_path: Path, suffix: str = ".parquet", files: int = 1, broken: Iterable[int] = (), **section
) -> ImageData:
    path = write(tmp_path / f"train{suffix}", broken, files=files)
    return open_data(DataSection(path=path, validation="train-0*", **section), splits=("train",))


def numbers(batches: Iterable[Batch]) -> list[int]:
    """Which examples there are, as their pixels say; labels must go with them."""
    found = []
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64
        found += [int(image[0, 0, 0]) for image in batch.images]
        assert batch.targets.tolist() == [n % 4 for n in found[-len(batch.targets) :]]
    return found


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) > 0 and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a[2:] == b[2:]
        for a, b in zip(left, right, strict=True)
    )


SOURCES = [
    {"keep_decoded": True},
    {"keep_decoded": False},
    {"streaming": True, "shuffle_buffer": 16},
    {"streaming": True, "shuffle_buffer": 7, "suffix": ".tar", "files": 3},
]


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_has_every_example_once_and_another_order_each_time(tmp_path: Path, source: dict) -> None:
    batches = TrainingBatches(opened(tmp_path, **source).train, PLAIN, batch_size=8, seed=3)
    first, second, again = (numbers(batches.epoch(epoch)) for epoch in (0, 1, 0))
    assert batches.updates_per_epoch == 5
    assert sorted(first) == sorted(second) == list(range(EXAMPLES))
    assert first == again
    assert first != second != sorted(second)
    other = TrainingBatches(opened(tmp_path, **source).train, PLAIN, batch_size=8, seed=4)
    assert numbers(other.epoch(0)) != first


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_interleave_to_what_one_process_gets(tmp_path: Path, source: dict) -> None:
    examples = opened(tmp_path, **source, broken=(5, 6)).train
    whole = TrainingBatches(examples, RANDOM, batch_size=12, microbatch_size=3, seed=1)
    parts = [
        TrainingBatches(examples, RANDOM, batch_size=12, microbatch_size=3, seed=1, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    alone = list(whole.epoch(2))
    assert [(batch.update, batch.microbatch) for batch in alone] == [(u, m) for u in range(3) for m in range(4)]
    first, second = (list(part.epoch(2)) for part in parts)
    assert {batch.microbatch for batch in first} == {0, 2}
    assert same(alone, [batch for pair in zip(first, second, strict=True) for batch in pair])


@pytest.mark.parametrize("source", [SOURCES[0], SOURCES[1], SOURCES[3]])
def test_workers_change_nothing(tmp_path: Path, source: dict) -> None:
    examples = opened(tmp_path, **source, broken=(11,)).train
    state = torch.get_rng_state()
    alone = TrainingBatches(examples, RANDOM, batch_size=10, microbatch_size=5, seed=0)
    expected = [list(alone.epoch(epoch)) for epoch in (0, 1)]
    assert sum(len(batch.skipped) for batch in expected[0]) >= 1
    for workers in (1, 2):
        batches = TrainingBatches(examples, RANDOM, batch_size=10, microbatch_size=5, seed=0, workers=workers)
        assert same(batches.epoch(0), expected[0])
        started = batches.epoch(1)
        next(started)  # an epoch that is left in the middle does not disturb the next one
        started.close()
        assert same(batches.epoch(1), expected[1])
        batches.close()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_gives_the_rest_of_the_epoch(tmp_path: Path, source: dict, workers: int) -> None:
    examples = opened(tmp_path, **source, broken=(20,)).train
    batches = TrainingBatches(examples, PADDED, batch_size=6, microbatch_size=2, seed=0)
    resumed = TrainingBatches(examples, PADDED, batch_size=6, microbatch_size=2, seed=0, workers=workers)
    whole = list(batches.epoch(1))
    assert same(resumed.epoch(1, first_update=4), [batch for batch in whole if batch.update >= 4])
    assert list(resumed.epoch(1, first_update=6)) == []
    resumed.close()


@pytest.mark.parametrize("source", SOURCES[1:])
def test_resuming_does_not_decode_what_it_passes_over(
    tmp_path: Path, source: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = opened(tmp_path, **source).train
    load, loaded = type(examples).load, []
    monkeypatch.setattr(type(examples), "load", lambda self, item: loaded.append(item) or load(self, item))
    batches = TrainingBatches(examples, PLAIN, batch_size=8, seed=0)
    assert len(numbers(batches.epoch(0, first_update=3))) == len(loaded) == 16


def test_kept_and_fresh_images_give_the_same_batches(tmp_path: Path) -> None:
    kept, fresh = (opened(tmp_path, keep_decoded=keep).train for keep in (True, False))
    for transform in (PLAIN, PADDED, RANDOM):
        left, right = (TrainingBatches(examples, transform, batch_size=10, seed=5) for examples in (kept, fresh))
        assert same(left.epoch(0), right.epoch(0))


@pytest.mark.parametrize("source", SOURCES)
def test_unreadable_images_are_replaced_and_reported(tmp_path: Path, source: dict) -> None:
    broken = {3, 17, 30}
    batches = TrainingBatches(opened(tmp_path, **source, broken=broken).train, PLAIN, batch_size=4, seed=0)
    epoch = list(batches.epoch(0))
    seen = numbers(epoch)
    assert len(seen) == EXAMPLES
    assert set(seen) == set(range(EXAMPLES)) - broken
    skipped = [entry for batch in epoch for entry in batch.skipped]
    assert all(entry.reason == "not an image" for entry in skipped)
    for number in broken:
        assert any(f"{number}.png" in entry.name or f"{number:03}" in entry.name for entry in skipped)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 1])
def test_mostly_unreadable_data_is_an_error(tmp_path: Path, source: dict, workers: int) -> None:
    examples = opened(tmp_path, **source, broken=range(2, EXAMPLES)).train
    batches = TrainingBatches(examples, PLAIN, batch_size=8, microbatch_size=1, seed=0, workers=workers)
    with pytest.raises(DataError, match="not an image"):
        list(itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(10)))
    batches.close()


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_sees_every_example_once_over_all_ranks(tmp_path: Path, source: dict) -> None:
    examples = opened(tmp_path, **source).train
    ranks = [list(EvaluationBatches(examples, EVALUATION, batch_size=6, rank=rank, world_size=3)) for rank in range(3)]
    assert [[len(batch.targets) for batch in batches] for batches in ranks] == [[6, 6, 2], [6, 6, 1], [6, 6, 1]]
    assert sorted(number for batches in ranks for number in numbers(batches)) == list(range(EXAMPLES))
    assert [batch.update for batch in ranks[0]] == [0, 1, 2]


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_leaves_out_what_it_cannot_read(tmp_path: Path, source: dict) -> None:
    broken = {0, 1, 2, 3, 13}
    batches = EvaluationBatches(opened(tmp_path, **source, broken=broken).train, EVALUATION, batch_size=4)
    for _ in range(2):
        found = list(batches)
        assert sorted(numbers(found)) == sorted(set(range(EXAMPLES)) - broken)
        assert len(batches.skipped) == 5
        assert sum(len(batch.skipped) for batch in found) == 5
        assert all(len(batch.targets) for batch in found)


def test_evaluation_of_nothing_but_unreadable_images_is_an_error(tmp_path: Path) -> None:
    examples = opened(tmp_path, broken=range(EXAMPLES)).train
    with pytest.raises(DataError, match="no readable image"):
        list(EvaluationBatches(examples, EVALUATION, batch_size=4))


def test_what_is_left_over_is_dropped(tmp_path: Path) -> None:
    examples = opened(tmp_path).train
    batches = TrainingBatches(examples, PLAIN, batch_size=11, seed=0)
    seen = numbers(batches.epoch(0))
    assert batches.updates_per_epoch == 3
    assert len(seen) == len(set(seen)) == 33


def test_a_stream_of_unknown_length_ends_when_it_ends(tmp_path: Path) -> None:
    examples = opened(tmp_path, streaming=True).train
    examples.length = None
    batches = TrainingBatches(examples, PLAIN, batch_size=12, seed=0)
    assert batches.updates_per_epoch is None
    assert len(numbers(batches.epoch(0))) == 36


def test_a_stream_that_ends_early_is_an_error(tmp_path: Path) -> None:
    examples = opened(tmp_path, streaming=True).train
    examples.length = 60
    with pytest.raises(DataError, match="ended after 40 of 60 examples"):
        list(TrainingBatches(examples, PLAIN, batch_size=12, seed=0).epoch(0))


def test_a_limit_on_a_stream(tmp_path: Path) -> None:
    batches = TrainingBatches(opened(tmp_path, streaming=True, limit=10).train, PLAIN, batch_size=5, seed=0)
    assert sorted(numbers(batches.epoch(0))) == list(range(10))


def test_wrong_numbers_are_explained(tmp_path: Path) -> None:
    examples = opened(tmp_path).train
    for options, message in (
        ({"batch_size": 50}, "has 40 examples, fewer than one batch of 50; lower batch_size"),
        ({"batch_size": 64, "world_size": 64}, "64 processes but only 40 examples"),
        ({"batch_size": 6, "world_size": 4}, "6 examples cannot be shared by 4 processes"),
        ({"batch_size": 8, "microbatch_size": 3}, "8 is not a multiple of microbatch_size 3"),
        ({"batch_size": 8, "microbatch_size": 4, "world_size": 4}, "4 processes but only 2 microbatches"),
    ):
        with pytest.raises(DataError, match=message):
            TrainingBatches(examples, PLAIN, seed=0, **options)
    with pytest.raises(ValueError, match="rank"):
        TrainingBatches(examples, PLAIN, batch_size=8, seed=0, rank=2, world_size=2)
    with pytest.raises(DataError, match="not opened"):
        TrainingBatches(None, PLAIN, batch_size=8, seed=0)


def test_workers_that_are_killed_change_nothing(tmp_path: Path) -> None:
    examples = opened(tmp_path, keep_decoded=False).train
    expected = list(TrainingBatches(examples, RANDOM, batch_size=2, seed=0).epoch(0))
    batches = TrainingBatches(examples, RANDOM, batch_size=2, seed=0, workers=1)
    epoch = batches.epoch(0)
    found = [next(epoch)]
    for child in torch.multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found += list(epoch)
    assert same(found, expected)
    assert any("goes on in the main process" in str(warning.message) for warning in caught)


def test_how_many_workers(tmp_path: Path) -> None:
    kept, fresh = (opened(tmp_path, keep_decoded=keep).train for keep in (True, False))
    assert workers_for("auto", kept) == 0
    assert workers_for("auto", fresh) >= 1
    assert workers_for("auto", fresh, world_size=10_000) == 1
    assert workers_for(3, kept) == 3


@pytest.mark.parametrize("source", SOURCES)
def test_what_workers_need_travels_to_processes_that_are_not_forked(tmp_path: Path, source: dict) -> None:
    examples = opened(tmp_path, **source).train
    request = next(TrainingBatches(examples, RANDOM, batch_size=4, seed=0)._requests(0, 0))
    reader = BatchReader(examples, RANDOM)
    assert same([pickle.loads(pickle.dumps(reader))[pickle.loads(pickle.dumps(request))]], [reader[request]])
