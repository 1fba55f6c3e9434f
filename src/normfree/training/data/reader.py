"""From a request to a batch: decoding, augmentation, and standing in for what cannot be read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...decoding import UnreadableImage
from .batch import Batch, Request, Skipped
from .examples import DecodedExamples
from .keys import uniforms

_ATTEMPTS = 20


class Transform(Protocol):
    """What an image goes through."""

    size: int

    def __call__(self, image: Image.Image | Tensor, key: int = 0) -> Tensor:
        """(C, size, size) uint8."""

    def many(self, images: np.ndarray, keys: np.ndarray) -> Tensor | None:
        """(N, C, size, size) uint8 from (N, H, W, C), equal to one call for each; None if there is no fast way."""


class BatchReader:
    """Makes batches from requests; a data set whose keys are requests, in the words of a DataLoader."""

    def __init__(self, source: Any, transform: Transform):
        self.source, self.transform = source, transform

    def __getitem__(self, request: Request) -> Batch:
        """Holds fewer examples than were asked for, if some cannot be read and nothing can stand in for them."""
        return self._at_once(request) or self._one_by_one(request)

    def _at_once(self, request: Request) -> Batch | None:
        source = self.source
        if not isinstance(source, DecodedExamples) or source.uniform is None:
            return None
        items = np.asarray(request.items)
        if source.failures and any(int(item) in source.failures for item in items):
            return None
        keys = np.zeros(len(items), np.uint64) if request.keys is None else request.keys
        images = self.transform.many(source.uniform[items], keys)
        if images is None:
            return None
        return Batch(images, torch.from_numpy(source.labels[items]), request.update, request.microbatch)

    def _one_by_one(self, request: Request) -> Batch:
        images, targets, skipped = [], [], []
        for place, item in enumerate(request.items):
            key = 0 if request.keys is None else int(request.keys[place])
            for candidate in self._candidates(item, request, key):
                try:
                    image = self.source.load(candidate)
                except UnreadableImage as error:
                    skipped.append(Skipped(self.source.describe(candidate), str(error)))
                    continue
                images.append(self.transform(image, key))
                targets.append(self.source.label(candidate))
                break
        size = self.transform.size
        stacked = torch.stack(images) if images else torch.empty(0, self.source.channels, size, size, dtype=torch.uint8)
        return Batch(
            stacked, torch.tensor(targets, dtype=torch.int64), request.update, request.microbatch, tuple(skipped)
        )

    def _candidates(self, item: Any, request: Request, key: int) -> Iterator[Any]:
        """The example, and in training what stands in for it, by its key."""
        yield item
        if request.keys is None:
            return
        other = np.array([~np.uint64(key)])
        if request.spares is None:
            yield from (uniforms(other, _ATTEMPTS)[0] * len(self.source)).astype(int).tolist()
        else:
            pool = [*request.spares, *request.items]
            yield from (pool[number] for number in np.argsort(uniforms(other, len(pool))[0]))


def start_worker(_: int) -> None:
    """One thread, and signals left to the main process: a Ctrl-C or SIGTERM for all must not break the reading."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)


def _leave(_: int, __: FrameType | None) -> None:
    os._exit(0)
