"""`spp`: the signal propagation of any model, measured."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .graph import tensors_in
from .moments import ChannelMoments
from .propagation import Kind, SignalPoint, SignalPropagation
from .record import Merge, TraceResult
from .trace import Trace

NormStatistics = Literal["batch", "running"]
Batch = Any
"""A tensor; a tuple or list, whose first element is the input; or a mapping of keyword arguments."""


def spp(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any] | Iterable[Batch],
    *,
    label: str | None = None,
    channel_axis: int | None = None,
    norm_statistics: NormStatistics = "batch",
    backward: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    max_batches: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> SignalPropagation:
    """Signal Propagation Plot of any model, as it is (Brock et al. 2021, section 3).

    Watches the forward pass: an addition of two activations that descend from a common one is a residual merge, the
    operand with more computation behind it is the branch. The statistics are those of the input of the first
    residual block and of the output of every residual block; without residual merges, of every layer.

    Dropout and stochastic depth are off. The model is left exactly as it was: mode, hooks, buffers, gradients and
    the state of the random number generators, also when its forward pass raises.

    Args:
        model: any module.
        inputs: a tensor (N, ...); a mapping of keyword arguments; or an iterable of batches, each a tensor, a tuple
            or list whose first element is the input (a data loader's), or a mapping. Moved to the model's device, and
            floating-point inputs to its dtype. The statistics are those of all batches together.
        label: what to call the model in tables and legends.
        channel_axis: of every activation; found by itself if None.
        norm_statistics: BatchNorm normalises with the statistics of the ``"batch"``, as in training, or with its
            ``"running"`` ones.
        backward: measure the gradients at the same places, too.
        loss: scalar of the model's output to differentiate; by default the sum of the output's elements, each times
            an independent N(0, 1) number.
        forward: how to call the model with a batch, if not ``model(input)`` or ``model(**mapping)``.
        max_batches: stop after so many.
        on_batch: called with the number of finished batches after each.

    Returns:
        The signal; NaN and infinite activations are counted in its points, not raised.

    Raises:
        ValueError: no batches, an unknown ``norm_statistics``, a ``channel_axis`` that does not exist, a model in
            which there is nothing to measure, or one whose residual merges differ between batches.
        Exception: whatever the model's own forward pass raises, with a note that says in which module.
    """
    if norm_statistics not in ("batch", "running"):
        raise ValueError(f"norm_statistics: expected 'batch' or 'running', got {norm_statistics!r}")
    measurement = _Measurement(_plain_module(model), channel_axis, norm_statistics, backward, loss, forward)
    examples = 0
    with torch.random.fork_rng(devices=_cuda_devices(model)):  # a loader that shuffles draws a seed
        for count, batch in enumerate(itertools.islice(_batches(inputs), max_batches), start=1):
            examples += measurement.add(batch)
            if on_batch is not None:
                on_batch(count)
    if measurement.total is None:
        raise ValueError("inputs: there was no batch in them")
    return SignalPropagation(_points(measurement.total), label or _default_label(model), examples)


class _Measurement:
    """Measures batch after batch and merges the moments."""

    def __init__(
        self,
        model: nn.Module,
        channel_axis: int | None,
        norm_statistics: NormStatistics,
        backward: bool,
        loss: Callable[[Any], Tensor] | None,
        forward: Callable[[nn.Module, Batch], Any] | None,
    ):
        self.model = model
        self.channel_axis = channel_axis
        self.norm_statistics = norm_statistics
        self.backward = backward
        self.loss = loss or _random_projection
        self.forward = forward or _call
        self.total: TraceResult | None = None
        self._layers = False

    def add(self, batch: Batch) -> int:
        """Measures one batch and returns its number of examples."""
        batch = _to_model(batch, self.model)
        result = self._trace(batch)
        if not result.merges and not result.layers and self.total is None:
            self._layers = True
            result = self._trace(batch)
            if not result.layers:
                raise ValueError("model: found neither an addition of two activations nor a layer with a weight")
        self.total = result if self.total is None else _merged(self.total, result)
        first = next(tensors_in(batch), None)
        return 0 if first is None or first.ndim == 0 else len(first)

    def _trace(self, batch: Batch) -> TraceResult:
        trace = Trace(self.model, self.channel_axis, self._layers, self.backward)
        # in inference mode a dispatch mode sees convolutions whole, and tensors have no place in a backward pass
        with (
            _undisturbed(self.model, self.norm_statistics),
            torch.inference_mode(False),
            torch.set_grad_enabled(self.backward),
        ):
            if self.backward:
                batch = _with_gradient(batch)
            try:
                with trace.hooks(), trace:
                    trace.watch_inputs(batch)
                    output = self.forward(self.model, batch)
                    trace.finish()
            except Exception as error:
                where = f"in module {trace.module_path!r}" if trace.module_path else "in the model's own forward"
                error.add_note(f"spp: raised {where}")
                raise
            if self.backward:
                self._differentiate(output, batch)
        return trace.result

    def _differentiate(self, output: Any, batch: Batch) -> None:
        loss = self.loss(output)
        sources = [t for t in tensors_in(batch) if t.requires_grad]
        sources += [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not loss.requires_grad:
            raise ValueError("backward: the model's output does not depend on anything that requires a gradient")
        # the gradients themselves are thrown away: hooks on the way measured what was wanted, .grad stays untouched
        torch.autograd.grad(loss, sources[:1], allow_unused=True)


def _call(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _random_projection(output: Any) -> Tensor:
    """Σ output · z, z ~ N(0, 1) from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    terms = [
        (tensor.float() * torch.randn(tensor.shape, generator=generator).to(tensor.device)).sum()
        for tensor in tensors_in(_as_plain(output))
        if tensor.is_floating_point()
    ]
    if not terms:
        raise ValueError("loss: the model's output holds no floating-point tensor; give a loss")
    return torch.stack(terms).sum()


def _as_plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _batches(inputs: Any) -> Iterator[Batch]:
    if isinstance(inputs, (Tensor, Mapping)):
        return iter([inputs])
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected a tensor, a mapping or an iterable of batches, got {type(inputs).__name__}")
    return iter(inputs)


def _to_model(batch: Batch, model: nn.Module) -> Batch:
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if reference is None:
                return value
            return value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(move(item) for item in value)
        return value

    return move(batch)


def _with_gradient(batch: Batch) -> Batch:
    """The batch as leaves that require a gradient, so that a frozen model has one, too."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _with_gradient(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_with_gradient(value) for value in batch)
    return batch


def _plain_module(model: nn.Module) -> nn.Module:
    """The module inside compiled and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextlib.contextmanager
def _undisturbed(model: nn.Module, norm_statistics: NormStatistics) -> Iterator[None]:
    """Evaluation mode, BatchNorm as asked for; afterwards modes, buffers and random numbers are as before."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for module in training:  # not eval(): what modules keep between passes, and do when the mode changes, is theirs
        module.training = norm_statistics == "batch" and isinstance(module, _BatchNorm)
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation would hide a whole transformer layer
    try:
        with (
            torch.random.fork_rng(devices=_cuda_devices(model)),
            _uncompiled(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            # compared by value: BatchNorm updates its statistics without telling their version counters
            if buffer is not None and value is not None and not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Compiled modules run as they were written; where nothing is compiled, the compiler need not be imported."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})


def _merged(total: TraceResult, new: TraceResult) -> TraceResult:
    if len(total.merges) != len(new.merges) or len(total.layers) != len(new.layers):
        raise ValueError(
            f"model: it has {len(new.merges) or len(new.layers)} residual merges or layers on this batch and "
            f"{len(total.merges) or len(total.layers)} on the ones before; they must be the same on all"
        )
    total.stem_moments = _both(total.stem_moments, new.stem_moments)
    total.stem_gradient = _both(total.stem_gradient, new.stem_gradient)
    for merge, other in zip(total.merges, new.merges, strict=True):
        merge.moments = _both(merge.moments, other.moments)
        merge.residual = merge.residual.merge(other.residual)
        merge.gradient = _both(merge.gradient, other.gradient)
    for layer, other_layer in zip(total.layers, new.layers, strict=True):
        layer.moments = layer.moments.merge(other_layer.moments)
        layer.gradient = _both(layer.gradient, other_layer.gradient)
    return total


def _both(first: ChannelMoments | None, second: ChannelMoments | None) -> ChannelMoments | None:
    return first.merge(second) if first is not None and second is not None else None


def _points(result: TraceResult) -> tuple[SignalPoint, ...]:
    if not result.merges:
        names = _unique([layer.path or "model" for layer in result.layers])
        stages = _stages([layer.size for layer in result.layers], first=0)
        return tuple(
            _point(name, stage, "layer", layer.shape, layer.moments, layer.gradient)
            for name, stage, layer in zip(names, stages, result.layers, strict=True)
        )
    assert result.stem_moments is not None
    stem = _point(result.stem_path or "input", 0, "stem", result.stem_shape, result.stem_moments, result.stem_gradient)
    names = _unique(_merge_names(result.merges))
    stages = _stages([merge.size for merge in result.merges], first=1)
    blocks = []
    for name, stage, merge in zip(names, stages, result.merges, strict=True):
        kind: Kind = "block" if merge.identity else "transition"
        assert merge.moments is not None
        blocks.append(_point(name, stage, kind, merge.shape, merge.moments, merge.gradient, merge.residual))
    return (stem, *blocks)


def _point(
    name: str,
    stage: int,
    kind: Kind,
    shape: tuple[int, ...],
    moments: ChannelMoments,
    gradient: ChannelMoments | None,
    residual: ChannelMoments | None = None,
) -> SignalPoint:
    return SignalPoint(
        name,
        stage,
        kind,
        shape,
        moments.average_squared_mean,
        moments.average_variance,
        None if residual is None else residual.average_variance,
        moments.nan_count,
        moments.inf_count,
        None if gradient is None else gradient.average_squared_mean,
        None if gradient is None else gradient.average_variance,
    )


def _merge_names(merges: Sequence[Merge]) -> list[str]:
    """A block's path for its last merge; for the others, and outside of blocks, the path of what made the branch."""
    last = {id(merge.block): index for index, merge in enumerate(merges) if merge.block is not None}
    names = []
    for index, merge in enumerate(merges):
        if merge.block is not None and last[id(merge.block)] == index:
            names.append(merge.block.path)
        else:
            names.append(merge.branch_path or (merge.block.path if merge.block is not None else "add"))
    return names


def _unique(names: Sequence[str]) -> list[str]:
    """Names that occur again, because a module is called more than once, get a number."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _stages(sizes: Sequence[tuple[int, int]], first: int) -> list[int]:
    """Stage numbers that count up where the number of channels or of elements changes."""
    stages = [first] if sizes else []
    for before, after in itertools.pairwise(sizes):
        stages.append(stages[-1] + (before != after))
    return stages


def _default_label(model: nn.Module) -> str:
    info = getattr(_plain_module(model), "info", None)
    return getattr(info, "name", "") or type(_plain_module(model)).__name__
