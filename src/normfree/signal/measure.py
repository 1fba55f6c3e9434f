"""`spp`: the signal propagation of any model, measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, batches_of, call, to_model, with_gradient
from .graph import tensors_in
from .points import points_of
from .propagation import SignalPropagation
from .record import TraceResult
from .trace import Trace
from .undisturbed import NormStatistics, cuda_devices, default_label, plain_module, undisturbed


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
    measurement = _Measurement(plain_module(model), channel_axis, norm_statistics, backward, loss, forward)
    examples = 0
    with torch.random.fork_rng(devices=cuda_devices(model)):  # a loader that shuffles draws a seed
        for count, batch in enumerate(itertools.islice(batches_of(inputs), max_batches), start=1):
            examples += measurement.add(batch)
            if on_batch is not None:
                on_batch(count)
    if measurement.total is None:
        raise ValueError("inputs: there was no batch in them")
    return SignalPropagation(points_of(measurement.total), label or default_label(model), examples)


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
        self.forward = forward or call
        self.total: TraceResult | None = None
        self._layers = False

    def add(self, batch: Batch) -> int:
        """Measures one batch and returns its number of examples."""
        batch = to_model(batch, self.model)
        result = self._trace(batch)
        if not result.merges and not result.layers and self.total is None:
            self._layers = True
            result = self._trace(batch)
            if not result.layers:
                raise ValueError("model: found neither an addition of two activations nor a layer with a weight")
        if self.total is None:
            self.total = result
        else:
            self.total.add(result)
        first = next(tensors_in(batch), None)
        return 0 if first is None or first.ndim == 0 else len(first)

    def _trace(self, batch: Batch) -> TraceResult:
        trace = Trace(self.model, self.channel_axis, self._layers, self.backward)
        # in inference mode a dispatch mode sees convolutions whole, and tensors have no place in a backward pass
        with (
            undisturbed(self.model, self.norm_statistics),
            torch.inference_mode(False),
            torch.set_grad_enabled(self.backward),
        ):
            if self.backward:
                batch = with_gradient(batch)
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
