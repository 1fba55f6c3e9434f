"""Layers whose weight carries every scalar: Scaled Weight Standardization in 1-D, 2-D and 3-D, and gating.

All of them are drop-in replacements for their ``torch.nn`` namesakes, of which they are subclasses. Two scalars can
travel in a weight:

* what stands *in front of* the layer, fixed when it is built: γ of the activation whose output it reads, and
  ``scale`` (a residual branch's 1/β, say);
* what stands *behind* it, given when it is called: ``output_scale`` (a residual branch's α and skip gain), a number
  or a tensor with one element, which multiplies the bias as well.

``layer(x, output_scale=c)`` therefore equals ``c * layer(x)`` without touching an activation map. The keyword is
also what lets :func:`normfree.spp` report a residual branch before α and the skip gain.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._snapshot import Snapshot
from .activation import Activation
from .gain import GainSource, gain
from .padding import as_pad_argument, same_padding
from .standardize import (
    DEFAULT_EPS,
    EpsMode,
    Scale,
    looked_into,
    standardize_transposed_weight,
    standardize_weight,
)
from .together import Request, may_launch, standardize_together

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class _ScaledWeight:
    """A layer that applies ``weight`` times scalars. Mixed into a torch layer, in front of it."""

    weight: Any
    bias: Any
    weight_scale: float

    def _applying(self, weight: Tensor, output_scale: Scale | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def effective_weight(self, output_scale: Scale | None = None) -> Tensor:
        """The weight that the layer applies, every scalar included: the shape of ``weight``."""
        scale = self.weight_scale if output_scale is None else output_scale * self.weight_scale
        return self._scaled_weight(scale)

    def effective_bias(self, output_scale: Scale | None = None) -> Tensor | None:
        """The bias that the layer adds: (out,), or None."""
        if self.bias is None or output_scale is None:
            return self.bias
        return self.bias * output_scale

    def _scaled_weight(self, scale: Scale) -> Tensor:
        return self.weight if isinstance(scale, float) and scale == 1.0 else self.weight * scale


@dataclass(frozen=True)
class _Kept:
    """A tensor, and what it was computed from."""

    snapshot: Snapshot
    constant: float | None
    value: Tensor
    version: int  # of the value, which a caller might overwrite


_OF_THIS_MODULE = ("_kept", "_shared", "_held")
"""What a module keeps for itself: no copy, pickle or replica has it."""


class _KeepsWhatItComputes:
    """A module that keeps a tensor computed from its parameters: in evaluation its own, and one shared for a while.

    What is kept leaves with a change of mode, of device or of precision, and is neither copied nor pickled. Mixed
    into a torch module, in front of it.
    """

    training: bool
    _kept: _Kept | None = None
    _shared: SharedTensor | None = None
    _held: torch.UntypedStorage | None = None

    def _hold(self, value: Tensor) -> Tensor:
        """Holds a tensor's memory until the next one is there, which therefore finds as much memory free.

        Memory that C's allocator has given back to the system costs more to get again than a standardized weight
        costs to compute. Graphics cards have an allocator that gives nothing back.
        """
        if self.training and value.requires_grad and value.device.type == "cpu" and not looked_into():
            self.__dict__["_held"] = value.untyped_storage()  # a module's own way takes longer
        return value

    def _computed(self, sources: tuple[Tensor, ...], constant: float | None, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave before if neither the sources nor the constant have changed since."""
        if not self._may_keep(sources):
            return compute()
        kept = self._kept
        if (
            kept is not None
            and kept.constant == constant
            and kept.snapshot.is_of(*sources)
            and kept.snapshot.is_current()
            and kept.value._version == kept.version
        ):
            return kept.value
        snapshot = Snapshot.of(*sources)  # before computing: a change by another thread meanwhile is then seen
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        if type(value) is Tensor:
            self._kept = _Kept(snapshot, constant, value, value._version)
        return value

    def _may_keep(self, sources: tuple[Tensor, ...]) -> bool:
        return (
            not self.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._functorch.peek_interpreter_stack()
            and all(type(source) in (nn.Parameter, Tensor) and not source.is_inference() for source in sources)
            and isinstance(sources[0], nn.Parameter)
        )

    def train(self, mode: bool = True) -> Self:
        self._kept = self._held = None
        return super().train(mode)  # type: ignore[misc, no-any-return]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = self._held = None
        return super()._apply(*args, **kwargs)  # type: ignore[misc, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_THIS_MODULE}

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        for key in _OF_THIS_MODULE:
            replica.__dict__.pop(key, None)
        return cast(Self, replica)


class SharedTensor:
    """What :func:`normfree.shared_standardization` gives a module in place of what it would compute itself."""

    def get(self, module: Any, output_scale: Scale | None) -> Tensor | None:
        """The tensor, or None where the module has to compute its own."""
        raise NotImplementedError


class ScaledBranch(_KeepsWhatItComputes, nn.Module):
    """A block with a residual branch whose last layer is called with ``output_scale=self.output_scale()``: α · s."""

    skip_gain: nn.Parameter | None
    alpha: float

    def output_scale(self) -> Tensor | None:
        """α times the skip gain, a tensor without axes; None where the weights hold it already."""
        if self.skip_gain is None:
            return None
        if self._shared is not None:
            shared = self._shared.get(self, None)
            if shared is not None:
                return shared
        skip_gain = self.skip_gain
        return self._computed((skip_gain,), self.alpha, lambda: skip_gain * self.alpha)

    def last_layer(self) -> nn.Module:
        """The layer that applies it."""
        raise NotImplementedError


class _StandardizedWeight(_KeepsWhatItComputes, _ScaledWeight):
    """A layer that applies its weight standardized, with one learnable gain per output channel.

    In evaluation without gradients the standardized weight is kept until a parameter changes; edits that torch does
    not count (through ``.data`` or NumPy) are seen after the next ``eval()`` or ``train()``.
    """

    gain: nn.Parameter | None
    eps: float
    eps_mode: EpsMode = "floor"
    activation_name: str
    _recomputes: Callable[..., AbstractContextManager[Any]] | None = None

    def _applying(self, weight: Tensor, output_scale: Scale | None) -> AbstractContextManager[Any]:
        """For the operation that applies the effective weight."""
        if (
            self._recomputes is None
            or self._shared is not None
            or not weight.requires_grad
            or looked_into()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # checkpointing does it already
        ):
            return nullcontext()
        return self._recomputes(self, weight, output_scale)

    def _init_standardization(
        self, out: int, activation: Activation, gain_source: GainSource, scale: float, eps: float, learnable_gain: bool
    ) -> None:
        self.weight_scale = gain(activation, gain_source) * scale
        self.activation_name = activation if isinstance(activation, str) else repr(activation)
        self.eps = eps
        self.gain = None
        if learnable_gain:
            self.gain = nn.Parameter(torch.ones(out, device=self.weight.device, dtype=self.weight.dtype))
        if self._smallest_fan_in() == 1:
            warnings.warn(
                f"{type(self).__name__}: an output unit has a fan-in of 1, and a single standardized weight is 0; "
                "use a plain layer here",
                stacklevel=4,
            )

    def effective_weight(self, output_scale: Scale | None = None) -> Tensor:
        """The weight that the layer applies, every scalar included: the shape of ``weight``."""
        if self._shared is not None:
            shared = self._shared.get(self, output_scale)
            if shared is not None:
                return shared
        sources = (self.weight,) if self.gain is None else (self.weight, self.gain)
        constant: float | None = None
        if isinstance(output_scale, Tensor):
            sources = (*sources, output_scale)
        elif output_scale is not None:
            constant = float(output_scale)
        compute = super().effective_weight
        value = self._computed(sources, constant, lambda: compute(output_scale))
        return self._hold(value) if self._recomputes is None else value

    def _scaled_weight(self, scale: Scale) -> Tensor:
        if may_launch(self.weight, self.gain, scale):
            return standardize_together([Request(self.weight, self.gain, scale, self.eps, self.eps_mode)])[0]
        return standardize_weight(self.weight, self.gain, scale, self.eps, self.eps_mode)

    def declared_weight(self) -> tuple[float, bool]:
        """Mean over outputs of the sum of squares of a row of the effective weight, and that rows sum to zero."""
        square = 1.0 if self.gain is None or self.gain.is_meta else float(self.gain.detach().double().square().mean())
        return square * self.weight_scale**2, True

    def _fan_in(self) -> int:
        return self.weight[0].numel()

    def _smallest_fan_in(self) -> int:
        return self._fan_in()

    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / fan-in), gains 1, bias 0."""
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(self._fan_in()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if getattr(self, "gain", None) is not None:  # the torch constructor calls this before there is a gain
            nn.init.ones_(cast(nn.Parameter, self.gain))

    def extra_repr(self) -> str:
        learnable = "" if self.gain is not None else ", learnable_gain=False"
        return f"{super().extra_repr()}, activation={self.activation_name}{learnable}"  # type: ignore[misc]


class _Convolution(_ScaledWeight):
    """Calls a torch convolution with the effective weight, and knows SAME padding at every stride."""

    padding: Any
    padding_mode: Any
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _init_convolution(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        *args: Any,
    ) -> None:
        # torch refuses padding="same" with a stride; here it then means what it means in TensorFlow
        init = cast(Callable[..., None], super().__init__)
        init(in_channels, out_channels, kernel_size, stride, 0 if padding == "same" else padding, *args)
        if padding == "same":
            self.padding = "same"

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        """(N, C_in, *size) to (N, C_out, *size'), as the torch layer; times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(weight, output_scale):
            return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "same":
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        dims = len(self.kernel_size)
        pads = same_padding(input.shape[-dims:], self.kernel_size, self.stride, self.dilation)
        padding: Sequence[int] = (0,) * dims
        if self.padding_mode == "zeros" and all(before == after for before, after in pads):
            padding = [before for before, _ in pads]  # the convolution pads faster than a copy does
        else:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, as_pad_argument(pads), mode=mode)
        return _CONVOLUTIONS[dims](input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ScaledConv2d(_Convolution, nn.Conv2d):
    """A plain 2-D convolution whose weight carries scalars: He initialisation, bias 0, no standardization.

    Args:
        scale: what stands in front of it.
        reads: what the weights are initialised for, ``"relu"`` (variance 2 / fan-in) or ``"linear"`` (1 / fan-in), an
            input of unit variance.
        (the others): as ``nn.Conv2d``; ``padding="same"`` also with a stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        reads: Literal["relu", "linear"] = "relu",
    ):
        self._reads = reads
        self._init_convolution(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.weight_scale = scale

    def reset_parameters(self) -> None:
        """Weights from N(0, 2 / fan-in) or N(0, 1 / fan-in), bias 0."""
        nn.init.kaiming_normal_(self.weight, nonlinearity=self._reads)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def declared_weight(self) -> tuple[float, bool]:
        """Expected sum of squares of a row of the effective weight, as initialised; rows do not sum to zero."""
        return (2.0 if self._reads == "relu" else 1.0) * self.weight_scale**2, False


class _WSConv(_StandardizedWeight, _Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        eps_mode: EpsMode = "floor",
        learnable_gain: bool = True,
    ):
        self._init_convolution(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_standardization(out_channels, activation, gain_source, scale, eps, learnable_gain)
        self.eps_mode = eps_mode


_WSCONV_DOC = """A {dims}-D convolution with Scaled Weight Standardization (Brock et al. 2021, section 4.2).

    Takes the arguments of ``nn.Conv{dims}d`` and is one. The fan-in of an output channel is every weight that it has:
    the channels of its group times the kernel taps. Weights start from N(0, 1 / fan-in), gains at 1, the bias at 0.

    In evaluation without gradients the standardized weight is kept until a parameter changes. Writes that torch does
    not count, through ``.data``, NumPy or DLPack, are seen after the next ``eval()`` or ``train()``.

    Args:
        padding: as in torch; ``"same"`` also with a stride, then as TensorFlow pads.
        activation: the activation whose output this layer reads; the weight carries its γ. None for a layer that
            reads no activation, such as a stem.
        gain_source: ``"exact"`` or ``"published"`` γ, see :func:`normfree.gain`.
        scale: a further scalar in front of the layer.
        eps: lower bound on fan-in · variance of an output channel's weights.
        eps_mode: ``"added"`` adds ``eps`` to the variance instead, as timm does.
        learnable_gain: one learnable factor per output channel; False leaves it out.

    Shape:
        (N, in_channels, *size) or (in_channels, *size) to (N, out_channels, *size') or (out_channels, *size').

    Raises:
        ValueError: as the torch layer, and as :func:`normfree.gain` for the activation.
    """


class WSConv1d(_WSConv, nn.Conv1d):
    __doc__ = _WSCONV_DOC.format(dims=1)


class WSConv2d(_WSConv, nn.Conv2d):
    __doc__ = _WSCONV_DOC.format(dims=2)


class WSConv3d(_WSConv, nn.Conv3d):
    __doc__ = _WSCONV_DOC.format(dims=3)


class _WSConvTranspose(_StandardizedWeight):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        learnable_gain: bool = True,
    ):
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"padding: expected numbers or 'same', got {padding!r}")
        if padding == "same" and any(self._tuple(output_padding)):
            raise ValueError("output_padding: padding='same' fixes the output size, so it must be 0")
        init = cast(Callable[..., None], super().__init__)
        init(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if padding == "same" else padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        if padding == "same":
            self.padding = "same"
        self._init_standardization(out_channels, activation, gain_source, scale, eps, learnable_gain)

    @staticmethod
    def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) if isinstance(value, int) else tuple(value)

    def _scaled_weight(self, scale: Scale) -> Tensor:
        return standardize_transposed_weight(
            self.weight, self.gain, scale, self.eps, self.groups, self.stride, self.dilation
        )

    def _fan_in(self) -> int:
        taps = math.prod(self.kernel_size) / math.prod(self.stride)
        return max(1, round(self.in_channels // self.groups * taps))

    def _smallest_fan_in(self) -> int:
        # with a common divisor of stride and dilation, only every so many-th phase has taps, and more of them
        steps = [s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        fewest = [max(1, taps // step) for taps, step in zip(self.kernel_size, steps, strict=True)]
        return self.in_channels // self.groups * math.prod(fewest)

    def forward(self, input: Tensor, output_size: list[int] | None = None, output_scale: Scale | None = None) -> Tensor:
        """(N, C_in, *size) to (N, C_out, *size'), as the torch layer; times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(weight, output_scale):
            return self._apply_transposed(input, weight, bias, output_size)

    def _apply_transposed(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
    ) -> Tensor:
        dims = len(self.kernel_size)
        transposed = _TRANSPOSED[dims]
        if self.padding != "same":
            output_padding = self._output_padding(  # type: ignore[attr-defined]
                input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
            )
            return transposed(
                input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        if output_size is not None:
            raise ValueError("output_size: padding='same' fixes the output size at input size times stride")
        before, missing = self._same_padding()
        output = transposed(input, weight, bias, self.stride, before, missing, self.groups, self.dilation)
        for axis, step in zip(range(-dims, 0), self.stride, strict=True):
            output = output.narrow(axis, 0, input.shape[axis] * step)
        return output

    def _same_padding(self) -> tuple[list[int], list[int]]:
        """What is cut off in front, and added behind: the mirror image of a SAME convolution on the output's size."""
        reach = [spread * (taps - 1) + 1 for taps, spread in zip(self.kernel_size, self.dilation, strict=True)]
        surplus = [extent - step for extent, step in zip(reach, self.stride, strict=True)]
        return [max(extra, 0) // 2 for extra in surplus], [max(-extra, 0) for extra in surplus]


_WSCONV_TRANSPOSE_DOC = """A transposed {dims}-D convolution with Scaled Weight Standardization.

    Takes the arguments of ``nn.ConvTranspose{dims}d`` and is one. The fan-in of an output element is the input
    channels of its group times the kernel taps that reach it, which with a stride are only those of its phase; see
    :func:`normfree.standardize.standardize_transposed_weight`. Evaluation keeps weights as in :class:`WSConv{dims}d`.

    Args:
        padding: numbers as in torch, or ``"same"`` for an output of exactly input size times stride.
        activation, gain_source, scale, eps, learnable_gain: as :class:`WSConv{dims}d`.

    Shape:
        (N, in_channels, *size) to (N, out_channels, *size').

    Raises:
        ValueError: as the torch layer, and as :func:`normfree.gain` for the activation.
    """


class WSConvTranspose1d(_WSConvTranspose, nn.ConvTranspose1d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=1)


class WSConvTranspose2d(_WSConvTranspose, nn.ConvTranspose2d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=2)


class WSConvTranspose3d(_WSConvTranspose, nn.ConvTranspose3d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=3)


class WSLinear(_StandardizedWeight, nn.Linear):
    """A linear layer with Scaled Weight Standardization; the fan-in is ``in_features``.

    Takes the arguments of ``nn.Linear`` and is one.

    In evaluation without gradients the standardized weight is kept until a parameter changes. Writes that torch does
    not count, through ``.data``, NumPy or DLPack, are seen after the next ``eval()`` or ``train()``.

    Args:
        activation, gain_source, scale, eps, learnable_gain: as :class:`WSConv2d`.

    Shape:
        (*, in_features) to (*, out_features).

    Raises:
        ValueError: as :func:`normfree.gain` for the activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        learnable_gain: bool = True,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_standardization(out_features, activation, gain_source, scale, eps, learnable_gain)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        """(*, in_features) to (*, out_features); times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(weight, output_scale):
            return F.linear(input, weight, bias)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018) whose tiny gate carries every scalar.

    The gate is mean over space, linear, ReLU, linear, sigmoid; in normaliser-free networks it is doubled to undo the
    sigmoid's halving (Brock et al. 2021, appendix).

    Args:
        channels: of the input and the output.
        ratio: hidden width = max(1, int(channels · ratio)).
        scale: factor on the gate.
        hidden: the hidden width itself, in place of the ratio.

    Shape:
        (N, channels, *size) to the same.
    """

    def __init__(self, channels: int, ratio: float = 0.25, scale: float = 2.0, hidden: int | None = None):
        super().__init__()
        if not ratio > 0:
            raise ValueError(f"ratio: expected a positive number, got {ratio}")
        hidden = max(1, int(channels * ratio)) if hidden is None else hidden
        self.scale = scale
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        for linear in (self.reduce, self.expand):
            std = 1.0 / math.sqrt(linear.in_features)
            nn.init.trunc_normal_(linear.weight, std=std, a=-2.0 * std, b=2.0 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        spatial = tuple(range(2, input.ndim))
        pooled = input.mean(dim=spatial) if spatial else input  # torch takes no axis for all of them
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))
        scale = self.scale if output_scale is None else output_scale * self.scale
        return input * (gate * scale).reshape(gate.shape + (1,) * len(spatial))


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention (Wang et al. 2020) whose tiny gate carries every scalar.

    The gate is mean over space, a 1-D convolution along the channels, sigmoid; in normaliser-free networks it is
    doubled, as that of :class:`SqueezeExcite`.

    Args:
        channels: of the input and the output; the kernel has about (log2(channels) + 1) / 2 taps, odd, at least 3.
        scale: factor on the gate.

    Shape:
        (N, channels, *size) to the same.
    """

    def __init__(self, channels: int, scale: float = 2.0):
        super().__init__()
        taps = int((math.log2(channels) + 1.0) / 2.0)
        kernel_size = max(taps if taps % 2 else taps + 1, 3)
        self.scale = scale
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        spatial = tuple(range(2, input.ndim))
        pooled = input.mean(dim=spatial) if spatial else input  # torch takes no axis for all of them
        gate = torch.sigmoid(self.conv(pooled.unsqueeze(1)).squeeze(1))
        scale = self.scale if output_scale is None else output_scale * self.scale
        return input * (gate * scale).reshape(gate.shape + (1,) * len(spatial))


class StochasticDepth(nn.Module):
    """Adds a residual branch to a shortcut, in training only for the examples that a draw per example keeps.

    Kept branches are not rescaled (Brock et al. 2021, reference implementation). Where no layer of the branch mixes
    examples, the branch is computed for the kept examples alone, which gives the same result for less work; under
    ``torch.compile`` and ``torch.func.vmap``, whose shapes may not depend on data, a mask is multiplied in instead.

    Args:
        rate: probability of dropping a branch, in [0, 1).
        batch_independent: whether the branch treats examples separately (no BatchNorm in it).
    """

    def __init__(self, rate: float, batch_independent: bool = True):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
        self.rate = rate
        self.batch_independent = batch_independent

    def forward(self, shortcut: Tensor, branch: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """``shortcut + branch(input)``; all (N, C, *size)."""
        if not self.training or self.rate == 0.0:
            return branch(input) + shortcut
        if not self.batch_independent or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
            keep = torch.rand(input.shape[0], device=input.device) >= self.rate
            return branch(input) * keep.to(input.dtype).reshape(-1, *(1,) * (input.ndim - 1)) + shortcut
        # drawn on the CPU: no device wait
        kept = (torch.rand(input.shape[0], device="cpu") >= self.rate).nonzero().squeeze(1)
        if len(kept) == input.shape[0]:
            return branch(input) + shortcut
        # the branch runs also when none is kept: its parameters then have gradient 0, not none, as optimisers and
        # distributed training expect
        kept = kept.to(input.device)
        return shortcut.index_add(0, kept, branch(input.index_select(0, kept)).to(shortcut.dtype))

    def extra_repr(self) -> str:
        return f"rate={self.rate}" + ("" if self.batch_independent else ", batch_independent=False")


__all__ = [
    "EfficientChannelAttention",
    "ScaledBranch",
    "ScaledConv2d",
    "SqueezeExcite",
    "StochasticDepth",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose1d",
    "WSConvTranspose2d",
    "WSConvTranspose3d",
    "WSLinear",
]
