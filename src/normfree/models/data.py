"""How a model's images are prepared: the sizes and the normalisation that its weights were, or are to be, made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """What the images of a model look like. Sizes in pixels; mean and std per channel of images in [0, 1].

    Args:
        train_size: side of the square training crop.
        test_size: side of the square test image.
        crop_fraction: test images are resized so that the crop of ``test_size`` takes this part of their side.
        crop_mode: ``"center"`` keeps the aspect ratio when it resizes, ``"squash"`` makes the image square.
        interpolation: of every resize.
        mean, std: normalisation.
    """

    train_size: int = 224
    test_size: int = 224
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def original_data_config(train_size: int, test_size: int) -> DataConfig:
    """Sizes of the original NF-RegNets and NFNets, whose test crop leaves a margin of 32 pixels in all."""
    return DataConfig(train_size, test_size, crop_fraction=test_size / (test_size + 32))
