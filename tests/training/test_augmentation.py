"""Transforms against torchvision's and Pillow's own results, mixing against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normfree._torchvision import import_torchvision
from normfree.models.data import DataConfig
from normfree.training.augmentation import evaluation_transform, training_transform
from normfree.training.data import open_data
from normfree.training.data.batch import Batch
from normfree.training.data.examples import DecodedExamples
from normfree.training.data.images import ImageData
from normfree.training.data.keys import example_keys, seeded, uniforms
from normfree.training.image_config import ImageConfig, resolve_images
from normfree.training.mixing import BatchFinisher
from normfree.training.recipe import AugmentationSection, DataSection

import_torchvision()
from torchvision.transforms import v2  # noqa: E402


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    grown = values.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return Image.fromarray(grown[:, :, 0] if channels == 1 else grown)


def tensor(image: Image.Image) -> torch.Tensor:
    return v2.functional.pil_to_tensor(image)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 47), (16, 16), (10, 9)])
def test_evaluation_is_resize_and_centre_crop(interpolation: str, shape: tuple[int, int]) -> None:
    config = ImageConfig(test_size=24, crop_fraction=0.8, interpolation=interpolation)
    image = picture(*shape)
    reference = v2.Compose([v2.Resize(30, v2.InterpolationMode(interpolation)), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(evaluation_transform(config)(image), reference(image))
    assert torch.equal(evaluation_transform(config)(tensor(image)), reference(image))


def test_evaluation_squashes() -> None:
    config = ImageConfig(test_size=24, crop_fraction=1.0, crop_mode="squash")
    image = picture(40, 60)
    assert torch.equal(evaluation_transform(config)(image), tensor(image.resize((24, 24), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_pass_evaluation_unchanged(channels: int) -> None:
    image = picture(12, 12, channels)
    transform = evaluation_transform(ImageConfig(test_size=12, crop_fraction=1.0))
    assert torch.equal(transform(image), tensor(image))
    pixels = np.asarray(image).reshape(1, 12, 12, channels)
    assert torch.equal(transform.many(pixels, np.zeros(1, np.uint64))[0], tensor(image))


def test_random_resized_crop_is_torchvisions_and_keyed() -> None:
    section = AugmentationSection(crop="random_resized", crop_scale=(0.2, 0.9), flip=0.5)
    transform = training_transform(section, ImageConfig(size=16))
    reference = v2.RandomResizedCrop(16, (0.2, 0.9), interpolation=v2.InterpolationMode.BICUBIC)
    image = picture(40, 50)
    keys = example_keys(0, 0, np.arange(40))
    flips = 0
    for key in keys.tolist():
        drawn = uniforms(np.array([key], np.uint64), 4)[0]
        with seeded(int(drawn[3] * 2**53)):
            expected = tensor(reference(image))
        flipped = bool(drawn[2] < 0.5)
        flips += flipped
        assert torch.equal(transform(image, key), expected.flip(2) if flipped else expected)
    assert 8 < flips < 32
    assert len({transform(image, key).numpy().tobytes() for key in keys.tolist()}) == 40


@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crop_and_flip(channels: int) -> None:
    section = AugmentationSection(crop="padded", crop_padding=3, flip=0.3)
    transform = training_transform(section, ImageConfig(size=10))
    images = np.stack([np.asarray(picture(10, 10, channels, seed=n)).reshape(10, 10, channels) for n in range(300)])
    keys = example_keys(1, 2, np.arange(300))
    together = transform.many(images, keys)
    assert together.is_contiguous()
    offsets, flips = set(), 0
    for number, (pixels, key) in enumerate(zip(images, keys.tolist(), strict=True)):
        plain = torch.from_numpy(pixels).permute(2, 0, 1)
        assert torch.equal(transform(plain, key), together[number])
        padded = v2.functional.pad(plain, [3, 3, 3, 3])
        crops = {
            (y, x, flip): v2.functional.hflip(crop) if flip else crop
            for y in range(7)
            for x in range(7)
            for flip in (False, True)
            for crop in [v2.functional.crop(padded, y, x, 10, 10)]
        }
        which = [place for place, crop in crops.items() if torch.equal(crop, together[number])]
        assert which
        offsets.add(which[0][:2])
        flips += which[0][2]
    assert len(offsets) == 49  # 300 draws from 49 places miss one with a probability of 10 %, not with these keys
    assert 60 < flips < 120


def test_training_without_a_crop_takes_the_centre() -> None:
    transform = training_transform(AugmentationSection(crop="none", flip=0.0), ImageConfig(size=16))
    image = picture(32, 48)
    expected = v2.CenterCrop(16)(v2.Resize(16, v2.InterpolationMode.BICUBIC)(image))
    assert torch.equal(transform(image, 7), tensor(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_torchvisions(channels: int) -> None:
    section = AugmentationSection(crop="none", flip=0.0, randaugment_operations=2, randaugment_magnitude=7)
    transform = training_transform(section, ImageConfig(size=16))
    image = picture(16, 16, channels)
    changed = 0
    for key in example_keys(0, 0, np.arange(30)).tolist():
        with seeded(int(uniforms(np.array([key], np.uint64), 4)[0, 3] * 2**53)):
            expected = tensor(v2.RandAugment(2, 7)(image))
        assert torch.equal(transform(image, key), expected)
        changed += not torch.equal(expected, tensor(image))
    assert changed > 15


def test_transforms_leave_the_random_numbers_of_torch_alone() -> None:
    state = torch.get_rng_state()
    transform = training_transform(AugmentationSection(randaugment_operations=1), ImageConfig(size=8))
    transform(picture(20, 20), 3)
    BatchFinisher(AugmentationSection(mixup=0.2, cutmix=1.0), ImageConfig(), 4)(batch(8))
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_spread_evenly() -> None:
    drawn = uniforms(example_keys(0, 0, np.arange(20_000)), 3)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert np.allclose(drawn.mean(0), 0.5, atol=0.01)
    assert np.allclose(np.corrcoef(drawn, rowvar=False), np.eye(3), atol=0.03)
    assert np.abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03
    counts = np.histogram(drawn[:, 0], 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # χ² with 19 degrees of freedom: 1 in 1000


def batch(count: int, update: int = 0, microbatch: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 10, 12), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 4, update, microbatch)


def normalised(images: torch.Tensor, config: ImageConfig) -> torch.Tensor:
    return v2.functional.normalize(images.double() / 255, list(config.mean), list(config.std))


def test_a_batch_is_normalised() -> None:
    config = ImageConfig(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    given = batch(5)
    images, targets = BatchFinisher(None, config, 4)(given)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), normalised(given.images, config), rtol=1e-5, atol=1e-5)
    assert torch.equal(targets, given.targets)


def test_mixup_follows_its_formula() -> None:
    given, config = batch(6), ImageConfig()
    images, targets = BatchFinisher(AugmentationSection(mixup=0.8), config, 4, seed=1)(given, epoch=2)
    share = mixed_by_mixup(images, targets, given, config)
    assert 0.0 < share < 1.0


def mixed_by_mixup(images: torch.Tensor, targets: torch.Tensor, given: Batch, config: ImageConfig) -> float:
    """Checks that images and targets are λ of the batch and 1 − λ of the batch moved on by one; gives λ."""
    plain = normalised(given.images, config)
    before = plain.roll(1, 0)
    share = float(((images.double() - before) * (plain - before)).sum() / (plain - before).square().sum())
    torch.testing.assert_close(images.double(), share * plain + (1 - share) * before, rtol=1e-4, atol=1e-4)
    onehot = nn.functional.one_hot(given.targets, 4).double()
    expected = share * onehot + (1 - share) * onehot.roll(1, 0)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-4)
    return share


def mixed_by_cutmix(images: torch.Tensor, targets: torch.Tensor, given: Batch, config: ImageConfig) -> float:
    """Checks that a box comes from the batch moved on by one and the rest from the batch; gives the rest's share."""
    plain = normalised(given.images, config).float()
    own = torch.isclose(images, plain, atol=1e-5).all(dim=1)
    other = torch.isclose(images, plain.roll(1, 0), atol=1e-5).all(dim=1)
    assert bool((own | other).all())
    box = ~own[0]
    rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    assert bool(other[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
    share = 1 - (len(rows) * len(columns)) / box.numel()
    onehot = nn.functional.one_hot(given.targets, 4).float()
    torch.testing.assert_close(targets, share * onehot + (1 - share) * onehot.roll(1, 0), rtol=1e-4, atol=1e-4)
    return share


def test_cutmix_swaps_a_box() -> None:
    given, config = batch(6), ImageConfig()
    shares = set()
    for update in range(4):
        moved = given._replace(update=update)
        images, targets = BatchFinisher(AugmentationSection(cutmix=1.0), config, 4, seed=3)(moved)
        shares.add(round(mixed_by_cutmix(images, targets, given, config), 6))
    assert len(shares) > 1


def test_with_both_each_takes_half_of_a_batch() -> None:
    given, config = batch(9), ImageConfig()
    section = AugmentationSection(mixup=0.5, cutmix=1.0)
    images, targets = BatchFinisher(section, config, 4, seed=2)(given)
    assert images.shape == given.images.shape
    assert targets.shape == (9, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(9))
    first = Batch(given.images[:4], given.targets[:4], 0, 0)
    second = Batch(given.images[4:], given.targets[4:], 0, 0)
    assert mixed_by_mixup(images[:4], targets[:4], first, config) < 1.0
    assert mixed_by_cutmix(images[4:], targets[4:], second, config) < 1.0


def test_mixing_is_keyed_by_its_place_in_the_run() -> None:
    section = AugmentationSection(mixup=1.0)

    def mixed(seed: int, epoch: int, update: int, microbatch: int) -> bytes:
        return BatchFinisher(section, ImageConfig(), 4, seed)(batch(4, update, microbatch), epoch)[1].numpy().tobytes()

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({mixed(*place) for place in places}) == 5
    assert mixed(0, 1, 2, 3) == mixed(0, 1, 2, 3)


@pytest.mark.parametrize("count", [2, 3])
def test_small_batches_are_mixed_as_a_whole(count: int) -> None:
    finish = BatchFinisher(AugmentationSection(mixup=1.0, cutmix=1.0), ImageConfig(), 4, seed=0)
    hard = [bool((finish(batch(count, update))[1].max(1).values == 1.0).all()) for update in range(20)]
    assert not all(hard[:5])
    with pytest.raises(ValueError, match="microbatches of at least 2"):
        finish(batch(1))


class Model(nn.Module):
    """A model that says what its images look like, in the way of timm."""

    pretrained_cfg = {
        "input_size": (3, 48, 48),
        "test_input_size": (3, 64, 64),
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "crop_mode": "squash",
    }


def data_of(side: int | None, channels: int = 3) -> ImageData:
    sides = [side or 70 + number % 3 for number in range(12)]
    images = [np.random.default_rng(n).integers(0, 256, (s, s, channels), dtype=np.uint8) for n, s in enumerate(sides)]
    examples = DecodedExamples("made up", images, np.arange(12) % 2, [str(n) for n in range(12)])
    return ImageData(examples, None, ("a", "b"), channels)


def test_sizes_come_from_the_model() -> None:
    config = resolve_images(DataSection(), data_of(None), Model())
    assert config == ImageConfig(48, 64, 0.9, "squash", "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert resolve_images(DataSection(), data_of(None)) == ImageConfig()


def test_sizes_of_our_models() -> None:
    from normfree.models import create_model

    model = create_model("nf_regnet_b0", num_classes=2, width=0.25)
    config = resolve_images(DataSection(), data_of(None), model)
    made_for: DataConfig = model.info.data
    assert (config.size, config.test_size, config.crop_fraction) == (192, 224, made_for.crop_fraction)


def test_the_recipe_decides() -> None:
    section = DataSection(size=40, test_size=56, crop_fraction=0.75, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    config = resolve_images(section, data_of(None), Model())
    assert config == ImageConfig(40, 56, 0.75, "squash", "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ValueError, match=r"data\.mean: expected 3 values"):
        resolve_images(DataSection(mean=(0.5,)), data_of(None), Model())


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_keep_their_size_and_have_their_own_normalisation(channels: int) -> None:
    data = data_of(20, channels)
    config = resolve_images(DataSection(), data, Model())
    assert (config.size, config.test_size, config.crop_fraction) == (20, 20, 1.0)
    pixels = np.stack([np.asarray(data.train.load(n)) for n in range(12)]).reshape(-1, channels) / 255
    np.testing.assert_allclose(config.mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(config.std, pixels.std(0), atol=1e-6)
    assert any("stay so" in note for note in config.notes)


def test_evaluation_alone_is_prepared_as_in_training() -> None:
    both, alone = open_data(DataSection()), open_data(DataSection(), splits=("validation",))
    assert alone.train is None
    assert resolve_images(DataSection(), both) == resolve_images(DataSection(), alone)
