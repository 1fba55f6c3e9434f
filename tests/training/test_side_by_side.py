"""Networks that are trained side by side, as each is by itself."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny_runs import quiet, run, tiny

from normfree.models.data import DataConfig
from normfree.training import Recipe, evaluate_run, image_config, train_side_by_side
from normfree.training.data import DataError
from normfree.training.device_images import DeviceImages
from normfree.training.side_by_side import Network

CPU = torch.device("cpu")
SLOW = ("optimizer.learning_rate=0.002", "calibrate=center", "channels_last=true")
"""Rounding does not grow at this rate, and with biases no channel of a black margin is at the kink of its ReLU."""

CASES = {
    "plain": ("augmentation.crop=none",),
    "crops": ("augmentation={crop: padded, crop_padding: 1}", "label_smoothing=0.1"),
    "clipped": (
        "augmentation={crop: padded, crop_padding: 2, flip: 1.0}",
        "optimizer.adaptive_clipping=0.1",
        "optimizer.vector_learning_rate=0.3",
        "optimizer.classifier_learning_rate=0.2",
    ),
    "batchnorm": (
        "model=resnetv2_26",
        "calibrate=none",
        "data.size=16",
        "augmentation.crop=none",
        "optimizer.nesterov=false",
    ),
    "fraction": ("augmentation.crop=none", "epochs=1.3", "optimizer.momentum=0.5", "data.holdout=20"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_same_training_as_alone(name: str, tmp_path: Path) -> None:
    recipe = tiny(*SLOW, *CASES[name])
    alone = run(recipe, tmp_path / "run")
    network = Network(recipe, DeviceImages(recipe.data, CPU))
    assert network.steps == alone["update"]
    before = copy.deepcopy(network.model.state_dict())
    network.prepare()
    for _ in range(network.steps):
        network.step()
    after = network.model.state_dict()
    for key, value in alone["model"].items():
        if value.is_floating_point():
            change, difference = (value - before[key]).norm(), (after[key] - value).norm()
            assert difference <= 2e-3 * change + 1e-6 * value.norm(), key
            assert change > 0.0, key
        else:
            assert torch.equal(after[key], value)
    (trained,) = train_side_by_side([recipe], quiet)
    own = evaluate_run(tmp_path / "run", checkpoint="last")
    assert (trained.top1, trained.loss) == (pytest.approx(own.top1, abs=1e-3), pytest.approx(own.loss, rel=1e-4))


def test_several_with_different_lengths_do_not_touch_each_other() -> None:
    settings = ("augmentation={crop: padded, crop_padding: 1}", "optimizer.adaptive_clipping=0.1")
    recipes = [tiny(*settings), tiny(*settings, "seed=1", "epochs=1"), tiny(*settings, "batch_size=8")]
    said: list[str] = []
    together = train_side_by_side(recipes, said.append)
    assert together == [train_side_by_side([recipe], quiet)[0] for recipe in recipes]
    assert len({(result.top1, result.loss) for result in together}) == 3
    assert said[0] == "3 networks side by side on cpu, 28 steps in all"


def test_divergence_is_told() -> None:
    steep = tiny("augmentation.crop=none", "optimizer.learning_rate=1e6", "optimizer.warmup_epochs=0")
    diverged, trained = train_side_by_side([steep, tiny("augmentation.crop=none")], quiet)
    assert diverged.diverged
    assert not math.isfinite(diverged.loss)
    assert not trained.diverged


def test_randomness_outside_goes_on_as_if_nothing_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train_side_by_side([tiny("augmentation.crop=none", "epochs=1")], quiet)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["augmentation.crop=random_resized"], "augmentation.crop: networks that are trained side by side cannot"),
        (["augmentation.mixup=0.2"], "augmentation.mixup: "),
        (["augmentation.cutmix=0.2"], "augmentation.cutmix: "),
        (["augmentation.randaugment_operations=2"], "augmentation.randaugment_operations: "),
        (["microbatch_size=8"], "microbatch_size: "),
        (["ema_decay=0.9"], "ema_decay: "),
        (["optimizer.clip_norm=1.0"], "optimizer.clip_norm: "),
        (["model.recompute=true"], "model.recompute: "),
        (["data.limit=32"], "data, device: networks that are trained side by side need the same"),
        (["model.options.drop_rate=0.1"], "cannot have dropout or stochastic depth"),
        (["model.options.stochastic_depth_rate=0.1"], "cannot have dropout or stochastic depth"),
        (["batch_size=65"], "batch_size: 65 is more than the 64 training images"),
    ],
)
def test_what_is_refused(others: list[str], message: str) -> None:
    recipes: list[Recipe] = [tiny("augmentation.crop=none"), tiny("augmentation.crop=none", *others)]
    with pytest.raises(ValueError, match=message):
        train_side_by_side(recipes, quiet)


def test_a_model_that_wants_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("augmentation.crop=none")
    images = DeviceImages(recipe.data, CPU)
    Network(recipe, images)
    monkeypatch.setattr(image_config, "model_data", lambda model: DataConfig(interpolation="bilinear"))
    with pytest.raises(ValueError, match="model: it wants its images"):
        Network(recipe, images)


def test_no_recipe_at_all() -> None:
    with pytest.raises(ValueError, match="recipes: there is none"):
        train_side_by_side([], quiet)


def test_images_of_other_sizes_in_training_and_evaluation() -> None:
    for other in ("data.crop_fraction=0.875", "data.test_size=10"):
        with pytest.raises(DataError, match="the same in training and evaluation"):
            train_side_by_side([tiny("augmentation.crop=none", other)], quiet)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_replayed_graphs_do_what_the_steps_do() -> None:
    recipe = tiny(*SLOW, *CASES["clipped"], "device=cuda")
    images = DeviceImages(recipe.data, torch.device("cuda"))
    replayed, stepped = Network(recipe, images), Network(recipe, images)
    replayed.prepare()
    assert replayed.graph is not None
    for _ in range(replayed.steps):
        replayed.step()
        stepped.step()
    torch.cuda.synchronize()
    for name, value in stepped.model.state_dict().items():
        torch.testing.assert_close(replayed.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert replayed.evaluated().loss == pytest.approx(stepped.evaluated().loss, rel=1e-4)


def folder_of_images(folder: Path) -> Path:
    colours = iter(range(0, 240, 20))
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (next(colours), 10, 200)).save(folder / split / name / f"{number}.png")
    return folder


def test_images_of_a_folder(tmp_path: Path) -> None:
    images = DeviceImages(tiny(f"data={{path: '{folder_of_images(tmp_path)}'}}").data, CPU)
    assert images.images.shape == images.validation.shape == (4, 8, 8, 3)
    colours, labels = images.images[:, 0, 0].tolist(), images.labels.tolist()
    assert sorted(zip(colours, labels, strict=True)) == [([20 * n, 10, 200], n // 2) for n in range(4)]
    rows, places = torch.tensor([2, 0]), torch.tensor([[0, 2], [1, 2]])  # tops, then lefts
    pictures, of_batch = images.batch(rows, places, torch.tensor([False, True]), 2)
    assert torch.equal(of_batch, images.labels[rows])
    black = pictures == images.normalised(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    assert black[0, 2].sum() == 64 - 6 * 7, "two rows and one column of the margin"
    assert not black[1, 2].any()


def test_images_that_cannot_be_read_or_are_streamed(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "folder")
    table = pyarrow.table({"image": [(folder / "train/cat/0.png").read_bytes()] * 2, "label": [0, 1]})
    for split in ("train", "validation"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match="need a training and a validation set, not streamed"):
        DeviceImages(tiny(f"data={{path: '{tmp_path}', streaming: true}}").data, CPU)
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cat.1\.png: "):
        DeviceImages(tiny(f"data={{path: '{folder}'}}").data, CPU)
