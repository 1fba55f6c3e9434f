"""`center`: biases that give every channel a mean of zero on data, as BatchNorm has it at its first batch.

A standardized weight sends a constant to zero, so that channels start centred where the inputs of a layer are all
alike: on white noise, inside the map. On photographs, and at the borders, they do not. A bias of −μ, with μ the
channel's mean over the data, takes the rest away, at no cost when the network runs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers.scaled_weight import ScaledWeight
from ..signal.batches import batches_of, call, to_model
from ..signal.moments import ChannelMoments
from ..signal.undisturbed import plain_module, undisturbed

Model = TypeVar("Model", bound=nn.Module)


def center(model: Model, inputs: Any, *, max_batches: int | None = None) -> Model:
    """A copy of a normaliser-free model whose layers' output channels have a mean of zero on data.

    Every layer of this library that has a bias gets one of −μ (before ``output_scale``: α and the skip gain), in the
    order of execution, with μ the channel's mean over batch and positions when the layers before it are centred
    already. Gains and weights stay. Data-dependent biases as in Salimans & Kingma 2016, without their division by
    the deviation. In short CIFAR-10 runs it was worth about half a point at the rates that are best, and made higher
    ones worse (docs/results.md).

    Args:
        model: any module with layers of this library; left as it is.
        inputs: a tensor or an iterable of batches, as :func:`normfree.spp` takes. One large batch is exact; over
            several, every layer sees the ones before it centred by the batches so far.
        max_batches: stop after so many.

    Returns:
        The centred copy.

    Raises:
        ValueError: no layer that could be centred, or inputs without a batch.
    """
    model = copy.deepcopy(model)
    plain = plain_module(model)
    layers: dict[str, Any] = {
        path: m for path, m in plain.named_modules() if isinstance(m, ScaledWeight) and m.bias is not None
    }
    if not layers:
        raise ValueError("model: it has no layer of normfree with a bias; convert it first")
    means: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(_centring(path, means, {}), with_kwargs=True) for path, m in layers.items()]
    try:
        with undisturbed(plain, "batch"), torch.no_grad():
            for batch in itertools.islice(batches_of(inputs), max_batches):
                call(model, to_model(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    if not means:
        raise ValueError("inputs: no batch reached a layer of the model")
    with torch.no_grad():
        for path, mean in means.items():
            layers[path].bias.sub_(mean.to(layers[path].bias))
    return model


def _centring(path: str, means: dict[str, Tensor], moments: dict[str, ChannelMoments]) -> Callable[..., Tensor]:
    """A hook that takes the mean of everything seen so far from a layer's output."""

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        scale = kwargs.get("output_scale")
        unscaled = output if scale is None else module.forward(*args, **{**kwargs, "output_scale": None})
        axis = unscaled.ndim - (1 if isinstance(module, nn.Linear) else module.weight.ndim - 1)
        new = ChannelMoments.of(unscaled, axis)
        moments[path] = moments[path].merge(new) if path in moments else new
        means[path] = moments[path].mean
        shape = [1] * output.ndim
        shape[axis] = -1
        shift = means[path].to(output).view(shape)
        return output - (shift if scale is None else shift * scale)

    return hook
