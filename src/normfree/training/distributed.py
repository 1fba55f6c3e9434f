"""The processes of a run: one, or several started by torchrun, on one machine or many."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process's place among all.

    Args:
        rank: 0 to world_size − 1, over all machines.
        world_size: number of processes.
        device: what it computes on.
        launch: the same for all processes of one torchrun and for those that it starts anew; empty without torchrun.
        restarts: how often torchrun has started the group anew after a failure.
        control: a group over which flags and numbers travel, so that no GPU has to wait for them.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    launch: str = ""
    restarts: int = 0
    control: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each is so on at least one process. Every process must ask."""
        if self.world_size == 1:
            return flags
        told = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(flag) for flag in told)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the CPU, in float64. Every process must ask."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, on the CPU, in float64. Every process must ask."""
        return self.sum(values) / self.world_size

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every process. Every process must ask.

        Raises:
            Exception: on every process, what ``make`` raised on the first.
        """
        if self.world_size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = make()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1] is not None:
            raise told[1]
        return told[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier(group=self.control)


@contextlib.contextmanager
def this_process(device: str = "auto") -> Iterator[Process]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end.

    Args:
        device: ``"auto"`` for a GPU of this machine where there is one, else the CPU; or a device.

    Raises:
        ValueError: a device that torch does not know, or a GPU where there is none.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    launch, restarts = _launch(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    is_joined = dist.is_initialized()  # by somebody else, who will leave it, too
    if world_size == 1 and not is_joined:
        yield Process(chosen, launch=launch, restarts=restarts)
        return
    if not is_joined:
        _join("nccl" if chosen.type == "cuda" else "gloo")
    try:
        control = dist.new_group(backend="gloo")
        yield Process(chosen, dist.get_rank(), dist.get_world_size(), launch, restarts, control)
    finally:
        if not is_joined:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """The default group of all processes.

    Torchrun's store outlives processes, and with them groups: it must not hand out addresses of the last time.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    prefix = f"normfree-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_joined)}"
    dist.init_process_group(
        backend, timeout=_PATIENCE, world_size=size, rank=rank, store=dist.PrefixStore(prefix, store)
    )


_joined = itertools.count()


def _launch() -> str:
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a recipe names, for the process of this number on its machine.

    Raises:
        ValueError: a device that torch does not know, or a GPU where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {name} was asked for, and torch finds no GPU here")
        index = device.index if device.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise ValueError(f"device: process {local_rank} has no GPU, there are {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {name} was asked for, and torch finds none here")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return device


@dataclass(frozen=True)
class BatchPlan:
    """How the examples of an update are shared out.

    Args:
        batch_size: examples in an update, over all processes.
        microbatch_size: examples that go through the network at a time.
        accumulation: microbatches that a process works through before the update.
        world_size: number of processes.
    """

    batch_size: int
    microbatch_size: int
    accumulation: int
    world_size: int

    def __str__(self) -> str:
        parts = [f"{self.microbatch_size} examples at a time"]
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} times")
        if self.world_size > 1:
            parts.append(f"on {self.world_size} processes")
        return f"{self.batch_size} examples an update: {' '.join(parts)}"


def plan_batches(batch_size: int, microbatch_size: int | None, world_size: int) -> BatchPlan:
    """Shares an update's examples out.

    Raises:
        ValueError: fewer examples than processes, or microbatches that cannot be shared equally; the message says
            which batch sizes would do.
    """
    if batch_size < world_size:
        raise ValueError(f"batch_size: {batch_size} examples are too few for {world_size} processes")
    if microbatch_size is None:
        if batch_size % world_size:
            fitting = batch_size // world_size * world_size
            raise ValueError(
                f"batch_size: {batch_size} is not a multiple of the {world_size} processes; "
                f"{fitting} or {fitting + world_size} is"
            )
        microbatch_size = batch_size // world_size
    microbatches = batch_size // microbatch_size
    if microbatches % world_size:
        sizes = [size for size in range(microbatch_size, 0, -1) if batch_size % (size * world_size) == 0]
        advice = f"microbatch_size={sizes[0]}" if sizes else f"batch_size={microbatch_size * world_size}"
        raise ValueError(
            f"microbatch_size: {batch_size} examples make {microbatches} microbatches of {microbatch_size}, "
            f"which {world_size} processes cannot share equally; {advice} would do"
        )
    return BatchPlan(batch_size, microbatch_size, microbatches // world_size, world_size)
