"""Many small networks trained at once on one GPU: a step of each is a CUDA graph, replayed on a stream of its own.

A small network leaves a GPU idle while Python launches its operations. A graph takes one launch for a whole step, and
the steps of several networks fill the GPU together. Without a GPU the same steps are made one after the other, which
is good for tests.

The training is that of ``normfree train``, with the same weights to begin with, the same examples in each update,
cropped and mirrored alike: runs differ by rounding alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..agc.clipper import Clipper
from ..agc.units import units_of
from ..layers.stochastic_depth import StochasticDepth
from ..standardize.together import formula_only
from .augmentation import FLIP, X, Y
from .building import build_model, calibrated_model
from .data.keys import example_keys, permutation, uniforms
from .device_images import DeviceImages
from .distributed import choose_device
from .optimization import learning_rate_factor, parameter_groups
from .recipe import Recipe

_WARM_UP = 2  # steps before a graph is captured, in which libraries choose their kernels
_CALIBRATION_IMAGES, _EVALUATED_AT_ONCE, _QUEUED = 128, 1000, 200


@dataclass(frozen=True)
class Trained:
    """What came of one network: accuracy in percent and loss on validation images; a loss of NaN where it diverged."""

    top1: float
    loss: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


def train_side_by_side(recipes: Sequence[Recipe], say: Callable[[str], None] = print) -> list[Trained]:
    """Trains every recipe's network, all at the same time.

    Args:
        recipes: with the same data and device. Padded crops or none, mirror images, label smoothing, adaptive
            clipping and calibration are built; anything else that would change the training is refused. What changes
            its speed alone (``compile``, ``channels_last``, ``share_standardization``) is passed over, and so are logs
            and checkpoints.
        say: gets a line before and after.

    Returns:
        One result for each recipe, in their order.

    Raises:
        ValueError: there is no recipe, one asks for what is not built here, or they differ in data or device.
        DataError: data that cannot be read, or that :class:`DeviceImages` does not take.
    """
    _check(recipes)
    device = choose_device(recipes[0].device)
    images = DeviceImages(recipes[0].data, device)
    start = time.perf_counter()
    with _fastest_kernels(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        networks = [Network(recipe, images) for recipe in recipes]
        say(f"{len(networks)} networks side by side on {device.type}, {sum(n.steps for n in networks)} steps in all")
        torch.manual_seed(recipes[0].seed)
        for network in networks:
            network.prepare()
        for step in range(max(network.steps for network in networks)):
            for network in networks:
                if step < network.steps:
                    network.step()
            if step % _QUEUED == _QUEUED - 1:
                _wait(device)
        _wait(device)
        results = [network.evaluated() for network in networks]
        del networks, network  # and with them graphs that know the random state which is put back now
    say(f"{len(results)} networks: {time.perf_counter() - start:.0f} s")
    return results


def _check(recipes: Sequence[Recipe]) -> None:
    if not recipes:
        raise ValueError("recipes: there is none")
    first = recipes[0]
    for recipe in recipes:
        augmentation = recipe.augmentation
        refused = {
            "augmentation.crop": augmentation.crop == "random_resized",
            "augmentation.randaugment_operations": augmentation.randaugment_operations > 0,
            "augmentation.mixup": augmentation.mixup > 0,
            "augmentation.cutmix": augmentation.cutmix > 0,
            "microbatch_size": recipe.microbatch_size not in (None, recipe.batch_size),
            "ema_decay": recipe.ema_decay is not None,
            "optimizer.clip_norm": recipe.optimizer.clip_norm is not None,
            "model.recompute": recipe.model.recompute,
            "model.weights": recipe.model.weights is not None,
        }
        for key, is_wanted in refused.items():
            if is_wanted:
                raise ValueError(f"{key}: networks that are trained side by side cannot have it")
        if (recipe.data, recipe.device) != (first.data, first.device):
            raise ValueError("data, device: networks that are trained side by side need the same")


def _check_model(model: nn.Module, images: DeviceImages) -> None:
    for module in model.modules():
        dropped = module.rate if isinstance(module, StochasticDepth) else getattr(module, "p", 0.0)
        if isinstance(module, (StochasticDepth, nn.modules.dropout._DropoutNd)) and dropped:
            raise ValueError("model: networks that are trained side by side cannot have dropout or stochastic depth")
    if not images.suit(model):
        raise ValueError("model: it wants its images sized, resized or normalised otherwise than they are")


@contextlib.contextmanager
def _fastest_kernels() -> Iterator[None]:
    """cuDNN tries which of its kernels is the fastest, as shapes stay the same."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Network:
    """One network in training: everything that a step reads or changes has its place on the device.

    Args:
        recipe: what to train, and how.
        images: for training and validation.

    Attributes:
        steps: in the whole run.
    """

    def __init__(self, recipe: Recipe, images: DeviceImages):
        self.recipe, self.images = recipe, images
        self.device = device = images.labels.device
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, len(images.classes), images.channels)
        _check_model(model, images)
        shape = (images.channels, images.size, images.size)
        model = calibrated_model(
            model, recipe, shape, lambda: images.normalised(images.images[:_CALIBRATION_IMAGES]).cpu().contiguous()
        )
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).train()
        steps_per_epoch = len(images) // recipe.batch_size
        self.steps = max(1, round(recipe.epochs * steps_per_epoch))
        self.padding = recipe.augmentation.crop_padding if recipe.augmentation.crop == "padded" else 0
        self.rows, self.places, self.mirrored = self._draw(steps_per_epoch)
        factor = learning_rate_factor(recipe.optimizer, self.steps, steps_per_epoch)
        rates = [recipe.peak_learning_rate * factor(step) for step in range(self.steps)]
        self.rates = torch.tensor(rates, device=device)
        self.groups = parameter_groups(self.model, recipe.optimizer)
        self.parameters: list[Tensor] = [parameter for group in self.groups for parameter in group["params"]]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        clipping = recipe.clipping
        self.clipper = None if clipping is None else Clipper(units_of(self.model, "classifier"), clipping, 1e-3)
        self.done = torch.zeros(1, dtype=torch.long, device=device)  # steps, where a graph can count them
        self.graph: torch.cuda.CUDAGraph | None = None

    def _draw(self, steps_per_epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which images every step takes (steps, N), where it crops them (steps, 2, N), which it mirrors (steps, N)."""
        recipe, size = self.recipe, self.recipe.batch_size
        count = steps_per_epoch * size
        if not count:
            raise ValueError(f"batch_size: {size} is more than the {len(self.images)} training images")
        rows, drawn = [], []
        for epoch in range(math.ceil(self.steps / steps_per_epoch)):
            rows.append(permutation(len(self.images), recipe.seed, epoch)[:count])
            drawn.append(uniforms(example_keys(recipe.seed, epoch, np.arange(count)), 3))
        numbers = np.concatenate(drawn).reshape(-1, size, 3)
        places = (numbers[:, :, [Y, X]] * (2 * self.padding + 1)).astype(np.int64).transpose(0, 2, 1)
        tables = (np.concatenate(rows).reshape(-1, size), places, numbers[:, :, FLIP] < recipe.augmentation.flip)
        first, second, third = (torch.from_numpy(np.ascontiguousarray(table)).to(self.device) for table in tables)
        return first, second, third

    def prepare(self) -> None:
        """Captures the graph, on a GPU; the network is then as it was."""
        if self.device.type != "cuda":
            return
        changing = [*self.model.state_dict().values(), *self.velocities, self.done]
        before = [tensor.clone() for tensor in changing]
        self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), formula_only():  # what a graph cannot hold is not worth warming up
            for _ in range(_WARM_UP):
                self._step()
                self.done.zero_()
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
        torch.cuda.synchronize(self.device)

    def step(self) -> None:
        """One update; on a GPU it returns before that is made."""
        if self.graph is None:
            self._step()
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def _step(self) -> None:
        recipe = self.recipe
        rows, places, mirrored = (t.index_select(0, self.done)[0] for t in (self.rows, self.places, self.mirrored))
        pictures, labels = self.images.batch(rows, places, mirrored, self.padding)
        with self._autocast():
            logits = self.model(pictures)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        self._learn(torch.autograd.grad(loss, self.parameters))
        self.done.add_(1)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    @torch.no_grad()
    def _learn(self, gradients: Sequence[Tensor]) -> None:
        """Clipping, and SGD with Nesterov momentum, at the rate of this step, which the device looks up."""
        if self.clipper is not None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.clipper.clip()
            for parameter in self.parameters:
                parameter.grad = None
        rate, momentum, start = self.rates.index_select(0, self.done)[0], self.recipe.optimizer.momentum, 0
        for group in self.groups:
            parameters = group["params"]
            here = slice(start, start + len(parameters))
            start = here.stop
            changes, velocities = list(gradients[here]), self.velocities[here]
            if group["weight_decay"]:
                torch._foreach_add_(changes, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, changes)
            if self.recipe.optimizer.nesterov:
                torch._foreach_add_(changes, velocities, alpha=momentum)
            else:
                torch._foreach_copy_(changes, velocities)
            torch._foreach_mul_(changes, rate * -group["rate"])
            torch._foreach_add_(parameters, changes)

    @torch.no_grad()
    def evaluated(self) -> Trained:
        """On the validation images."""
        images, labels = self.images.validation, self.images.validation_labels
        right, loss = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.model.eval()
        for some, wanted in zip(images.split(_EVALUATED_AT_ONCE), labels.split(_EVALUATED_AT_ONCE), strict=True):
            with self._autocast():
                logits = self.model(self.images.normalised(some)).float()
            right += (logits.argmax(1) == wanted).sum()
            loss += nn.functional.cross_entropy(logits, wanted, reduction="sum")
        self.model.train()
        return Trained(100.0 * float(right) / len(labels), float(loss) / len(labels))
