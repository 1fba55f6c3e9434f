"""`predict_spp`: the signal propagation that the theory of wide networks expects, before anything runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .measure import spp
from .predicted_trace import PredictedTrace
from .propagation import SignalPropagation
from .theory.rules import regrid
from .theory.state import State
from .undisturbed import NormStatistics, default_label, plain_module, undisturbed


class PredictionError(RuntimeError):
    """The model could not be followed without running it; the message says where."""


def predict_spp(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    label: str | None = None,
    input: State | None = None,
    channel_axis: int | None = None,
    norm_statistics: NormStatistics = "batch",
    backward: bool = False,
    fallback: bool = True,
) -> SignalPropagation:
    """Signal Propagation Plot of any model by mean-field theory: no activation is computed.

    The model's forward runs once on the ``meta`` device, where tensors have shapes and no elements, and statistics
    are propagated along the stream of operators: for every activation its mean over channels, its covariance between
    examples and its excess covariance between positions (:mod:`normfree.signal.theory.state`), exact in the limit of
    many channels as far as pre-activations are Gaussian. Weights enter through their second moments: of the tensors
    themselves, or, where the model is on the ``meta`` device, of the initialisation that their layers declare.
    The points are those of :func:`normfree.spp`, name by name.

    Args:
        model: any module whose forward takes one tensor. Left exactly as it was.
        input_shape: (N, C, *size). N counts: the channel means of few examples scatter.
        label: what to call the model; its own name and "(predicted)" by default.
        input: statistics of the input; white noise N(0, 1) by default.
        channel_axis, norm_statistics: as in :func:`normfree.spp`.
        backward: predict the gradients at the same places, too, for the loss Σ output · z, z ~ N(0, 1).
        fallback: if the model cannot be followed on the ``meta`` device, measure it with noise instead, and say so
            in the notes.

    Returns:
        The signal; its notes name every operator that has no rule, and ``gap`` of a point those on the way to it.
        Past such an operator the theory goes on as if it changed nothing.

    Raises:
        ValueError: an ``input_shape`` that is not (N, C, ...) or too small for the model, an unknown
            ``norm_statistics``, quantised or sparse weights, or nothing to predict.
        PredictionError: the model cannot be followed, and ``fallback`` is off or its weights have no values.
    """
    shape = _checked_shape(input_shape)
    if norm_statistics not in ("batch", "running"):
        raise ValueError(f"norm_statistics: expected 'batch' or 'running', got {norm_statistics!r}")
    plain = plain_module(model)
    _check_weights(plain)
    name = label or f"{default_label(model)} (predicted)"
    try:
        trace = propagate(plain, shape, input, channel_axis, norm_statistics, backward)
    except PredictionError as error:
        if not fallback or any(parameter.is_meta for parameter in plain.parameters()):
            raise
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        measured = spp(
            plain,
            noise,
            label=label or f"{default_label(model)} (measured)",
            channel_axis=channel_axis,
            norm_statistics=norm_statistics,
            backward=backward,
        )
        note = f"not predicted but measured with noise: {error}"
        return SignalPropagation(measured.points, measured.label, measured.examples, (*measured.notes, note))
    return SignalPropagation(trace.points(), name, shape[0], tuple(trace.notes))


def propagate(
    model: nn.Module,
    shape: tuple[int, ...],
    input: State | None = None,
    channel_axis: int | None = None,
    norm_statistics: NormStatistics = "batch",
    backward: bool = False,
    trace_type: type[PredictedTrace] | None = None,
) -> PredictedTrace:
    """Runs the model on the ``meta`` device under a :class:`PredictedTrace`, and returns that.

    Raises:
        PredictionError: the forward pass cannot run without values.
        ValueError: it cannot run with this input shape.
    """
    kind = trace_type or PredictedTrace
    trace = _run(kind(model, channel_axis, False, backward, shape[0]), model, shape, input, norm_statistics)
    if not trace.result.merges:
        trace = _run(kind(model, channel_axis, True, backward, shape[0]), model, shape, input, norm_statistics)
        if not trace.result.layers:
            raise ValueError("model: found neither an addition of two activations nor a layer with a weight")
    return trace


def _run(
    trace: PredictedTrace,
    model: nn.Module,
    shape: tuple[int, ...],
    input: State | None,
    norm_statistics: NormStatistics,
) -> PredictedTrace:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.empty(shape, device="meta", dtype=dtype)
    state = State.noise(shape[2:]) if input is None else regrid(input, shape[2:])
    with (
        _without_collection(),
        undisturbed(model, norm_statistics),
        torch.no_grad(),
        _scalars_with_values(model) as without_value,
    ):
        if without_value:
            trace.note(
                f"{len(without_value)} scalars such as {without_value[0]} are on the meta device and have no value; "
                "taken as 1, biases as 0 (build the model inside normfree.without_weights() to keep their values)"
            )
        try:
            with trace.hooks(), trace:
                trace.watch(x, state)
                output = model(x)
                trace.finish()
        except NotImplementedError as error:
            raise PredictionError(f"{trace.place()} cannot run without values: {_first_line(error)}") from error
        except Exception as error:
            if _needs_values(error):
                raise PredictionError(f"{trace.place()} cannot run without values: {_first_line(error)}") from error
            raise ValueError(
                f"input_shape: the model cannot run with {'×'.join(map(str, shape))}: {trace.place()} raised "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
    trace.propagate_back(output)
    return trace


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection for a while: every node of the graph stays until the end, and looking through all of
    them again and again is a tenth of a prediction."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def _scalars_with_values(model: nn.Module) -> Iterator[list[str]]:
    """Gives one-element parameters on the ``meta`` device a value for a while; yields their names."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    names = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.numel() == 1:
                replaced.append((module, name, parameter))
                names.append(f"{path}.{name}".removeprefix("."))
    try:
        for module, name, parameter in replaced:
            value = torch.zeros if "bias" in name else torch.ones
            module._parameters[name] = nn.Parameter(value(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        yield names
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _needs_values(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("meta", "data-dependent", "item()", "fake"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in input_shape)
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"input_shape: expected (N, C, *size) of positive numbers, got {tuple(input_shape)}")
    return shape


def _check_weights(model: nn.Module) -> None:
    for path, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.is_quantized or parameter.layout != torch.strided:
            kind = "quantised" if parameter.is_quantized else "sparse"
            raise ValueError(f"model: {path} is {kind}; the theory reads dense floating-point weights only")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ValueError(f"model: {path or 'it'} is quantised; the theory reads dense floating-point weights only")
