"""Models without weights: big tensors are never made, and what they would have been drawn from is remembered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_LARGEST_REAL = 4096
_MARK = "_declared_moments"


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is built inside has no weights in memory: tensors of more than 4096 elements are on the ``meta`` device.

    Biases, gains and scalars are real. How a weight is initialised is noted, so that
    :func:`normfree.predict_spp` knows its mean and variance::

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
            if sketch is not None and sketch.numel() > _LARGEST_REAL:
                return sketch
            return func(*args, **{**kwargs, "device": None})
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and target.is_meta:
            _note(getattr(func, "__name__", ""), target, args[1:], kwargs)
        return func(*args, **kwargs)


def _note(name: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before = declared_moments(target)
    if name == "normal_":
        mean, std = _two(args, kwargs, ("mean", "std"), (0.0, 1.0))
        moments: tuple[float, float] | None = (mean, std**2)
    elif name == "uniform_":
        low, high = _two(args, kwargs, ("from", "to"), (0.0, 1.0))
        moments = (0.5 * (low + high), (high - low) ** 2 / 12.0)
    elif name == "zero_":
        moments = (0.0, 0.0)
    elif name == "fill_" and isinstance(args[0], (int, float)):
        moments = (float(args[0]), 0.0)
    elif name == "mul_" and before is not None and isinstance(args[0], (int, float)):
        moments = (before[0] * args[0], before[1] * args[0] ** 2)
    else:
        return
    setattr(target, _MARK, moments)


def _two(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, str], defaults: tuple[float, float]
) -> tuple[float, float]:
    values = [args[i] if i < len(args) else kwargs.get(names[i], defaults[i]) for i in range(2)]
    return float(values[0]), float(values[1])
