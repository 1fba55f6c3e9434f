"""The training loop: updates, and now and then a line, a plot, an evaluation, a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._allocator import keep_freed_memory
from ..files import write_text
from ..signal import spp
from ..signal.propagation import without_non_finite
from ..weights import save_weights
from .building import build_model, calibrated_model, fill_from
from .checkpoint import ResumeError, load_checkpoint, random_state, restore_random_state, save_checkpoint
from .data import Batch, open_data
from .distributed import Process, plan_batches, this_process
from .evaluation import EvaluationResult, evaluate
from .feed import Feed
from .image_config import resolve_images
from .journal import Journal, introduction
from .logs import Say
from .monitor import SignalMonitor, write_signal
from .recipe import Recipe
from .run_folder import RunFolder, default_run_path
from .stopping import StopRequest, TrainingInterrupted, TrainingStopped, stop_on_signals
from .update import Learner, Microbatch


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        folder: of the run.
        evaluation: the last one, on validation data.
        updates: of the whole run.
        seconds: of training and evaluating, over all parts of a resumed run.
        best_top1: of all evaluations, in per cent.
    """

    folder: Path
    evaluation: EvaluationResult
    updates: int
    seconds: float
    best_top1: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "updates": self.updates,
            "seconds": round(self.seconds, 2),
            "best_top1": self.best_top1,
            "evaluation": self.evaluation.to_dict(),
        }


def train(
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    force: bool = False,
    say: Say | None = None,
) -> TrainingResult:
    """Trains what a recipe describes, from the start or from the last checkpoint of a run.

    Under torchrun every process calls this. A group that torchrun starts anew goes on from the last checkpoint.

    Args:
        recipe: what to do; with ``resume`` it may be left out, and must be the run's own unless ``force`` is given.
        out: folder for the run; by default ``runs/MODEL-DATE-TIME``.
        resume: folder of a run to go on with; one that has no checkpoint yet begins again.
        force: go on with the changed recipe.
        say: gets each line of progress; by default a bar on a terminal, lines on standard error elsewhere.

    Raises:
        RecipeError: a recipe that contradicts the run.
        ResumeError: no run, a damaged checkpoint, or one that the recipe cannot go on from.
        FileExistsError: ``out`` is there already.
        ValueError: data, model or batch sizes that do not go together; the message says what would.
        TrainingStopped: a loss that is not finite, or a signal to stop (SIGTERM, Ctrl-C).
    """
    if recipe is None and resume is None:
        raise ValueError("recipe: there is none, and no run to resume")
    if out is not None and resume is not None:
        raise ValueError("out: a run that is gone on with stays in its folder; give out or resume, not both")
    device = recipe.device if recipe is not None else RunFolder(Path(str(resume))).read_recipe().device
    with this_process(device) as process:
        place = process.from_first(lambda: _place(recipe, out, resume, force, process))
        with _Run(*place, process) as run:
            return run.train(say)


def _place(
    recipe: Recipe | None, out: str | Path | None, resume: str | Path | None, force: bool, process: Process
) -> tuple[Recipe, RunFolder, bool]:
    """What to follow, in which folder, and whether a run is there that is to be gone on with."""
    if resume is not None:
        folder, is_begun = RunFolder(Path(resume)), True
    else:
        assert recipe is not None
        folder = RunFolder(Path(out) if out is not None else default_run_path(recipe, process))
        is_begun = folder.belongs_to(process)
    if is_begun:
        return folder.recipe_to_follow(recipe, force), folder, True
    folder.check_free()
    assert recipe is not None
    return recipe, folder, False


@dataclass
class _Interval:
    """What happened since the last line of the log; ``losses`` has one scalar for each update."""

    losses: list[Tensor] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    examples: int = 0
    waited: float = 0.0


class _Run:
    """One run on one process: what it is made of, and how far it is."""

    def __init__(self, recipe: Recipe, folder: RunFolder, is_resumed: bool, process: Process):
        self.recipe, self.folder, self.process = recipe, folder, process
        if process.device.type == "cpu":
            keep_freed_memory()
        has_state = process.from_first(lambda: is_resumed and folder.last.is_file())
        state = load_checkpoint(folder.last, process.device) if has_state else None
        self.plan = plan_batches(recipe.batch_size, recipe.microbatch_size, process.world_size)
        data = open_data(recipe.data, recipe.seed)
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, len(data.classes), data.channels)
        weights = recipe.model.weights if state is None else None  # a run that is gone on with has its own
        self.notes = [] if weights is None else fill_from(model, weights)
        images = resolve_images(recipe.data, data, model)
        self.feed = Feed(recipe, data, images, self.plan, process)
        self.updates_per_epoch = self.feed.updates_per_epoch
        self.updates = max(1, round(recipe.epochs * self.updates_per_epoch))
        if state is None:  # otherwise the gains are in the checkpoint
            shape = (data.channels, images.size, images.size)
            model = calibrated_model(model, recipe, shape, self.feed.calibration_images)
        else:
            self._check_data(state)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model = model.to(process.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.learner = Learner(model, recipe, self.plan, process, self.updates, self.updates_per_epoch, state)
        self.evaluation: EvaluationResult | None = None
        self.best, self.skipped, self.seconds_before = -math.inf, 0, 0.0
        self.is_settled = state is None  # whether all that is due after the present update was done
        self.interval = _Interval()
        if state is not None:
            self._restore(state)
        self._context = contextlib.ExitStack()
        process.from_first(lambda: self._begin_folder(is_resumed))

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.close()
        self.feed.close()

    @property
    def update(self) -> int:
        return self.learner.update

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def train(self, say: Say | None) -> TrainingResult:
        """Runs to the end of the recipe."""
        self.start, self.saved_at = time.perf_counter(), time.monotonic()
        with (
            stop_on_signals() as stop,
            Journal(self.recipe, self.folder, self.process, self.update, self.updates, say) as self.journal,
        ):
            for line in [
                *introduction(self.recipe, self.learner.model, self.feed, self.plan, self.updates),
                *self.notes,
            ]:
                self.journal.line(line)
            going_on = f"going on at update {self.update} of {self.updates}" if self.update else "writing"
            self.journal.line(f"{going_on}: {self.folder.path}")
            self._watch_signal()
            if not self.is_settled:
                self._settle()
            self.learner.model.train()
            self.interval.start = time.perf_counter()
            while self.update < self.updates:
                self._epoch(stop)
            return self._finish()

    def _epoch(self, stop: StopRequest) -> None:
        epoch, first = divmod(self.update, self.updates_per_epoch)
        with self.feed.updates(epoch, first) as updates:
            while self.update < min(self.updates, (epoch + 1) * self.updates_per_epoch):
                self._step(self._awaited(updates), epoch)
                self._after_update(stop)

    def _awaited(self, updates: Iterator[list[Batch]]) -> list[Batch]:
        start = time.perf_counter()
        batches = next(updates)
        self.interval.waited += time.perf_counter() - start
        return batches

    def _step(self, batches: Sequence[Batch], epoch: int) -> None:
        """One update; on a CPU, where looking costs nothing, none is made from a loss that is not finite."""
        looks_at_once = self.process.device.type == "cpu"
        loss = self.learner.step(self._microbatches(batches, epoch), self._check_one if looks_at_once else None)
        self.interval.losses.append(loss)
        self.interval.examples += sum(len(batch.images) for batch in batches)
        self.skipped += sum(len(batch.skipped) for batch in batches)
        self.is_settled = False

    def _microbatches(self, batches: Sequence[Batch], epoch: int) -> Iterator[Microbatch]:
        for batch in batches:
            images, targets = self.feed.training(batch, epoch)
            self.last_images = images
            yield images, targets, batch.microbatch

    def _after_update(self, stop: StopRequest) -> None:
        if self.update % self.recipe.log.every == 0 or self.update == self.updates:
            self._log()
        else:
            self.journal.updated(self.update)
        minutes = self.recipe.checkpoint.every_minutes
        is_late = minutes is not None and time.monotonic() - self.saved_at > 60.0 * minutes
        is_stopped, is_late = self.process.any(bool(stop.signal), is_late)
        if is_stopped:
            self._stop(stop)
        started = time.perf_counter()
        self._settle()
        if is_late or self._is_due(self.recipe.checkpoint.every_epochs):
            self._save()
        self.interval.start += time.perf_counter() - started  # speed is that of updates alone

    def _settle(self) -> None:
        """All that is due after this update, but for checkpoints: the signal, an evaluation."""
        if self.monitor is not None and self.process.is_first:
            self.monitor(self.update)
        if self._is_due(self.recipe.evaluation.every_epochs) or self.update == self.updates:
            self._evaluate()
        self.is_settled = True

    def _is_due(self, every_epochs: float | None) -> bool:
        """Whether this update is the last of another ``every_epochs`` epochs."""
        if every_epochs is None:
            return False
        interval = every_epochs * self.updates_per_epoch
        return math.floor(self.update / interval + 1e-9) > math.floor((self.update - 1) / interval + 1e-9)

    def _log(self) -> None:
        interval, losses = self.interval, self._checked_losses()
        seconds = time.perf_counter() - interval.start
        examples, skipped = self.process.sum(torch.tensor([interval.examples, self.skipped])).tolist()
        row = {
            "update": self.update,
            "epoch": self.update / self.updates_per_epoch,
            "loss": float(losses.mean()),
            "learning_rate": self.learner.learning_rate,
            "images_per_second": examples / seconds,
            "data_wait": interval.waited / seconds,
        }
        self.interval = _Interval()
        self.journal.logged(row, int(skipped))

    def _checked_losses(self) -> Tensor:
        """The mean loss over all processes of every update since the last line of the log."""
        losses = self.process.mean(torch.stack(self.interval.losses))
        for number, loss in enumerate(losses.tolist(), start=self.update - len(losses) + 1):
            if not math.isfinite(loss):
                self._fail(loss, number)
        return losses

    def _check_one(self, loss: Tensor) -> None:
        mean = float(self.process.mean(loss))
        if not math.isfinite(mean):
            self._fail(mean, self.update + 1)

    def _fail(self, loss: float, update: int) -> None:
        message = f"the loss is {loss} at update {update}"
        if self.process.is_first:
            with contextlib.suppress(Exception):  # the loss is what matters
                failing = spp(self.learner.model, self.last_images, label=f"update {update}")
                write_signal(failing, self.folder.failure, "signal")
                message += f"; the signal is in {self.folder.failure}"
            self.folder.failure.mkdir(exist_ok=True)
            message += f", the last good state in {self.folder.last}" if self.folder.last.is_file() else ""
        raise TrainingStopped(f"{message}; a smaller learning rate or optimizer.adaptive_clipping may help")

    def _evaluate(self) -> None:
        if self.interval.losses:
            self._checked_losses()
        self.evaluation = result = self._evaluated()
        self.journal.evaluated(result, self.update, self.update / self.updates_per_epoch)
        if result.top1 > self.best:
            self.best = result.top1
            if self.process.is_first:
                weights = self.learner.evaluated.state_dict()
                save_checkpoint(self.folder.best, {"model": weights, "update": self.update, "top1": result.top1})

    def _evaluated(self) -> EvaluationResult:
        return evaluate(
            self.learner.evaluated,
            self.feed.evaluation_batches(),
            self.feed.evaluation,
            self.feed.data.classes,
            self.process.device,
            self.recipe.precision,
        )

    def _watch_signal(self) -> None:
        self.monitor: SignalMonitor | None = None
        every = self.recipe.log.signal_every
        if every is not None and self.process.is_first:
            folder, images = self.folder.path / "signal", self.feed.signal_images()
            self.monitor = SignalMonitor(self.learner.model, images, every, folder, self.journal.signal)
            if self.update == 0:
                self.monitor(0)

    def _stop(self, stop: StopRequest) -> None:
        self._save()
        self.process.wait()
        raise TrainingInterrupted(
            f"stopped at update {self.update} of {self.updates} as asked; "
            f"normfree train --resume {self.folder.path} goes on",
            stop.signal or 15,
        )

    def _finish(self) -> TrainingResult:
        evaluation = self.evaluation or self._evaluated()  # a finished run was gone on with
        result = TrainingResult(self.folder.path, evaluation, self.updates, self.seconds, self.best)
        self._save()
        if self.process.is_first:
            save_weights(self.learner.evaluated, self.folder.weights)
            write_text(self.folder.result, json.dumps(without_non_finite(result.to_dict()), indent=1) + "\n")
            self.journal.line(f"done: {result.evaluation}; weights in {self.folder.weights}")
        self.process.wait()
        return result

    def _save(self) -> None:
        """The last checkpoint, by the first process, of a state that is worth keeping. Every process must ask."""
        self.saved_at = time.monotonic()
        losses = self.process.mean(torch.stack(self.interval.losses)).tolist() if self.interval.losses else []
        skipped = int(self.process.sum(torch.tensor(self.skipped)))
        if not self.process.is_first or not self.learner.is_finite():
            return  # a state with NaN in it: the next look at the loss ends the run
        save_checkpoint(
            self.folder.last,
            {
                **self.learner.state(),
                "random": random_state(),
                "updates_per_epoch": self.updates_per_epoch,
                "is_settled": self.is_settled,
                "losses": losses,
                "best": self.best,
                "skipped": skipped,
                "seconds": self.seconds,
            },
        )

    def _check_data(self, state: dict[str, Any]) -> None:
        classes, _ = self.folder.read_images()
        if self.feed.data.classes != classes:
            raise ResumeError(f"{self.folder.path}: the data has other classes than when the run began")
        if state["updates_per_epoch"] != self.updates_per_epoch:
            raise ResumeError(
                f"{self.folder.path}: an epoch had {state['updates_per_epoch']} updates and now has "
                f"{self.updates_per_epoch}, so its place in the data is lost; begin a new run with "
                f"model.weights={self.folder.path}"
            )
        if state["update"] > self.updates:
            raise ResumeError(
                f"{self.folder.path}: it has made {state['update']} updates already, more than the {self.updates} of "
                f"{self.recipe.epochs:g} epochs"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        restore_random_state(state["random"])
        self.is_settled, self.best, self.seconds_before = state["is_settled"], state["best"], state["seconds"]
        self.skipped = state["skipped"] if self.process.is_first else 0
        device = self.process.device
        self.interval.losses = [torch.tensor(loss, device=device, dtype=torch.float32) for loss in state["losses"]]

    def _begin_folder(self, is_resumed: bool) -> None:
        if not is_resumed:
            self.folder.start(self.recipe)
        self._context.enter_context(self.folder.claimed())
        self.folder.checkpoints.mkdir(exist_ok=True)
        self.folder.clean()
        self.folder.keep(self.recipe)
        self.folder.write_images(self.feed.data.classes, self.feed.images)
        self.folder.describe(self.process)
