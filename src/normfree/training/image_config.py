"""How the images of a run are prepared: from the recipe, else the model, else the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import nn

from ..models.data import DataConfig
from .data.errors import DataError
from .data.examples import as_pixels, sample_images, sample_sizes
from .data.images import ImageData, Source
from .data.streaming import StreamedExamples
from .recipe import DataSection

_SAMPLE, _STREAM_SAMPLE = 2048, 64


@dataclass(frozen=True)
class ImageConfig:
    """Sizes and normalisation of a run's images.

    Args:
        size: side of the square training crop in pixels.
        test_size: side of the square test image.
        crop_fraction: test images are resized so that the crop of ``test_size`` takes this part of their side.
        crop_mode: ``"center"`` keeps the aspect ratio when it resizes, ``"squash"`` makes the image square.
        interpolation: of every resize.
        mean, std: normalisation, per channel of images in [0, 1].
        notes: what was assumed, a sentence each.
    """

    size: int = 224
    test_size: int = 224
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return len(self.mean)


def resolve_images(section: DataSection, data: ImageData, model: nn.Module | None = None) -> ImageConfig:
    """Sizes and normalisation: what the recipe says, else what the model is made for.

    Images that all have one size, smaller than the model's, keep it: they are not enlarged, nothing is cut off in
    evaluation, and they are normalised with their own mean and standard deviation, measured on a fixed sample.

    Raises:
        DataError: ``mean`` or ``std`` of the recipe does not have a value for each channel, or they have to be
            measured and no image can be read.
    """
    for name, values in (("mean", section.mean), ("std", section.std)):
        if values is not None and len(values) != data.channels:
            raise DataError(f"data.{name}: expected {data.channels} values, one per channel, got {len(values)}")
    made_for = model_data(model)
    measured = data.validation if data.validation is not None else data.train
    side = _common_side(_sizes(measured)) if measured is not None else None
    notes: list[str] = []
    size, test_size, crop_fraction = made_for.train_size, made_for.test_size, made_for.crop_fraction
    small = side is not None and side < size
    if small and side is not None:
        size, test_size, crop_fraction = side, side, 1.0
        if section.size is None:
            notes.append(f"images: all are {side} px, smaller than the model's {made_for.train_size} px, and stay so")
    if section.size is not None:
        size = test_size = section.size
    mean, std = made_for.mean, made_for.std
    if (small or len(mean) != data.channels) and (section.mean is None or section.std is None):
        training = data.training_examples()
        examples = measured if training is None else training
        images = _sample(examples, _SAMPLE) if examples is not None else []
        if not images:
            place = "" if examples is None else f" in {examples.name}"
            raise DataError(f"data: no readable image found{place} among those that are looked at for their mean")
        mean, std = _measured([as_pixels(image) for image in images])
        notes.append(f"images: mean {_shown(mean)} and standard deviation {_shown(std)} of {len(images)} of them")
    return ImageConfig(
        size,
        section.test_size or test_size,
        section.crop_fraction or crop_fraction,
        made_for.crop_mode,
        made_for.interpolation,
        section.mean or mean,
        section.std or std,
        tuple(notes),
    )


def model_data(model: nn.Module | None) -> DataConfig:
    """What a model's images look like: ours say so in ``model.info.data``, timm's in ``model.pretrained_cfg``."""
    described = getattr(getattr(model, "info", None), "data", None)
    if isinstance(described, DataConfig):
        return described
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return _from_timm(config) if isinstance(config, dict) else DataConfig()


def _from_timm(config: dict[str, Any]) -> DataConfig:
    default = DataConfig()
    train = int((config.get("input_size") or (3, default.train_size, default.train_size))[-1])
    test = int((config.get("test_input_size") or (3, train, train))[-1])
    interpolation = config.get("interpolation")
    return DataConfig(
        train,
        test,
        float(config.get("test_crop_pct") or config.get("crop_pct") or default.crop_fraction),
        "squash" if config.get("crop_mode") == "squash" else "center",
        interpolation if interpolation in ("bicubic", "bilinear") else default.interpolation,
        tuple(config.get("mean") or default.mean),
        tuple(config.get("std") or default.std),
    )


def _sample(examples: Source, count: int) -> list[Image.Image]:
    return examples.sample(count) if isinstance(examples, StreamedExamples) else sample_images(examples, count)


def _sizes(examples: Source) -> list[tuple[int, int]]:
    if isinstance(examples, StreamedExamples):
        return [image.size for image in examples.sample(_STREAM_SAMPLE)]
    return sample_sizes(examples)


def _common_side(sizes: list[tuple[int, int]]) -> int | None:
    """The shorter side, if all images have one size."""
    return min(sizes[0]) if sizes and len(set(sizes)) == 1 else None


def _measured(images: list[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over all pixels, of images in [0, 1]."""
    count = sum(image.shape[0] * image.shape[1] for image in images)
    first = sum(image.sum((0, 1), dtype=np.float64) for image in images) / count
    second = sum(np.square(image, dtype=np.float64).sum((0, 1)) for image in images) / count
    std = np.sqrt(np.maximum(second - np.square(first), 1e-4)) / 255.0
    return tuple((np.asarray(first) / 255.0).round(6).tolist()), tuple(std.round(6).tolist())


def _shown(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
