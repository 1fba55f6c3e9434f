"""`calibrate`: gains in weight space that give every layer the signal that it was designed for.

A normaliser-free network is designed for a variance of 1 at the first block's input and at the end of every residual
branch. Zero padding on small maps, max-pooling, and average-pooled shortcuts take some of it away. Scaling a layer's
weight (its gain, where it has one) and bias by 1/√V, with V the variance that its output would have, puts it back, at
no cost when the network runs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..layers import EfficientChannelAttention, ScaledConv2d, SqueezeExcite
from ..layers.scaled_weight import ScaledWeight
from ..signal.batches import batches_of, call, to_model
from ..signal.measure import spp
from ..signal.moments import ChannelMoments
from ..signal.predict import predict_spp, propagate
from ..signal.predicted_trace import PredictedTrace
from ..signal.propagation import SignalPropagation
from ..signal.undisturbed import plain_module, undisturbed

Method = Literal["theory", "data"]
Model = TypeVar("Model", bound=nn.Module)
_EXAMPLES = 256  # for the theory, which then gives the variance over very many examples
_SMALLEST = 1e-12


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    Attributes:
        method: ``"theory"`` or ``"data"``.
        before, after: the signal, predicted or measured.
        factors: module path of every layer that was scaled → what its weight and bias were multiplied with.
        notes: what was left alone, and why.
    """

    method: Method
    before: SignalPropagation
    after: SignalPropagation
    factors: dict[str, float]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "method": self.method,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "factors": dict(self.factors),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        low, high = min(self.factors.values()), max(self.factors.values())
        head = f"{len(self.factors)} layers scaled by {low:.3g} to {high:.3g} ({self.method})"
        return "\n".join([head, *self.notes, "before:", str(self.before), "after:", str(self.after)])


def calibrate(
    model: Model,
    inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    method: Method | None = None,
    max_batches: int | None = None,
) -> Model:
    """A copy of a normaliser-free model whose block inputs and branches have the variance that they were designed for.

    Every layer of this library that carries a scaled weight is set, in the order of execution, so that its output
    has an average channel variance of 1 (before ``output_scale``: α and the skip gain); a layer in front of a gate,
    so that the gate's output has; the last one of the stem, so that the first block's input has. The skip path and
    the branches then have the variances that β was computed from. Plain torch layers are left alone.

    Args:
        model: any module with layers of this library; left as it is.
        inputs: for ``"data"``: a tensor or an iterable of batches, as :func:`normfree.spp` takes.
        input_shape: for ``"theory"``: (N, C, H, W) or (C, H, W), for white noise of that size.
        method: ``"theory"`` corrects zero padding and pooling from the shapes alone; ``"data"`` measures. By default
            what is possible: data if ``inputs`` are given.
        max_batches: stop after so many.

    Returns:
        The calibrated copy; :func:`calibrated` returns the report, too.

    Raises:
        ValueError: neither inputs nor a shape, a method without what it needs, or no layer to calibrate.
    """
    return calibrated(model, inputs, input_shape=input_shape, method=method, max_batches=max_batches)[0]


def calibrated(
    model: Model,
    inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    method: Method | None = None,
    max_batches: int | None = None,
) -> tuple[Model, CalibrationReport]:
    """As :func:`calibrate`, with the report."""
    if method is None:
        method = "data" if inputs is not None else "theory"
    if method not in ("theory", "data"):
        raise ValueError(f"method: expected 'theory' or 'data', got {method!r}")
    if method == "data" and inputs is None:
        raise ValueError("inputs: method='data' needs a tensor or batches")
    if method == "theory" and input_shape is None:
        if not isinstance(inputs, Tensor):
            raise ValueError("input_shape: method='theory' needs one, (C, H, W) or (N, C, H, W)")
        input_shape = tuple(inputs.shape)
    model = copy.deepcopy(model)
    plain = plain_module(model)
    layers = {path: module for path, module in plain.named_modules() if _is_calibrated(module)}
    if not any(isinstance(module, ScaledWeight) for module in layers.values()):
        raise ValueError("model: it has no layer of normfree whose weight carries a scale; convert it first")
    if method == "theory":
        assert input_shape is not None
        return model, _by_theory(plain, layers, tuple(input_shape))
    return model, _by_data(plain, layers, inputs, max_batches)


def _is_calibrated(module: nn.Module) -> bool:
    return isinstance(module, (ScaledWeight, SqueezeExcite, EfficientChannelAttention))


@dataclass
class _Plan:
    """Targets and, as they become known, factors."""

    layers: Mapping[str, nn.Module]
    target: dict[str, float] = field(default_factory=dict)
    variance: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    weight_before: dict[str, str] = field(default_factory=dict)

    def seen(self, path: str, variance: float) -> float:
        """Notes a layer's output variance, and returns the factor on the output that it asks for."""
        if path not in self.variance:
            self.order.append(path)
            if not isinstance(self.layers[path], ScaledWeight):
                owners = [p for p in self.order if isinstance(self.layers[p], ScaledWeight)]
                if owners:
                    self.weight_before[path] = owners[-1]
        self.variance[path] = variance
        usable = math.isfinite(variance) and variance > _SMALLEST
        return math.sqrt(self.target.get(path, 1.0) / variance) if usable else 1.0

    def factors(self) -> dict[str, float]:
        """What every weight is to be multiplied with; a gate's factor goes to the layer in front of it."""
        total: dict[str, float] = {}
        for path in self.order:
            owner = self.weight_before.get(path, path)
            if isinstance(self.layers[owner], ScaledWeight):
                total[owner] = total.get(owner, 1.0) * self.seen(path, self.variance[path])
        return total

    def aim_at_first_block(self, signal: SignalPropagation) -> None:
        """The target of the stem's last layer, from what came of its output at the first block."""
        first = signal.points[0]
        inside = f"{first.name}."
        weights = [path for path in self.order if isinstance(self.layers[path], ScaledWeight)]
        entry = next((index for index, path in enumerate(weights) if path.startswith(inside)), 0)
        if first.kind == "stem" and entry > 0 and first.avg_channel_variance > _SMALLEST:
            last = weights[entry - 1]
            self.target[last] = self.variance[last] / first.avg_channel_variance


def _by_theory(model: nn.Module, layers: Mapping[str, nn.Module], input_shape: tuple[int, ...]) -> CalibrationReport:
    shape = (_EXAMPLES, *input_shape[-3:]) if len(input_shape) in (3, 4) else input_shape
    before = predict_spp(model, shape, fallback=False)
    plan = _Plan(layers)

    class Watching(_CalibratingTrace):
        calibration = plan
        scales = False

    propagate(model, shape, trace_type=Watching)
    plan.aim_at_first_block(before)
    corrected = _Plan(layers, plan.target)

    class Scaling(_CalibratingTrace):
        calibration = corrected
        scales = True

    propagate(model, shape, trace_type=Scaling)
    factors = corrected.factors()
    _apply(layers, factors)
    return CalibrationReport("theory", before, predict_spp(model, shape, fallback=False), factors, _left_alone(model))


class _CalibratingTrace(PredictedTrace):
    """Scales the state of every layer's output as the plan asks for, so that later layers see it."""

    calibration: _Plan
    scales: bool

    def _leave(self, path: str) -> Callable[..., None]:
        hook = super()._leave(path)
        if path not in self.calibration.layers:
            return hook

        def calibrating(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            node = self._graph.node(output)
            if node is not None and node.state is not None and not self._without_scale:
                scale = self._scales.get(path, 1.0)
                moments = self._without(module, args, kwargs, output) if scale == 0.0 else None
                level = node.state.statistics(self.examples)[1] / scale**2 if moments is None else moments
                factor = self.calibration.seen(path, level)
                if self.scales:
                    node.state = node.state.scaled(factor)
            hook(module, args, kwargs, output)

        return calibrating

    _without_scale = False

    def _without(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> float:
        node = self._graph.node(output)
        assert node is not None
        self._without_scale = True
        try:
            return self._without_output_scale(module, args, kwargs, node).average_variance
        finally:
            self._without_scale = False


def _by_data(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, max_batches: int | None
) -> CalibrationReport:
    batches = inputs if isinstance(inputs, (Tensor, Mapping)) else _Replay(inputs, max_batches)
    plan = _Plan(layers)
    with _measuring(model, layers, plan, scales=False):
        before = spp(model, batches, max_batches=max_batches)
    plan.aim_at_first_block(before)
    corrected = _Plan(layers, plan.target)
    with _measuring(model, layers, corrected, scales=True), undisturbed(model, "batch"), torch.no_grad():
        for batch in itertools.islice(batches_of(batches), max_batches):
            call(model, to_model(batch, model))
    factors = corrected.factors()
    _apply(layers, factors)
    return CalibrationReport("data", before, spp(model, batches, max_batches=max_batches), factors, _left_alone(model))


class _Replay:
    """Batches that can be gone through more than once: a loader as it is, an iterator remembered."""

    def __init__(self, batches: Iterable[Any], max_batches: int | None):
        once = iter(batches) is batches
        self._batches = list(itertools.islice(batches, max_batches)) if once else batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


@contextlib.contextmanager
def _measuring(model: nn.Module, layers: Mapping[str, nn.Module], plan: _Plan, scales: bool) -> Iterator[None]:
    """Hooks that measure every layer's output over all batches so far and, if asked to, scale it at once."""
    moments: dict[str, ChannelMoments] = {}

    def hook_of(path: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            scale = kwargs.get("output_scale")
            value = 1.0 if scale is None else float(scale)
            unscaled = module.forward(*args, **{**kwargs, "output_scale": None}) if value == 0.0 else output
            axis = 1 if unscaled.ndim != 3 or not isinstance(module, nn.Linear) else unscaled.ndim - 1
            new = ChannelMoments.of(unscaled, axis)
            moments[path] = moments[path].merge(new) if path in moments else new
            square = 1.0 if value == 0.0 else value**2
            factor = plan.seen(path, moments[path].average_variance / square)
            return output * factor if scales else None

        return hook

    handles = [module.register_forward_hook(hook_of(path), with_kwargs=True) for path, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apply(layers: Mapping[str, nn.Module], factors: Mapping[str, float]) -> None:
    with torch.no_grad():
        for path, factor in factors.items():
            layer: Any = layers[path]
            if getattr(layer, "gain", None) is not None:
                layer.gain.mul_(factor)
            elif isinstance(layer, ScaledConv2d):
                layer.weight.mul_(factor)
            else:  # a standardized weight does not feel a factor; the scalar in front of it does
                layer.weight_scale = layer.weight_scale * factor
            if layer.bias is not None:
                layer.bias.mul_(factor)


def _left_alone(model: nn.Module) -> tuple[str, ...]:
    kinds = (nn.modules.conv._ConvNd,)
    plain = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    ours = {path for path, module in model.named_modules() if isinstance(module, ScaledWeight)}
    inside_gates = [
        path for path, module in model.named_modules() if isinstance(module, (SqueezeExcite, EfficientChannelAttention))
    ]
    others = [p for p in plain if p not in ours and not any(p.startswith(f"{gate}.") for gate in inside_gates)]
    return (f"{len(others)} plain convolutions were left alone, the first of them {others[0]}",) if others else ()


__all__ = ["CalibrationReport", "calibrate", "calibrated"]
