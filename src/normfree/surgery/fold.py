"""Plain layers that hold the final weights: what is left to ship once training is over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers import EfficientChannelAttention, ScaledBranch, SqueezeExcite
from ..layers.convolution import ScaledConvNd
from ..layers.scaled_weight import ScaledWeight
from ..layers.transposed import WSConvTransposeNd
from ..standardize import Scale


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model in which every layer of this library is a plain torch layer with its final weight.

    γ, 1/β, gains and standardization are in the weights, α and the skip gain of every residual branch in the weights
    of its last layer or in its channel attention's factor. Nothing is left to compute but convolution, activation,
    addition, pooling and gating, in evaluation and in training alike. The copy reproduces the model to rounding, in
    the mode, precision and place of the model. It is not connected to it any more, and has fewer parameters
    (no gains), so that its state dict is its own.

    A layer to which another module passes ``output_scale`` (a residual branch of this library apart, whose scale is
    in the weights) becomes a subclass of torch's layer that takes it.

    Args:
        model: any module. It is not changed.

    Returns:
        The copy. Layers with SAME padding become subclasses of torch's layers.
    """
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for block in [module for module in folded.modules() if isinstance(module, ScaledBranch)]:
            _fold_branch(block)
        if isinstance(folded, ScaledWeight):
            return _plain_layer(folded)
        called = _called_with_a_scale(folded)
        replacements: dict[nn.Module, nn.Module] = {}  # a layer that is used twice stays one layer
        for module in list(folded.modules()):
            for name, child in list(module._modules.items()):  # also what occurs a second time
                if isinstance(child, ScaledWeight):
                    if child not in replacements:
                        replacements[child] = _plain_layer(child, child in called)
                    setattr(module, name, replacements[child])
    info = getattr(folded, "info", None)
    if is_dataclass(info) and not isinstance(info, type) and hasattr(info, "options"):
        folded.info = replace(cast(Any, info), name="", options={})  # create_model cannot make it again
    return folded


def _fold_branch(block: ScaledBranch) -> None:
    scale = block.output_scale()
    if scale is None:
        return
    last = block.last_layer()
    if isinstance(last, (SqueezeExcite, EfficientChannelAttention)):
        last.scale = last.scale * float(scale)
    elif isinstance(last, ScaledWeight):
        last._fold_scale = scale.detach().clone()  # type: ignore[union-attr, assignment]
    else:
        raise TypeError(f"model: cannot fold α and the skip gain into a {type(last).__name__}")
    block.skip_gain = None


def _called_with_a_scale(model: nn.Module) -> set[nn.Module]:
    """The layers in modules, and in their lists and dictionaries of modules, whose code speaks of ``output_scale``."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (ScaledBranch, ScaledWeight)) or not _speaks_of_output_scale(type(module)):
            continue
        waiting = list(module.children())
        while waiting:
            child = waiting.pop()
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                waiting += child.children()
            elif isinstance(child, ScaledWeight):
                found.add(cast(nn.Module, child))
    return found


def _speaks_of_output_scale(kind: type) -> bool:
    codes = [f.__code__ for base in kind.__mro__ for f in vars(base).values() if isinstance(f, FunctionType)]
    while codes:
        code = codes.pop()
        words = {word for c in code.co_consts for word in (c if isinstance(c, tuple) else (c,)) if type(word) is str}
        if "output_scale" in {*words, *code.co_names, *code.co_varnames}:
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False


class _SamePadding2d(ScaledConvNd, nn.Conv2d):
    """``nn.Conv2d`` that knows SAME padding at every stride, and takes ``output_scale``."""

    weight_scale = 1.0


class _SamePadding1d(ScaledConvNd, nn.Conv1d):
    weight_scale = 1.0


class _SamePadding3d(ScaledConvNd, nn.Conv3d):
    weight_scale = 1.0


_SAME = {1: _SamePadding1d, 2: _SamePadding2d, 3: _SamePadding3d}
_PLAIN: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class _TakesOutputScale:
    def forward(self, *args: Any, output_scale: Scale | None = None, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output if output_scale is None else output * output_scale


class _ScaledLinear(_TakesOutputScale, nn.Linear):
    """``nn.Linear`` that takes ``output_scale``."""


class _ScaledConvTranspose1d(_TakesOutputScale, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that takes ``output_scale``."""


class _ScaledConvTranspose2d(_TakesOutputScale, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that takes ``output_scale``."""


class _ScaledConvTranspose3d(_TakesOutputScale, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` that takes ``output_scale``."""


_SCALED_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: _ScaledConvTranspose1d,
    2: _ScaledConvTranspose2d,
    3: _ScaledConvTranspose3d,
}


class _Crop(nn.Module):
    """The first ``factors`` times the size that went into ``layer``."""

    def __init__(self, layer: nn.Module, factors: Sequence[int]):
        super().__init__()
        self.layer = layer
        self.factors = tuple(factors)

    def forward(self, input: Tensor, **scaled: Any) -> Tensor:
        output = self.layer(input, **scaled)
        for axis, factor in zip(range(-len(self.factors), 0), self.factors, strict=True):
            output = output.narrow(axis, 0, input.shape[axis] * factor)
        return cast(Tensor, output)


def _plain_layer(layer: Any, takes_scale: bool = False) -> nn.Module:
    scale = getattr(layer, "_fold_scale", None)
    weight, bias = layer.effective_weight(scale), layer.effective_bias(scale)
    with torch.device("meta"):  # nothing is initialised in vain
        plain, inner = _without_weights(layer, takes_scale)
    inner.weight = nn.Parameter(weight.detach().clone(memory_format=torch.preserve_format), layer.weight.requires_grad)
    if bias is not None:
        inner.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    return plain.train(layer.training)


def _without_weights(layer: Any, takes_scale: bool) -> tuple[nn.Module, nn.Module]:
    """The plain module, and the layer in it that holds the weights."""
    if isinstance(layer, nn.Linear):
        linear = (_ScaledLinear if takes_scale else nn.Linear)(
            layer.in_features, layer.out_features, layer.bias is not None
        )
        return linear, linear
    dims, same = len(layer.kernel_size), layer.padding == "same"
    options = {
        "stride": layer.stride,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "padding_mode": layer.padding_mode,
    }
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
    if not isinstance(layer, WSConvTransposeNd):
        conv: Any = (_SAME if same or takes_scale else _PLAIN)[dims](
            *shape, padding=0 if same else layer.padding, **options
        )
        if same:
            conv.padding = "same"
        return conv, conv
    classes = _SCALED_TRANSPOSED if takes_scale else _TRANSPOSED
    if not same:
        padded = {"padding": layer.padding, "output_padding": layer.output_padding}
        transposed = classes[dims](*shape, **padded, **options)
        return transposed, transposed
    before, missing = layer._same_padding()
    transposed = classes[dims](*shape, padding=before, output_padding=missing, **options)
    return _Crop(transposed, layer.stride), transposed
