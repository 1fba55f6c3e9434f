"""A run on disk: the recipe that it follows, what it was made with, and where its parts lie."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from .checkpoint import BEST, LAST, ResumeError
from .distributed import Process
from .image_config import ImageConfig
from .recipe import Recipe, RecipeError, differences, load_recipe

_PACKAGES = ("torch", "torchvision", "numpy", "datasets", "timm")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    ``recipe.yaml``, ``run.json`` (command, seed, versions, machine), ``images.json`` (classes, sizes, normalisation),
    ``log.csv``, ``evaluations.csv``, ``checkpoints/last.pt`` and ``best.pt``, ``signal/``, ``tensorboard/``; at the
    end ``model.safetensors`` and ``result.json``; after a loss that is not finite ``failure/``.
    """

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / LAST

    @property
    def best(self) -> Path:
        return self.checkpoints / BEST

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def write_images(self, classes: Sequence[str], images: ImageConfig) -> None:
        """Keeps what the data looked like, which evaluation needs however the data changes."""
        text = json.dumps({"classes": list(classes), "images": asdict(images)}, indent=1, ensure_ascii=False)
        write_text(self.path / "images.json", text + "\n")

    def read_images(self) -> tuple[tuple[str, ...], ImageConfig]:
        """Class names in the order of the labels, and how images are prepared.

        Raises:
            ResumeError: the run has not come so far.
        """
        file = self.path / "images.json"
        if not file.is_file():
            raise ResumeError(f"{self.path} has no images.json: the run has not begun")
        kept = json.loads(file.read_text(encoding="utf-8"))
        images: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in kept["images"].items()
        }
        return tuple(kept["classes"]), ImageConfig(**images)

    def read_recipe(self) -> Recipe:
        """The recipe that the run follows.

        Raises:
            ResumeError: this is no folder of a run.
        """
        if not self.recipe.is_file():
            raise ResumeError(f"{self.path} is no folder of a run: it has no recipe.yaml")
        return load_recipe(self.recipe)

    def start(self, recipe: Recipe, process: Process) -> None:
        """Makes the folder for a new run.

        Raises:
            FileExistsError: there is something in it already.
            OSError: it cannot be made.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            resume = f"; go on with it by --resume {self.path}" if self.recipe.is_file() else ""
            raise FileExistsError(f"{self.path} is there already{resume}; nothing was overwritten")
        self.checkpoints.mkdir(parents=True)
        self.describe(process)
        write_text(self.recipe, recipe.to_yaml())

    def describe(self, process: Process) -> None:
        """Adds this start, or this resumption, to ``run.json``."""
        file = self.path / "run.json"
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if file.is_file() else []
        starts.append(provenance(process))
        write_text(file, json.dumps({"starts": starts}, indent=1, ensure_ascii=False) + "\n")

    def follow(self, recipe: Recipe | None, force: bool) -> Recipe:
        """The recipe to go on with: the run's own, or ``recipe`` if it is the same or ``force`` says so.

        Raises:
            RecipeError: another recipe, and no ``force``; the message shows every difference.
        """
        own = self.read_recipe()
        changes = [] if recipe is None else differences(own, recipe)
        if recipe is None or not changes:
            return own
        if not force:
            raise RecipeError(f"{self.path} follows another recipe, so --force is needed: {'; '.join(changes)}")
        write_text(self.recipe, recipe.to_yaml())
        return recipe


def default_run_path(recipe: Recipe, process: Process) -> Path:
    """``runs/MODEL-DATE-TIME``, the same on every process and, under torchrun, after every restart."""
    model = recipe.model.name.replace(":", "-").replace("/", "-")
    stamp = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if stamp == "none" or process.world_size == 1:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(process.same(f"runs/{model}-{stamp}"))


def provenance(process: Process) -> dict[str, Any]:
    """What a number has to carry with it: command, versions, machine."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    is_cuda = process.device.type == "cuda"
    return {
        "command": shlex.join(["normfree", *sys.argv[1:]]),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "normfree": metadata.version("normfree"),
        "versions": versions,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(process.device) if is_cuda else process.device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": process.world_size,
    }
