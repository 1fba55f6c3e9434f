"""Batches for training and evaluation. The seed alone decides what is in them: no number of workers or ranks does."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from .batch import Batch, Request, Skipped
from .errors import DataError
from .examples import DecodedExamples
from .images import Source
from .keys import example_keys, order_seed, permutation
from .reader import BatchReader, Transform, start_worker
from .streaming import StreamedExamples, StreamItem

__all__ = ["Batch", "EvaluationBatches", "Skipped", "TrainingBatches", "workers_for"]

_JUDGED_FROM, _JUDGED_TO = 64, 2048
_MOST_WORKERS = 8
_SPARES = 8  # examples of a stream that can stand in for unreadable ones of an update

Plan = Callable[[], Iterator[Request]]


class TrainingBatches:
    """Microbatches of the updates of each epoch, those of one process.

    An epoch is one permutation of the examples, by seed and epoch; what is left over at its end is dropped. An update
    takes ``batch_size`` examples in M = batch_size / microbatch_size microbatches, of which this process gets the
    numbers rank, rank + world_size, …. An example is augmented by seed, epoch and its position in the epoch.

    Args:
        source: examples for training, from :func:`open_data`.
        transform: from :func:`training_transform`.
        batch_size: examples per update, over all processes.
        microbatch_size: examples per batch; by default the share of one process.
        seed: of the run.
        rank, world_size: number of this process, and of processes.
        workers: processes that decode and augment; 0 does it in this one.
        pin_memory: put batches where a GPU can fetch them by itself.

    Attributes:
        updates_per_epoch: None if it is not known how many examples there are.

    Raises:
        DataError: fewer examples than a batch, or more processes than examples or microbatches.
    """

    updates_per_epoch: int | None

    def __init__(
        self,
        source: Source | None,
        transform: Transform,
        *,
        batch_size: int,
        microbatch_size: int | None = None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        source = _opened(source)
        length = _length(source)
        _check_ranks(rank, world_size)
        if length is not None and world_size > length:
            raise DataError(f"data: {world_size} processes but only {length} examples in {source.name}; use fewer")
        if microbatch_size is None:
            if batch_size % world_size:
                raise DataError(f"batch_size: {batch_size} examples cannot be shared by {world_size} processes equally")
            microbatch_size = batch_size // world_size
        if microbatch_size < 1 or batch_size % microbatch_size:
            raise DataError(f"batch_size: {batch_size} is not a multiple of microbatch_size {microbatch_size}")
        if batch_size // microbatch_size < world_size:
            raise DataError(
                f"data: {world_size} processes but only {batch_size // microbatch_size} microbatches in an update; "
                "use fewer processes, a smaller microbatch_size or a larger batch_size"
            )
        if length is not None and length < batch_size:
            raise DataError(
                f"data: {source.name} has {length} examples, fewer than one batch of {batch_size}; lower batch_size"
            )
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.batch_size, self.microbatch_size = batch_size, microbatch_size
        self.microbatches = batch_size // microbatch_size
        self.length = length
        self.updates_per_epoch = None if length is None else length // batch_size
        self._deliveries = _Deliveries(BatchReader(source, transform), workers, pin_memory)

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from an update on, in order; what comes before it is not decoded.

        Raises:
            DataError: more than half of the examples cannot be read.
        """

        def plan() -> Iterator[Request]:
            return self._requests(epoch, first_update)

        for batch in self._deliveries.of(plan):
            if len(batch.targets) < self.microbatch_size:
                raise DataError(
                    f"data: no readable image found in {self.source.name}; {batch.skipped[-1].name}: "
                    f"{batch.skipped[-1].reason}"
                )
            yield batch

    def close(self) -> None:
        """Ends the workers; another epoch starts new ones."""
        self._deliveries.close()

    def _requests(self, epoch: int, first_update: int) -> Iterator[Request]:
        if isinstance(self.source, StreamedExamples):
            return self._of_stream(self.source, epoch, first_update)
        return self._of_permutation(epoch, first_update)

    def _of_permutation(self, epoch: int, first_update: int) -> Iterator[Request]:
        order = permutation(self.length or 0, self.seed, epoch)
        for update in range(first_update, len(order) // self.batch_size):
            examples = order[update * self.batch_size : (update + 1) * self.batch_size]
            yield from self._of_update(epoch, update, examples)

    def _of_stream(self, source: StreamedExamples, epoch: int, first_update: int) -> Iterator[Request]:
        """Every process reads the whole stream, so that all know its order, and decodes its own share."""
        items = source.stream(order_seed(self.seed, epoch))
        ahead: list[StreamItem] = []
        examples: list[StreamItem] = []
        for update in itertools.count():
            if update == self.updates_per_epoch:
                return
            before, examples = examples, ahead + list(itertools.islice(items, self.batch_size - len(ahead)))
            if len(examples) < self.batch_size:
                if self.updates_per_epoch is not None:
                    read = update * self.batch_size + len(examples)
                    raise DataError(f"data: {source.name} ended after {read} of {source.length} examples")
                return
            ahead = list(itertools.islice(items, min(_SPARES, self.batch_size)))
            if update >= first_update:
                yield from self._of_update(epoch, update, examples, ahead or before[-_SPARES:])

    def _of_update(
        self, epoch: int, update: int, examples: Sequence[Any] | np.ndarray, spares: Sequence[Any] | None = None
    ) -> Iterator[Request]:
        for microbatch in range(self.rank, self.microbatches, self.world_size):
            start = microbatch * self.microbatch_size
            chosen = slice(start, start + self.microbatch_size)
            positions = update * self.batch_size + np.arange(chosen.start, chosen.stop)
            yield Request(update, microbatch, examples[chosen], example_keys(self.seed, epoch, positions), spares)


class EvaluationBatches:
    """Every example once, in the order of the source; the last batch may be smaller. Iterate as often as needed.

    Args:
        source: examples for validation, from :func:`open_data`.
        transform: from :func:`evaluation_transform`.
        batch_size: examples per batch, of this process.
        rank, world_size: this process gets the examples rank, rank + world_size, ….
        workers, pin_memory: as in training.

    Attributes:
        skipped: what the last pass could not read; batches carry it as well.
    """

    def __init__(
        self,
        source: Source | None,
        transform: Transform,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        _check_ranks(rank, world_size)
        if batch_size < 1:
            raise DataError(f"batch_size: expected at least 1, got {batch_size}")
        source = _opened(source)
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.skipped: list[Skipped] = []
        self._deliveries = _Deliveries(BatchReader(source, transform), workers, pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one pass, none of them empty.

        Raises:
            DataError: more than half of the examples cannot be read, or none of this process.
        """
        self.skipped = []
        carried: tuple[Skipped, ...] = ()
        read = 0
        for batch in self._deliveries.of(self._requests):
            self.skipped += batch.skipped
            if not len(batch.targets):
                carried += batch.skipped
                continue
            read += len(batch.targets)
            yield batch._replace(skipped=carried + batch.skipped)
            carried = ()
        if self.skipped and not read:
            first = self.skipped[0]
            raise DataError(f"data: no readable image in {self.source.name}; {first.name}: {first.reason}")

    def close(self) -> None:
        """Ends the workers; another pass starts new ones."""
        self._deliveries.close()

    def _requests(self) -> Iterator[Request]:
        if isinstance(self.source, StreamedExamples):
            share: Iterator[Any] = itertools.islice(self.source.stream(), self.rank, None, self.world_size)
        else:
            share = iter(range(self.rank, len(self.source), self.world_size))
        for number in itertools.count():
            items = list(itertools.islice(share, self.batch_size))
            if not items:
                return
            yield Request(number, 0, items, None)


def workers_for(wanted: int | Literal["auto"], source: Source | None, world_size: int = 1) -> int:
    """How many worker processes one process starts.

    ``"auto"``: none for images that are decoded already, else its share of the machine's cores, at most 8.
    ``world_size`` is the number of processes on this machine.
    """
    if wanted != "auto":
        return wanted
    if isinstance(source, DecodedExamples):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // world_size))


class _Deliveries:
    """Batches for plans of requests, made here or by workers that stay between plans."""

    def __init__(self, reader: BatchReader, workers: int, pin_memory: bool):
        self.reader, self.workers, self.pin_memory = reader, workers, pin_memory
        self._sampler = _Sampler()
        self._loader: DataLoader[Batch] | None = None
        self._read = self._skipped = 0

    def of(self, plan: Plan) -> Iterator[Batch]:
        for batch in self._through_workers(plan) if self.workers else self._here(plan()):
            self._judge(batch)
            yield batch

    def close(self) -> None:
        self._loader = None

    def _here(self, requests: Iterator[Request]) -> Iterator[Batch]:
        for request in requests:
            batch = self.reader[request]
            if self.pin_memory:
                batch = batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory())
            yield batch

    def _through_workers(self, plan: Plan) -> Iterator[Batch]:
        """If the workers die, what is left is read here: the batches are the same."""
        if self._loader is None:
            self._loader = self._started()
        self._sampler.requests = plan()
        delivered = 0
        try:
            for batch in self._loader:
                delivered += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._loader, self.workers = None, 0
            warnings.warn(f"data: a worker ended ({reason}); reading goes on in the main process", stacklevel=2)
            yield from self._here(itertools.islice(plan(), delivered, None))

    def _started(self) -> DataLoader[Batch]:
        fork = "fork" in multiprocessing.get_all_start_methods()
        return DataLoader(
            self.reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._sampler,
            num_workers=self.workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=start_worker,
            persistent_workers=True,
            pin_memory=self.pin_memory,
            multiprocessing_context="fork" if fork else None,
            generator=torch.Generator(),  # the default one would be advanced by every epoch
        )

    def _judge(self, batch: Batch) -> None:
        self._read += len(batch.targets)
        self._skipped += len(batch.skipped)
        seen = self._read + self._skipped
        if batch.skipped and _JUDGED_FROM <= seen <= _JUDGED_TO and self._skipped > seen / 2:
            first = batch.skipped[0]
            raise DataError(
                f"data: {self._skipped} of the first {seen} examples of {self.reader.source.name} cannot be read as "
                f"images; {first.name}: {first.reason}"
            )


class _Sampler:
    """Requests for the workers; what they are is set before each pass."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


def _as_it_is(batch: Any) -> Any:
    return batch


def _opened(source: Source | None) -> Source:
    if source is None:
        raise DataError("data: the examples were not opened; ask open_data for this split")
    return source


def _length(source: Source) -> int | None:
    return source.length if isinstance(source, StreamedExamples) else len(source)


def _check_ranks(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a number from 0 to below world_size, got {rank} of {world_size}")
