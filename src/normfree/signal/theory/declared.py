"""Models without weights: they are never made, and what they would have been drawn from is remembered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_LARGEST_REAL = 4096
_MARK = "_declared_moments"


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is built inside has no weights in memory: they are on the ``meta`` device, like all tensors of more than
    4096 elements.

    Biases, gains and scalars, which extend along one axis at most, are real. How a weight is initialised is noted, so
    that :func:`normfree.predict_spp` knows its mean and variance::

        with nf.without_weights():
            model = nf.create_model("nf_resnet600")
        print(nf.predict_spp(model, (8, 3, 512, 512)))
    """
    with _Declaring():
        yield


def declared_moments(tensor: Tensor) -> tuple[float, float] | None:
    """Mean and variance of the distribution that a ``meta`` tensor was initialised from, if it was noted."""
    return getattr(tensor, _MARK, None)


class _Declaring(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if func in _device_constructors() and (asked is None or torch.device(asked).type == "meta"):
            # a layer's gain is made on the device of its weight
            sketch = func(*args, **{**kwargs, "device": "meta"}) if func is not torch.tensor else None
            if sketch is not None and (sketch.numel() > _LARGEST_REAL or _is_weight(sketch)):
                return sketch
            return func(*args, **{**kwargs, "device": None})
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, Tensor) and target.is_meta and _note(func, target, args[1:], kwargs):
            return target  # drawing numbers for a tensor without elements costs a second of imports
        return func(*args, **kwargs)


def _is_weight(sketch: Tensor) -> bool:
    """A small matrix or kernel is a sample, too: a prediction from it would be that of one seed."""
    return sketch.is_floating_point() and sum(size > 1 for size in sketch.shape) > 1


def _note(func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Remembers what an initialiser draws from, one of ``torch.nn.init`` or a tensor's own; False for anything else."""
    name, before = getattr(func, "__name__", ""), declared_moments(target)
    moments: tuple[float, float] | None = None
    if name.startswith(("kaiming_", "xavier_")):
        moments = (0.0, _scaled_variance(name, target, args, kwargs))
    elif name == "trunc_normal_":
        moments = _truncated(*_values(args, kwargs, (("mean", 0.0), ("std", 1.0), ("a", -2.0), ("b", 2.0))))
    elif name == "normal_":
        mean, std = _values(args, kwargs, (("mean", 0.0), ("std", 1.0)))
        moments = (mean, std**2)
    elif name == "uniform_":
        names = ("a", "b") if "a" in kwargs or "b" in kwargs else ("from", "to")
        low, high = _values(args, kwargs, ((names[0], 0.0), (names[1], 1.0)))
        moments = (0.5 * (low + high), (high - low) ** 2 / 12.0)
    elif name in ("zero_", "zeros_"):
        moments = (0.0, 0.0)
    elif name in ("fill_", "constant_"):
        (value,) = _values(args, kwargs, (("val", kwargs.get("value", 0.0)),))
        moments = (value, 0.0)
    elif name == "mul_" and before is not None and isinstance(args[0], (int, float)):
        moments = (before[0] * args[0], before[1] * args[0] ** 2)
    if moments is not None:
        setattr(target, _MARK, moments)
    return moments is not None


def _scaled_variance(name: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(target)
    if name.startswith("xavier_"):
        (gain,) = _values(args, kwargs, (("gain", 1.0),))
        return gain**2 * 2.0 / (fan_in + fan_out)
    slope = args[0] if args else kwargs.get("a", 0)
    mode = args[1] if len(args) > 1 else kwargs.get("mode", "fan_in")
    nonlinearity = args[2] if len(args) > 2 else kwargs.get("nonlinearity", "leaky_relu")
    fan = fan_in if mode == "fan_in" else fan_out
    return nn.init.calculate_gain(nonlinearity, slope) ** 2 / max(fan, 1)


def _truncated(mean: float, std: float, low: float, high: float) -> tuple[float, float]:
    """Mean and variance of N(mean, std²) between two bounds."""
    bounds = [(bound - mean) / max(std, 1e-30) for bound in (low, high)]
    density = [math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) for z in bounds]
    mass = 0.5 * (math.erf(bounds[1] / math.sqrt(2.0)) - math.erf(bounds[0] / math.sqrt(2.0)))
    if mass < 1e-12:
        return mean, std**2
    shift = (density[0] - density[1]) / mass
    variance = 1.0 + (bounds[0] * density[0] - bounds[1] * density[1]) / mass - shift**2
    return mean + std * shift, std**2 * variance


def _values(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[tuple[str, float]]) -> tuple[float, ...]:
    return tuple(
        float(args[place] if place < len(args) else kwargs.get(name, default))
        for place, (name, default) in enumerate(names)
    )
