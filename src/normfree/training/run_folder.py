"""A run on disk: the recipe that it follows, what it was made with, and where its parts lie."""

from __future__ import annotations

import contextlib
import glob
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..files import write_text
from ..provenance import provenance
from .checkpoint import BEST, LAST, ResumeError
from .distributed import Process
from .image_config import ImageConfig
from .recipe import Recipe, RecipeError, differences, load_recipe

_LEFTOVERS = (".*-*.yaml", ".*-*.json", ".*-*.csv", ".*-*.safetensors", "checkpoints/.*-*.pt")


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

    @property
    def failure(self) -> Path:
        return self.path / "failure"

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

    def check_free(self) -> None:
        """Whether a new run may begin here.

        Raises:
            FileExistsError: there is something in it already.
        """
        if self.path.is_dir():
            if all(file.name.startswith(".recipe-") for file in self.path.iterdir()):
                return  # empty, or a run was killed before it had begun
        elif not self.path.exists():
            return
        resume = f"; go on with it by --resume {self.path}" if self.recipe.is_file() else ""
        raise FileExistsError(f"{self.path} is there already{resume}; nothing was overwritten")

    def start(self, recipe: Recipe) -> None:
        """Makes the folder for a new run; from then on it can be gone on with.

        Raises:
            FileExistsError: there is something in it already.
            OSError: it cannot be made.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        self.keep(recipe)

    def keep(self, recipe: Recipe) -> None:
        """Writes down what the run follows."""
        write_text(self.recipe, recipe.to_yaml())

    def belongs_to(self, process: Process) -> bool:
        """Whether this torchrun has made it, before it had to start its processes anew."""
        if not process.launch or not process.restarts or not self.recipe.is_file():
            return False
        return any(start.get("launch") == process.launch for start in self._starts())

    def clean(self) -> None:
        """Removes what a process that was killed while it wrote has left beside its files."""
        for pattern in _LEFTOVERS:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes from working on the same run, until the end of the block or of this process.

        Raises:
            ResumeError: one does already.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (PermissionError, BlockingIOError):
                raise ResumeError(f"{self.path} is being worked on by another process") from None
            except OSError:
                pass  # a file system without locks
            yield

    def _starts(self) -> list[dict[str, Any]]:
        file = self.path / "run.json"
        return json.loads(file.read_text(encoding="utf-8"))["starts"] if file.is_file() else []

    def describe(self, process: Process) -> None:
        """Adds this start, or this resumption, to ``run.json``."""
        this = {
            **provenance(process.device),
            "host": platform.node(),
            "processes": process.world_size,
            "launch": process.launch,
        }
        starts = [*self._starts(), this]
        write_text(self.path / "run.json", json.dumps({"starts": starts}, indent=1, ensure_ascii=False) + "\n")

    def recipe_to_follow(self, recipe: Recipe | None, force: bool) -> Recipe:
        """The recipe to go on with: the run's own, or ``recipe`` if it is the same or ``force`` says so.

        Raises:
            ResumeError: this is no folder of a run.
            RecipeError: another recipe, and no ``force``; the message shows every difference.
        """
        own = self.read_recipe()
        changes = [] if recipe is None else differences(own, recipe)
        if recipe is None or not changes:
            return own
        if not force:
            raise RecipeError(f"{self.path} follows another recipe, so --force is needed: {'; '.join(changes)}")
        return recipe


def default_run_path(recipe: Recipe, process: Process) -> Path:
    """``runs/MODEL-DATE-TIME``; after a restart by torchrun, the run that it had begun. For the first process."""
    model = recipe.model.name.replace(":", "-").replace("/", "-")
    for begun in Path("runs").glob(f"{glob.escape(model)}-*"):
        if RunFolder(begun).belongs_to(process):
            return begun
    return Path(f"runs/{model}-{datetime.now().strftime('%Y%m%d-%H%M%S')}")
