"""One update: microbatches in, other weights out; and everything that changes with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..sharing import shared_standardization
from .building import has_standardized_weights
from .checkpoint import ResumeError
from .distributed import BatchPlan, Process
from .optimization import averaged, clip_gradient_norm, make_optimizer, make_schedule
from .recipe import Recipe
from .seeds import seed_for

_LAYERS = 1  # purpose of a seed: dropout and stochastic depth

Microbatch = tuple[Tensor, Tensor, int]
"""Images (N, C, H, W), targets (N,) or (N, K), and the microbatch's number within the update, over all processes."""


class Learner:
    """A network in training on one process: its optimiser, learning rate and average, and how many updates it has had.

    Args:
        model: on its device, in the memory format of its images.
        recipe: what to do with it.
        plan: how the examples of an update are shared out.
        process: this one; with several, gradients are averaged over all.
        updates: in the whole run.
        updates_per_epoch: full batches that the data has.
        state: of an earlier :meth:`state`, to go on from.

    Raises:
        ValueError: nothing in the model can be trained.
        ResumeError: a state of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: BatchPlan,
        process: Process,
        updates: int,
        updates_per_epoch: int,
        state: Mapping[str, Any] | None = None,
    ):
        self.model, self.recipe, self.plan, self.device = model, recipe, plan, process.device
        self.average: AveragedModel | None = averaged(model, recipe.ema_decay) if recipe.ema_decay else None
        self.optimizer = make_optimizer(model, recipe)
        self.update = 0
        if state is not None:
            self._load(state)
        self.schedule = make_schedule(self.optimizer, recipe.optimizer, updates, updates_per_epoch, self.update)
        self._parallel = _parallel(model, process)
        self._run: Callable[[Tensor], Tensor] = torch.compile(self._parallel) if recipe.compile else self._parallel
        wanted = recipe.share_standardization
        self._shares = has_standardized_weights(model) and (plan.accumulation > 1 if wanted == "auto" else wanted)

    @property
    def evaluated(self) -> nn.Module:
        """The network that evaluation is about: the average, if there is one and the recipe does not want the raw."""
        wants_raw = self.recipe.evaluation.weights == "raw"
        return self.model if self.average is None or wants_raw else self.average.module

    @property
    def learning_rate(self) -> float:
        """Of the next update, for weights."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, microbatches: Iterable[Microbatch], check: Callable[[Tensor], None] | None = None) -> Tensor:
        """One update from this process's microbatches.

        Dropout and stochastic depth are drawn by (seed, update, microbatch), so that it does not matter which process
        draws them, or after how many restarts.

        Args:
            microbatches: as many as the plan's ``accumulation``.
            check: called with the loss before anything changes; what it raises ends the step.

        Returns:
            The mean loss over this process's examples, a scalar without gradient.
        """
        loss = self._accumulated(microbatches)
        if check is not None:
            check(loss)
        clip_gradient_norm(self.model, self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.update += 1
        return loss

    def _accumulated(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """The mean loss, with its gradient in the parameters."""
        examples = self.plan.batch_size // self.plan.world_size  # gradients are averaged over the processes
        total = torch.zeros((), device=self.device)
        with shared_standardization(self._parallel) if self._shares else contextlib.nullcontext():
            for number, (images, targets, microbatch) in enumerate(microbatches, start=1):
                torch.manual_seed(seed_for(self.recipe.seed, _LAYERS, self.update, microbatch))
                with self._gradients_travel(number == self.plan.accumulation):
                    loss = self._summed_loss(images, targets) / examples
                    loss.backward()
                total = total + loss.detach()
        return total

    def _summed_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = self._run(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )

    def _gradients_travel(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        if is_last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._parallel.no_sync()

    def is_finite(self) -> bool:
        """Whether all that a checkpoint would hold is."""
        tensors = [*self.model.state_dict().values(), *(self.average.state_dict().values() if self.average else ())]
        return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "update": self.update,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        """Rates and decay are those of the recipe, which may have changed; the rest is that of the state."""
        try:
            self.model.load_state_dict(state["model"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
            if self.average is not None and state["average"] is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise ResumeError(f"the checkpoint is of another model: {lines[min(1, len(lines) - 1)]}") from None
        self.update = state["update"]


def _parallel(model: nn.Module, process: Process) -> nn.Module:
    if process.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[process.device.index] if process.device.type == "cuda" else None)
