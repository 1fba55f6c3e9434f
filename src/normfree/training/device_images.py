"""All images of a run on the device that trains, and batches of them cropped, mirrored and normalised there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .augmentation import evaluation_transform
from .data import DataError, UnreadableImage, open_data
from .data.images import Source
from .data.streaming import StreamedExamples
from .image_config import ImageConfig, resolve_images
from .recipe import DataSection


class DeviceImages:
    """Images of one size in the memory of a device, which make no batch wait.

    Args:
        section: of a recipe.
        device: where to.

    Attributes:
        config: how they are prepared.
        classes: names, by label.
        channels: 1 or 3.
        size: side of an image in pixels.
        images, labels: for training, (N, size, size, C) uint8 and (N,).
        validation, validation_labels: the same.

    Raises:
        DataError: data that cannot be read, is streamed, lacks images for training or validation, or has images that
            are cut in evaluation.
    """

    def __init__(self, section: DataSection, device: torch.device):
        self._section, self._data = section, open_data(section)
        data, self.config = self._data, resolve_images(section, self._data)
        config = self.config
        if config.size != config.test_size or config.crop_fraction != 1.0:
            raise DataError(
                "data: images that stay on the device are the same in training and evaluation; "
                "data.crop_fraction=1.0 and one data.size would do"
            )
        self.classes, self.channels, self.size = data.classes, data.channels, config.size
        self.images, self.labels = _placed(data.train, config, device)
        self.validation, self.validation_labels = _placed(data.validation, config, device)
        self._mean = 255.0 * torch.tensor(config.mean, device=device)
        self._std = 255.0 * torch.tensor(config.std, device=device)
        self._padded: dict[int, Tensor] = {0: self.images}
        self._pixels = torch.arange(self.size, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def suit(self, model: nn.Module) -> bool:
        """Whether the model wants them as they are prepared."""
        wanted = replace(resolve_images(self._section, self._data, model), notes=())
        return wanted == replace(self.config, notes=())

    def batch(self, rows: Tensor, places: Tensor, mirrored: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        """Normalised images (N, C, size, size) in channels_last, and (N,) labels.

        Args:
            rows: (N,), which of the training images.
            places: (2, N), top and left of each crop of ``size`` in the image with its margin.
            mirrored: (N,) bool.
            padding: width of that margin, which is black.
        """
        top, left = places[:, :, None]
        columns = torch.where(mirrored[:, None], self.size - 1 - self._pixels, self._pixels) + left
        lines = self._pixels + top
        picked = self._with_margin(padding)[rows[:, None, None], lines[:, :, None], columns[:, None, :]]
        return self.normalised(picked), self.labels[rows]

    def normalised(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 from (N, H, W, C) uint8."""
        return ((images.float() - self._mean) / self._std).permute(0, 3, 1, 2)

    def _with_margin(self, padding: int) -> Tensor:
        if padding not in self._padded:
            margin = (0, 0, padding, padding, padding, padding)
            self._padded[padding] = torch.nn.functional.pad(self.images, margin)
        return self._padded[padding]


def _placed(examples: Source | None, config: ImageConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    if examples is None or isinstance(examples, StreamedExamples):
        raise DataError("data: images that stay on the device need a training and a validation set, not streamed")
    fit = evaluation_transform(config)
    images = []
    for index in range(len(examples)):
        try:
            images.append(fit(examples.load(index)))
        except UnreadableImage as error:
            raise DataError(f"{examples.describe(index)}: {error}") from None
    pixels = torch.stack(images).permute(0, 2, 3, 1).contiguous()
    return pixels.to(device), torch.from_numpy(examples.labels).to(device)
