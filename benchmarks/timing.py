"""Contenders in turn within one process; medians and ratios."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from normfree.provenance import processor


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one contender."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2.0 / self.median


def in_turn(contenders: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 2) -> list[Timing]:
    """Runs every contender once per round, so that whatever else the machine does meets all of them.

    Every round has an order of its own, so that none always follows the same other one and finds what that has left
    in the caches and in the allocator.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    orders = random.Random(0)
    for number in range(warm_up + repeats):
        orders.shuffle(order)
        for name, run in order:
            gc.collect()
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def first_runs(contenders: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every contender's first run, and why the others could not run: a shape or a size that does not fit."""
    seconds: dict[str, float] = {}
    gaps: dict[str, str] = {}
    for name, run in contenders.items():
        start = time.perf_counter()
        try:
            run()
            _wait()
        except (ValueError, RuntimeError) as error:  # memory that runs out on a device is a RuntimeError
            gaps[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            seconds[name] = time.perf_counter() - start
    return seconds, gaps


def ratio(timing: Timing, baseline: Timing) -> float:
    """The median over rounds of the two times' ratio."""
    return statistics.median(a / b for a, b in zip(timing.seconds, baseline.seconds, strict=True))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
