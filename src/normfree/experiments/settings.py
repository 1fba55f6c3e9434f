"""What every experiment is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Settings:
    """How an experiment is to be run.

    Attributes:
        quick: smaller networks and inputs, for seconds instead of minutes or hours.
        seed: of weights, noise and training; the first of them where there are several.
        data: for experiments that train: a folder with CIFAR-10's Parquet files, or whatever a recipe takes.
        folder: where training runs are kept, so that a study that was stopped goes on.
        jobs: training runs side by side.
        minutes: time limit of a study; None for none.
        overrides: ``key=value`` for every recipe of a study, such as ``epochs=10``.
        say: gets lines of progress.
    """

    quick: bool = False
    seed: int = 0
    data: str | None = None
    folder: Path = Path("reproduced")
    jobs: int = 1
    minutes: float | None = None
    overrides: tuple[str, ...] = ()
    say: Callable[[str], None] = _silent
