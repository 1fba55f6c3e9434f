"""The processes of a run: one, or several started by torchrun, on one machine or many."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process's place among all.

    Args:
        rank: 0 to world_size − 1, over all machines.
        world_size: number of processes.
        device: what it computes on.
        restarts: how often torchrun has started the group anew after a failure.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    restarts: int = 0
    control: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on at least one process. Every process must ask."""
        if self.world_size == 1:
            return flag
        told = torch.tensor([int(flag)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        return bool(told.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the CPU. Every process must ask."""
        values = values.detach().cpu()
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def same(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

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
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1 or dist.is_initialized():
        control = dist.group.WORLD if dist.is_initialized() else None
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield Process(chosen, rank, size, control=control)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        # flags and sums travel over a group of their own, so that no GPU has to wait for them
        control = dist.new_group(backend="gloo")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        yield Process(chosen, dist.get_rank(), world_size, restarts, control)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
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
        raise ValueError(
            f"microbatch_size: {batch_size} examples make {microbatches} microbatches of {microbatch_size}, "
            f"which {world_size} processes cannot share equally; microbatch_size={batch_size // world_size} would do"
        )
    return BatchPlan(batch_size, microbatch_size, microbatches // world_size, world_size)
