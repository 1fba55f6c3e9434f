"""The training loop: microbatches, updates, evaluations, checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal as unix_signals
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..files import write_text
from ..sharing import shared_standardization
from ..signal import spp
from ..signal.propagation import without_non_finite
from ..weights import save_weights
from .augmentation import evaluation_transform, training_transform
from .building import build_model, calibrated_model, has_standardized_weights
from .checkpoint import load_checkpoint, random_state, remove_leftovers, restore_random_state, save_checkpoint
from .data import Batch, EvaluationBatches, TrainingBatches, open_data, workers_for
from .distributed import BatchPlan, Process, plan_batches, this_process
from .evaluation import EvaluationResult, evaluate
from .image_config import resolve_images
from .logs import Say, TableLog, TensorBoardLog, Watcher
from .mixing import BatchFinisher
from .monitor import SignalMonitor, write_signal
from .optimization import averaged, clip_gradient_norm, learning_rate_factor, make_optimizer
from .recipe import Recipe
from .run_folder import RunFolder, default_run_path
from .seeds import seed_for

_LAYERS = 1  # purpose of a seed: dropout and stochastic depth
_SIGNAL_IMAGES = 32
_LOG_COLUMNS = ("update", "epoch", "loss", "learning_rate", "images_per_second", "data_wait")
_EVALUATION_COLUMNS = ("update", "epoch", "top1", "top5", "loss", "calibration_error", "examples", "skipped")


class TrainingStopped(RuntimeError):
    """Training ended before its time; the message says why, and what is left to go on from."""


class TrainingInterrupted(TrainingStopped):
    """Somebody asked it to stop, by ``signal``: SIGTERM or SIGINT (Ctrl-C). The state is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


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

    Under torchrun every process calls this. A group that torchrun has restarted goes on from the last checkpoint.

    Args:
        recipe: what to do; with ``resume`` it may be left out, and must be the run's own unless ``force`` is given.
        out: folder for the run; by default ``runs/MODEL-DATE-TIME``.
        resume: folder of a run to go on with.
        force: go on with the changed recipe.
        say: gets each line of progress; by default a bar on a terminal, lines on standard error elsewhere.

    Raises:
        RecipeError: a recipe that contradicts the run.
        FileExistsError: ``out`` is there already.
        ValueError: data, model or batch sizes that do not go together; the message says what would.
        TrainingStopped: a loss that is not finite, or a signal to stop (SIGTERM, Ctrl-C).
    """
    if recipe is None and resume is None:
        raise ValueError("recipe: there is none, and no run to resume")
    device = recipe.device if recipe is not None else RunFolder(Path(str(resume))).read_recipe().device
    with this_process(device) as process:
        if resume is None and out is not None and process.restarts and RunFolder(Path(out)).last.is_file():
            resume = out
        if resume is not None:
            folder = RunFolder(Path(resume))
            recipe = folder.follow(recipe, force) if process.is_first else recipe or folder.read_recipe()
            recipe = process.same(recipe)
            if process.is_first:
                folder.describe(process)
        else:
            assert recipe is not None
            folder = RunFolder(Path(out) if out is not None else default_run_path(recipe, process))
        run = _Run(recipe, folder, process, say, is_resumed=resume is not None)
        return run.train()


@dataclass
class _Interval:
    """What happened since the last line of the log."""

    start: float = field(default_factory=time.perf_counter)
    examples: int = 0
    waited: float = 0.0
    updates: int = 0
    loss: Tensor | float = 0.0


class _Run:
    """One run on one process: everything that it is made of, and its state."""

    def __init__(self, recipe: Recipe, folder: RunFolder, process: Process, say: Say | None, is_resumed: bool):
        self.recipe, self.folder, self.process, self.say = recipe, folder, process, say
        self.device = process.device
        self.plan: BatchPlan = plan_batches(recipe.batch_size, recipe.microbatch_size, process.world_size)
        self.data = open_data(recipe.data, recipe.seed)
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, len(self.data.classes), self.data.channels)
        self.images = resolve_images(recipe.data, self.data, model)
        classes = len(self.data.classes)
        self.finish = BatchFinisher(recipe.augmentation, self.images, classes, recipe.seed)
        self.finish_unmixed = BatchFinisher(None, self.images, classes)
        self.batches = TrainingBatches(
            self.data.train,
            training_transform(recipe.augmentation, self.images),
            batch_size=recipe.batch_size,
            microbatch_size=self.plan.microbatch_size,
            seed=recipe.seed,
            rank=process.rank,
            world_size=process.world_size,
            workers=self._workers(self.data.train),
            pin_memory=self.device.type == "cuda",
        )
        if self.batches.updates_per_epoch is None:
            raise ValueError(f"data: nobody knows how many examples {recipe.data.path} has; set data.limit to it")
        self.updates_per_epoch: int = self.batches.updates_per_epoch
        self.updates = max(1, round(recipe.epochs * self.updates_per_epoch))
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        is_restored = is_resumed and folder.last.is_file()
        if not is_restored:  # otherwise the gains are in the checkpoint
            shape = (self.data.channels, self.images.size, self.images.size)
            model = calibrated_model(model, recipe, shape, self._first_images)
        self.model: nn.Module = model.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.average: AveragedModel | None = averaged(model, recipe.ema_decay) if recipe.ema_decay else None
        self.optimizer = make_optimizer(model, recipe)
        factor = learning_rate_factor(recipe.optimizer, self.updates, self.updates_per_epoch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.update, self.best, self.skipped = 0, -math.inf, 0
        self.seconds_before = 0.0
        self.evaluation: EvaluationResult | None = None
        if is_restored:
            self._restore()
        elif process.is_first and not is_resumed:
            folder.start(recipe, process)
            folder.write_images(self.data.classes, self.images)
        process.wait()
        self.parallel = self._parallel()
        self.run: Any = torch.compile(self.parallel) if recipe.compile else self.parallel
        wants_sharing = recipe.share_standardization
        self.share = has_standardized_weights(model) and (
            self.plan.accumulation > 1 if wants_sharing == "auto" else wants_sharing
        )
        self.stop_requested = 0  # the number of the signal
        self._interval = _Interval()
        self._saved_at = time.monotonic()

    def train(self) -> TrainingResult:
        """Runs to the end of the recipe."""
        self.start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            watcher = stack.enter_context(Watcher(self.updates, self.update, self._say_or_none()))
            stack.enter_context(_stop_on_signals(self))
            self._open_logs(stack, watcher)
            self._announce(watcher)
            self.model.train()
            while self.update < self.updates:
                self._epoch(watcher)
            if self.evaluation is None:
                self._evaluate(watcher)
            assert self.evaluation is not None
            result = TrainingResult(self.folder.path, self.evaluation, self.updates, self.seconds, self.best)
            if self.process.is_first:
                self._save()
                save_weights(self._evaluated_model(), self.folder.weights)
                write_text(self.folder.result, json.dumps(without_non_finite(result.to_dict()), indent=1) + "\n")
                watcher.line(f"done: {result.evaluation}; weights in {self.folder.weights}")
            self.process.wait()
            return result

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def _epoch(self, watcher: Watcher) -> None:
        epoch, first = divmod(self.update, self.updates_per_epoch)
        stream = self.batches.epoch(epoch, first)
        try:
            while self.update < min(self.updates, (epoch + 1) * self.updates_per_epoch):
                self._step(self._next_update(stream), epoch)
                self._after_update(watcher)
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    def _next_update(self, stream: Iterator[Batch]) -> list[Batch]:
        start = time.perf_counter()
        try:
            batches = [next(stream) for _ in range(self.plan.accumulation)]
        except RuntimeError:
            if self.stop_requested:  # the signal reached the workers as well
                self._stop()
            raise
        self._interval.waited += time.perf_counter() - start
        return batches

    def _step(self, batches: Sequence[Batch], epoch: int) -> None:
        """One update from this process's microbatches."""
        share = self.recipe.batch_size / self.plan.world_size  # DDP averages over the processes
        total: Tensor | float = 0.0
        with shared_standardization(self.parallel) if self.share else contextlib.nullcontext():
            for number, batch in enumerate(batches, start=1):
                self.skipped += len(batch.skipped)
                images, targets = self._prepared(batch, epoch)
                torch.manual_seed(seed_for(self.recipe.seed, _LAYERS, self.update, batch.microbatch))
                with self._gradients_travel(number == len(batches)):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                        logits = self.run(images)
                    loss = self._loss(logits.float(), targets) / share
                    loss.backward()
                total = total + loss.detach()
                self._interval.examples += len(images)
        if self.device.type == "cpu":
            self._check_finite(float(total), images)
        clip_gradient_norm(self.model, self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._interval.loss = self._interval.loss + total
        self._interval.updates += 1
        self._last_images = images
        self.update += 1

    def _prepared(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        images, targets = self.finish(batch, epoch, self.device)
        return images.contiguous(memory_format=self.memory_format), targets

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )

    def _gradients_travel(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        if is_last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _after_update(self, watcher: Watcher) -> None:
        is_last = self.update == self.updates
        is_logged = self.update % self.recipe.log.every == 0 or is_last
        if is_logged:
            self._log(watcher)
        watcher.update(self.update, self._state, is_logged)
        if self.process.any(bool(self.stop_requested)):
            self._stop()
        if self.monitor is not None:
            self.monitor(self.update)
        if self._is_due(self.recipe.evaluation.every_epochs) or is_last:
            self._evaluate(watcher)
        minutes = self.recipe.checkpoint.every_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_at > 60.0 * minutes
        if self._is_due(self.recipe.checkpoint.every_epochs) or (is_late and self.process.is_first):
            self._save()

    def _is_due(self, every_epochs: float | None) -> bool:
        """Whether this update is the last of another ``every_epochs`` epochs."""
        if every_epochs is None:
            return False
        interval = every_epochs * self.updates_per_epoch
        return math.floor(self.update / interval + 1e-9) > math.floor((self.update - 1) / interval + 1e-9)

    def _log(self, watcher: Watcher) -> None:
        interval, self._interval = self._interval, _Interval()
        sums = self.process.sum(torch.tensor([float(interval.loss), float(interval.examples)], dtype=torch.float64))
        seconds = time.perf_counter() - interval.start
        loss = float(sums[0]) / interval.updates / self.process.world_size
        self._check_finite(loss, self._last_images)
        row = {
            "update": self.update,
            "epoch": self.update / self.updates_per_epoch,
            "loss": loss,
            "learning_rate": self.schedule.get_last_lr()[0],
            "images_per_second": float(sums[1]) / seconds,
            "data_wait": interval.waited / seconds,
        }
        self._state = f"epoch {row['epoch']:.2f}  loss {loss:.4f}  {row['images_per_second']:.0f} images/s"
        if self.process.is_first:
            self.log.add(row)
            self.tensorboard.scalars("train", row, self.update)
        if self.skipped:
            watcher.line(f"{self.skipped} examples could not be read so far; others took their places")

    def _check_finite(self, loss: float, images: Tensor) -> None:
        if not self.process.any(not math.isfinite(loss)):
            return
        message = f"the loss is {loss} at update {self.update + 1}"
        if self.process.is_first:
            failing = spp(self.model, images, label=f"update {self.update + 1}")
            write_signal(failing, self.folder.path / "failure", "signal")
            message += f"; the signal is in {self.folder.path / 'failure'}"
            message += f", the last good state in {self.folder.last}" if self.folder.last.is_file() else ""
        raise TrainingStopped(f"{message}; a smaller learning rate or optimizer.adaptive_clipping may help")

    def _evaluate(self, watcher: Watcher) -> None:
        self.evaluation = result = evaluate(
            self._evaluated_model(),
            self._evaluation_batches(),
            self._prepared_for_evaluation,
            self.data.classes,
            self.device,
            self.recipe.precision,
        )
        self._interval.start = time.perf_counter()
        is_best, self.best = result.top1 > self.best, max(self.best, result.top1)
        if not self.process.is_first:
            return
        row = {**result.to_dict(), "update": self.update, "epoch": self.update / self.updates_per_epoch}
        row["skipped"] = len(result.skipped)
        self.evaluations.add(row)
        self.tensorboard.scalars("validation", {k: row[k] for k in _EVALUATION_COLUMNS[2:6]}, self.update)
        watcher.line(f"epoch {row['epoch']:.2f}: {result}")
        if is_best:
            weights = self._evaluated_model().state_dict()
            save_checkpoint(self.folder.best, {"model": weights, "update": self.update, "top1": result.top1})

    def _workers(self, examples: Any) -> int:
        return workers_for(self.recipe.data.workers, examples, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def _evaluated_model(self) -> nn.Module:
        wanted = self.recipe.evaluation.weights
        return self.average.module if self.average is not None and wanted != "raw" else self.model

    def _evaluation_batches(self) -> EvaluationBatches:
        return EvaluationBatches(
            self.data.validation,
            evaluation_transform(self.images),
            batch_size=self.recipe.evaluation.batch_size or max(64, self.plan.microbatch_size),
            rank=self.process.rank,
            world_size=self.process.world_size,
            workers=self._workers(self.data.validation),
        )

    def _prepared_for_evaluation(self, batch: Batch) -> Tensor:
        return self.finish_unmixed(batch, device=self.device)[0].contiguous(memory_format=self.memory_format)

    def _first_images(self) -> Tensor:
        """Training images for a calibration on data, the same on every process."""
        batches = EvaluationBatches(self.data.train, evaluation_transform(self.images), batch_size=128)
        return self.finish_unmixed(next(iter(batches)))[0]

    def _parallel(self) -> nn.Module:
        if self.process.world_size == 1:
            return self.model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices)

    def _open_logs(self, stack: contextlib.ExitStack, watcher: Watcher) -> None:
        self._state = ""
        self.monitor: SignalMonitor | None = None
        if not self.process.is_first:
            return
        kept = self.update or None
        self.log = TableLog(self.folder.path / "log.csv", _LOG_COLUMNS, kept)
        self.evaluations = TableLog(self.folder.path / "evaluations.csv", _EVALUATION_COLUMNS, kept)
        folder = self.folder.path / "tensorboard" if self.recipe.log.tensorboard else None
        self.tensorboard = TensorBoardLog(folder, kept)
        stack.callback(self.tensorboard.close)
        if self.recipe.log.signal_every is not None:
            self.monitor = SignalMonitor(
                self.model,
                self._prepared_for_evaluation(next(iter(self._evaluation_batches_alone()))),
                self.recipe.log.signal_every,
                self.folder.path / "signal",
                self._show_signal,
            )
            if self.update == 0:
                self.monitor(0)

    def _evaluation_batches_alone(self) -> EvaluationBatches:
        return EvaluationBatches(self.data.validation, evaluation_transform(self.images), batch_size=_SIGNAL_IMAGES)

    def _show_signal(self, step: int, signal: Any) -> None:
        if self.recipe.log.tensorboard:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(13.0, 4.3), layout="constrained")
            signal.plot(figure.subplots(1, 3))
            self.tensorboard.figure("signal", figure, step)

    def _announce(self, watcher: Watcher) -> None:
        if not self.process.is_first:
            return
        recipe = self.recipe
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        train, validation = self.data.train, self.data.validation
        assert train is not None
        assert validation is not None
        watcher.line(
            f"{recipe.model.name}, {parameters / 1e6:.2f} M parameters, on {self.device}; {len(train)} training and "
            f"{len(validation)} validation examples of {len(self.data.classes)} classes, {self.images.size} px"
        )
        for note in (*self.data.notes, *self.images.notes):
            watcher.line(note)
        watcher.line(f"{self.plan}; {self.updates} updates ({recipe.epochs:g} epochs)")
        if recipe.optimizer.learning_rate_batch is not None:
            section = recipe.optimizer
            watcher.line(
                f"learning rate {recipe.peak_learning_rate:g} = {section.learning_rate:g} × "
                f"{recipe.batch_size} / {section.learning_rate_batch}"
            )
        watcher.line(f"{'going on at update ' + str(self.update) if self.update else 'writing'}: {self.folder.path}")

    def _say_or_none(self) -> Say | None:
        return self.say if self.process.is_first else _ignore

    def _stop(self) -> None:
        if self.process.is_first:
            self._save()
        self.process.wait()
        raise TrainingInterrupted(
            f"stopped at update {self.update} of {self.updates} as asked; "
            f"normfree train --resume {self.folder.path} goes on",
            self.stop_requested or unix_signals.SIGTERM,
        )

    def _save(self) -> None:
        """The last checkpoint, by the first process, of a state that is worth keeping."""
        self._saved_at = time.monotonic()
        if not self.process.is_first:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            return  # the next look at the loss ends the run
        save_checkpoint(
            self.folder.last,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
                "average": None if self.average is None else self.average.state_dict(),
                "random": random_state(),
                "update": self.update,
                "best": self.best,
                "skipped": self.skipped,
                "seconds": self.seconds,
            },
        )

    def _restore(self) -> None:
        state = load_checkpoint(self.folder.last, self.device)
        remove_leftovers(self.folder.checkpoints)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        restore_random_state(state["random"])
        self.update, self.best, self.skipped = state["update"], state["best"], state["skipped"]
        self.seconds_before = state["seconds"]


@contextlib.contextmanager
def _stop_on_signals(run: _Run) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the run to save and stop after the update; a second Ctrl-C stops it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: unix_signals.getsignal(number) for number in (unix_signals.SIGTERM, unix_signals.SIGINT)}

    def request(number: int, frame: FrameType | None) -> None:
        if run.stop_requested and number == unix_signals.SIGINT:
            raise KeyboardInterrupt
        run.stop_requested = number

    for number in before:
        unix_signals.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            unix_signals.signal(number, handler)


def _ignore(line: str) -> None:
    pass
