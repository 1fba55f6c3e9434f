"""From bytes to what the network sees: normalisation, MixUp and CutMix, on the device of training."""

from __future__ import annotations

import torch
from torch import Tensor

from .augmentation import torchvision_v2
from .data.batch import Batch
from .data.keys import MIXING, seeded
from .image_config import ImageConfig
from .recipe import AugmentationSection
from .seeds import seed_for

_SMALLEST_HALVED = 4


class BatchFinisher:
    """Float images and targets from a batch.

    MixUp and CutMix mix an example with the one before it. With both, MixUp takes the first half of each batch and
    CutMix the second; batches of less than 4 go to one of the two as a whole. All is drawn by (seed, epoch, update,
    microbatch).

    Args:
        section: of the recipe; its ``mixup`` and ``cutmix``, or None for evaluation, which mixes nothing.
        config: its ``mean`` and ``std``.
        num_classes: K.
        seed: of the run.
    """

    def __init__(self, section: AugmentationSection | None, config: ImageConfig, num_classes: int, seed: int = 0):
        self.num_classes, self.seed = num_classes, seed
        std = torch.tensor(config.std, dtype=torch.float64).view(-1, 1, 1)
        mean = torch.tensor(config.mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale, self._shift = (1.0 / (255.0 * std)).float(), (-mean / std).float()
        self._mixers = []
        if section is not None and section.mixup:
            self._mixers.append(torchvision_v2().MixUp(alpha=section.mixup, num_classes=num_classes))
        if section is not None and section.cutmix:
            self._mixers.append(torchvision_v2().CutMix(alpha=section.cutmix, num_classes=num_classes))

    def __call__(self, batch: Batch, epoch: int = 0, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) float32, normalised, and (N,) int64 targets, or (N, K) probabilities where examples are mixed.

        Label smoothing is left to the loss, which takes both kinds of targets.

        Raises:
            ValueError: a batch of one example is to be mixed.
        """
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        images = images.float().mul_(self._scale).add_(self._shift)
        if not self._mixers:
            return images, targets
        if len(targets) < 2:
            raise ValueError("augmentation: MixUp and CutMix mix examples and need microbatches of at least 2")
        return self._mixed(images, targets, seed_for(self.seed, MIXING, epoch, batch.update, batch.microbatch))

    def _mixed(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            if len(self._mixers) == 1:
                return self._mixers[0](images, targets)
            if len(targets) < _SMALLEST_HALVED:
                return self._mixers[int(torch.randint(2, ()))](images, targets)
            half = len(targets) // 2
            parts = [
                mixer(images[chosen], targets[chosen])
                for mixer, chosen in zip(self._mixers, (slice(None, half), slice(half, None)), strict=True)
            ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
