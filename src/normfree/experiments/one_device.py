"""Runs of a study in this process, all of a batch size at once on one GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..files import write_text
from ..provenance import provenance
from ..training.distributed import choose_device
from ..training.side_by_side import train_side_by_side
from .study import Cell, OutOfTime, Runner


@dataclass
class OneDeviceRunner(Runner):
    """Trains with :func:`~normfree.training.side_by_side.train_side_by_side`; ``jobs`` does not matter.

    What is finished is kept as other runs are, each with the seconds of its whole group. ``minutes`` are looked at
    between groups, and a group that was cut off begins anew.

    Args:
        needs_gpu: refuse to train where torch sees none, as it would take weeks.
    """

    needs_gpu: bool = False

    def _run_all(self, waiting: list[Cell], total: int) -> None:
        if waiting and self.needs_gpu and not torch.cuda.is_available():
            raise ValueError(f"{len(waiting)} runs of this size need a GPU, and torch sees none")
        groups: dict[int, list[Cell]] = {}
        for cell in waiting:
            groups.setdefault(cell.recipe.batch_size, []).append(cell)
        left = len(waiting)
        for group in groups.values():
            if self._is_over():
                raise OutOfTime(f"{left} of {total} runs are not finished")
            self._train(group)
            left -= len(group)

    def _train(self, cells: Sequence[Cell]) -> None:
        made_by = provenance(choose_device(cells[0].recipe.device))
        start = time.perf_counter()
        results = train_side_by_side([cell.recipe for cell in cells], self.say)
        seconds = time.perf_counter() - start
        for cell, result in zip(cells, results, strict=True):
            path = self.folder / cell.name
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "recipe.yaml", cell.recipe.to_yaml())
            write_text(path / "run.json", json.dumps({"starts": [made_by]}, indent=1) + "\n")
            if result.diverged:
                (path / "failure").mkdir(exist_ok=True)
                self.say(f"{cell.name}: diverged")
                continue
            evaluation = {"top1": result.top1, "loss": result.loss}
            write_text(path / "result.json", json.dumps({"evaluation": evaluation, "seconds": seconds}) + "\n")
            self.say(f"{cell.name}: {result.top1:.2f} %")
