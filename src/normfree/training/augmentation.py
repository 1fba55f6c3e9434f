"""What images go through before they are batched: torchvision's transforms, drawn by the key of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._torchvision import import_torchvision
from .data.examples import as_image, as_pixels
from .data.keys import seeded, uniforms
from .image_config import ImageConfig
from .recipe import AugmentationSection

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Y, X, FLIP, _SEED = range(4)  # which of an example's numbers is for what


def training_transform(section: AugmentationSection, config: ImageConfig) -> TrainingTransform:
    """Crop, flip and RandAugment, as a recipe says."""
    return TrainingTransform(section, config)


def evaluation_transform(config: ImageConfig) -> EvaluationTransform:
    """Resize and centred crop, as a model's data configuration says; images of the test size pass unchanged."""
    return EvaluationTransform(config)


class TrainingTransform:
    """(C, size, size) uint8 from an image, by a key: the same key, the same crop, flip and distortion.

    The crop: ``random_resized`` takes a random part and resizes it, ``padded`` adds black pixels around and takes a
    random square of ``size``, ``none`` takes the centre. Images of another size are resized first for the last two.
    """

    def __init__(self, section: AugmentationSection, config: ImageConfig):
        self.section, self.size = section, config.size
        self._fit = _Fit(config.size, config)
        v2 = torchvision_v2()
        mode = v2.InterpolationMode(config.interpolation)
        self._random_crop: Callable[[Any], Any] | None = None
        if section.crop == "random_resized":
            self._random_crop = v2.RandomResizedCrop(config.size, section.crop_scale, interpolation=mode)
        self._distort: Callable[[Any], Any] | None = None
        if section.randaugment_operations:
            self._distort = v2.RandAugment(section.randaugment_operations, section.randaugment_magnitude)

    def __call__(self, image: Image.Image | Tensor, key: int = 0) -> Tensor:
        picture = _as_picture(image)
        drawn = uniforms(np.array([key], np.uint64), 4)
        with seeded(int(drawn[0, _SEED] * 2**53)):
            picture = self._fit(picture) if self._random_crop is None else self._random_crop(picture)
            pixels = self._cropped_and_flipped(as_pixels(picture)[None], drawn)
            if self._distort is not None:
                pixels = as_pixels(self._distort(as_image(np.ascontiguousarray(pixels[0]))))[None]
        return _channels_first(pixels)[0]

    def many(self, images: np.ndarray, keys: np.ndarray) -> Tensor | None:
        """(N, C, size, size) uint8 from (N, H, W, C) by (N,) keys, as one call for each; None if it takes those."""
        if self._random_crop is not None or self._distort is not None or images.shape[1:3] != (self.size, self.size):
            return None
        return _channels_first(self._cropped_and_flipped(images, uniforms(keys, 4)))

    def _cropped_and_flipped(self, images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return _flipped(self._cropped(images, drawn), drawn[:, FLIP] < self.section.flip)

    def _cropped(self, images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """(N, size, size, C): squares of padded images at the places that are drawn."""
        if self.section.crop != "padded" or not self.section.crop_padding:
            return images
        padding, size = self.section.crop_padding, self.size
        places = (drawn[:, [Y, X]] * (2 * padding + 1)).astype(int)
        padded = np.zeros((len(images), size + 2 * padding, size + 2 * padding, images.shape[3]), np.uint8)
        padded[:, padding:-padding, padding:-padding] = images
        cropped = np.empty_like(images)
        for number, (y, x) in enumerate(places.tolist()):
            cropped[number] = padded[number, y : y + size, x : x + size]
        return cropped


class EvaluationTransform:
    """(C, test_size, test_size) uint8 from an image."""

    def __init__(self, config: ImageConfig):
        self.size = config.test_size
        self._fit = _Fit(config.test_size, config, config.crop_fraction)

    def __call__(self, image: Image.Image | Tensor, key: int = 0) -> Tensor:
        return _channels_first(as_pixels(self._fit(_as_picture(image)))[None])[0]

    def many(self, images: np.ndarray, keys: np.ndarray) -> Tensor | None:
        """(N, C, size, size) uint8 from (N, H, W, C) if they pass unchanged; else None."""
        return _channels_first(images) if self._fit.leaves(images.shape[2], images.shape[1]) else None


@dataclass(frozen=True)
class _Fit:
    """Resize and centred crop to a square of ``size``, which takes ``crop_fraction`` of the resized image's side."""

    size: int
    config: ImageConfig
    crop_fraction: float = 1.0

    def leaves(self, width: int, height: int) -> bool:
        """Whether images of this size pass unchanged."""
        return (width, height) == (self.size, self.size) and self._resized_to() == self.size

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.leaves(*image.size):
            return image
        enlarged = self._resized_to()
        width, height = image.size
        if self.config.crop_mode == "squash":
            width = height = enlarged
        elif width < height:
            width, height = enlarged, int(enlarged * height / width)
        else:
            width, height = int(enlarged * width / height), enlarged
        image = image.resize((width, height), _RESAMPLING[self.config.interpolation])
        return torchvision_v2().functional.center_crop(image, [self.size, self.size])

    def _resized_to(self) -> int:
        return int(self.size / self.crop_fraction)


def _flipped(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(N, H, W, C) with some of them mirrored left to right."""
    if chosen.all():
        return images[:, :, ::-1]
    if not chosen.any():
        return images
    flipped = images.copy()
    flipped[chosen] = images[chosen][:, :, ::-1]
    return flipped


def _channels_first(images: np.ndarray) -> Tensor:
    """(N, C, H, W), contiguous and owning its memory, from (N, H, W, C)."""
    count, height, width, channels = images.shape
    planes = np.empty((count, channels, height, width), np.uint8)
    for channel in range(channels):  # a plane at a time takes half as long as a transposed copy
        planes[:, channel] = images[..., channel]
    return torch.from_numpy(planes)


def _as_picture(image: Image.Image | Tensor) -> Image.Image:
    return as_image(image.permute(1, 2, 0).contiguous().numpy()) if isinstance(image, Tensor) else image


def torchvision_v2() -> Any:
    """The module of torchvision's transforms.

    Raises:
        ImportError: torchvision is not installed.
    """
    import_torchvision()
    from torchvision.transforms import v2

    return v2
