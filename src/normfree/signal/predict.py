"""`predict_spp`: the signal propagation that the theory of wide networks expects, before anything runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .graph import Node, is_mutable, name_of, tensors_in
from .measure import _default_label, _plain_module, _points, _undisturbed, spp
from .moments import ChannelMoments
from .propagation import SignalPoint, SignalPropagation
from .record import TraceResult
from .scalars import scalar_value
from .shapes import shape_of_result
from .theory.pointwise import is_elementwise, pointwise
from .theory.rules import Call, Flow, NoRule, regrid, rule_of
from .theory.state import State
from .theory.weights import declares_weight
from .trace import Trace

NormStatistics = Literal["batch", "running"]


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
    plain = _plain_module(model)
    _check_weights(plain)
    name = label or f"{_default_label(model)} (predicted)"
    try:
        trace = propagate(plain, shape, input, channel_axis, norm_statistics, backward)
    except PredictionError as error:
        if not fallback or any(parameter.is_meta for parameter in plain.parameters()):
            raise
        measured = spp(plain, torch.randn(shape, generator=torch.Generator().manual_seed(0)), label=label or
                       f"{_default_label(model)} (measured)", channel_axis=channel_axis,
                       norm_statistics=norm_statistics, backward=backward)  # fmt: skip
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
        _undisturbed(model, norm_statistics),
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


@dataclass(frozen=True)
class _Energy:
    """Σ g² over all elements; and what is left of it after averaging g over the positions of each example, which is
    all of it behind a global average, and over examples, too: the channel means that a plot shows."""

    total: float = 0.0
    coherent: float = 0.0
    common: float = 0.0

    def __add__(self, other: _Energy) -> _Energy:
        return _Energy(self.total + other.total, self.coherent + other.coherent, self.common + other.common)

    def through(self, flow: Flow, positions: int, examples: int) -> _Energy:
        """What reaches the input of one operator."""
        spread = (1.0 - flow.coherence) * self.total / positions if flow.fresh else 0.0
        coherent = flow.coherence * self.coherent + spread
        common = 0.0 if flow.centred else flow.coherence * self.common + spread / examples
        return _Energy(flow.factor * self.total, flow.factor * coherent, flow.factor * common)


class PredictedTrace(Trace):
    """Watches a forward pass on the ``meta`` device and propagates statistics along with it."""

    def __init__(
        self,
        model: nn.Module,
        channel_axis: int | None = None,
        layers: bool = False,
        gradients: bool = False,
        examples: int = 1,
    ):
        super().__init__(model, channel_axis, layers, gradients)
        self.examples = examples
        self.notes: list[str] = []
        self._modules_by_path = dict(model.named_modules())
        self._scales: dict[str, float] = {}
        self._gaps: list[tuple[int, str]] = []
        self._flows: list[tuple[Node, list[tuple[Node, Flow]]]] = []
        self._wanted: list[tuple[Any, str, Node]] = []
        self._nodes_of_points: dict[int, Node] = {}

    def watch(self, tensor: Tensor, state: State) -> None:
        """Declares the input and its statistics."""
        self.watch_inputs(tensor)
        node = self._graph.node(tensor)
        assert node is not None
        node.state = state

    def place(self) -> str:
        """Where the forward pass is, in words."""
        return f"module {self.module_path!r}" if self.module_path else "the model's own forward"

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """As in a measurement; and layers that declare their weight, and have none, are spared computing it."""
        spared = [m for m in self._modules_by_path.values() if declares_weight(m) and m.weight.is_meta]
        for module in spared:
            module.__dict__["effective_weight"] = lambda output_scale=None, weight=module.weight: weight
        try:
            with super().hooks():
                yield
        finally:
            for module in spared:
                del module.__dict__["effective_weight"]

    def _enter(self, path: str) -> Callable[..., None]:
        hook = super()._enter(path)

        def with_scale(module: nn.Module, args: Any, kwargs: Any) -> None:
            scale = kwargs.get("output_scale")
            value = None if scale is None else scalar_value(scale, self._graph)
            self._scales[path] = 1.0 if value is None else value
            hook(module, args, kwargs)

        return with_scale

    # ---------------------------------------------------------------- running without values

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Parameters meet activations as shapes only; what parameters alone make of themselves is computed."""
        if not any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        known = shape_of_result(func, args, kwargs)
        if known is not None:
            return known
        return func(*(_on_meta(value) for value in args), **{key: _on_meta(value) for key, value in kwargs.items()})

    def _without_output_scale(self, module: nn.Module, args: Any, kwargs: Any, node: Node) -> ChannelMoments:
        unscaled = module.forward(*args, **{**kwargs, "output_scale": None})
        return self._moments(unscaled, self._axis(unscaled, node))

    def _record(
        self,
        func: Any,
        operation: str,
        args: Any,
        kwargs: Any,
        inputs: list[tuple[Tensor, Node]],
        result: Any,
        unscaled: Any,
    ) -> None:
        tensor = next(tensors_in(result), None)
        is_view = tensor is not None and not is_mutable(func) and self._graph.node(tensor) is not None
        outcome = None
        if tensor is not None and not is_view:
            outcome = self._predict(func, args, kwargs, inputs, tensor)
        super()._record(func, operation, args, kwargs, inputs, result, unscaled)
        if outcome is None or tensor is None:
            return
        node = self._graph.node(tensor)
        if node is not None:
            node.state, flows, gap = outcome
            self._flows.append((node, flows))
            if gap:
                self._gaps.append((node.index, operation.removeprefix("aten::")))

    def _predict(
        self, func: Any, args: Any, kwargs: Any, inputs: list[tuple[Tensor, Node]], result: Tensor
    ) -> tuple[State | None, list[tuple[Node, Flow]], bool]:
        call = Call(
            func,
            args,
            kwargs,
            result,
            self.examples,
            self._modules_by_path.get(self._stack[-1].path) if self._stack else None,
            self._scales.get(self._stack[-1].path, 1.0) if self._stack else 1.0,
            self._state_of,
            lambda tensor: self._axis(tensor, self._graph.node(tensor)),
            self._gradients,
        )
        rule = rule_of(func) or (pointwise if is_elementwise(func) else None)
        gap = False
        try:
            if rule is None:
                raise NoRule("there is no rule for it")
            state: State | None = rule(call)
        except NoRule as error:
            gap = True
            state = next((node.state for _, node in inputs if node.state is not None), None)
            where = f" in {self._stack[-1].path}" if self._stack and self._stack[-1].path else ""
            self.note(f"{name_of(func).removeprefix('aten::')}{where}: {error}; passed through")
        flows = [(node, flow) for flow in call.flows if (node := self._graph.node(flow.tensor)) is not None]
        return state, flows, gap

    def note(self, note: str) -> None:
        """Adds a note to the prediction, once."""
        if note not in self.notes:
            self.notes.append(note)

    def _state_of(self, tensor: Tensor) -> State | None:
        node = self._graph.node(tensor)
        return None if node is None else node.state

    # ---------------------------------------------------------------- reading off

    def _moments(self, tensor: Tensor, axis: int) -> ChannelMoments:
        """What the theory says the moments are, as those of two channels that have them on average."""
        node = self._graph.node(tensor)
        state = None if node is None else node.state
        if state is None:
            return _moments_of(float("nan"), float("nan"))
        sizes = tuple(n for place, n in enumerate(tensor.shape) if place not in (0, axis % tensor.ndim))
        if torch.Size(sizes).numel() != state.grid.positions:  # positions that became channels, or of which one is left
            state = regrid(state, sizes)
        return _moments_of(*state.statistics(self.examples))

    def _want_gradient(self, tensor: Tensor, holder: Any, attribute: str, axis: int) -> None:
        node = self._graph.node(tensor)
        if node is None:
            return
        self._nodes_of_points[id(holder)] = node
        if self._gradients:
            self._wanted.append((holder, attribute, node))

    def propagate_back(self, output: Any) -> None:
        """Sends the energy of the gradient of Σ output · z back along the flows.

        With E the sum over elements of the expected squared gradient, a linear layer hands on Σ_ct W_oct² of E, an
        elementwise function E[f'(x)²] of it, an addition all of it to both sides.
        """
        if not self._gradients:
            return
        energies: dict[Node, _Energy] = {}
        for tensor in tensors_in(output if not isinstance(output, Mapping) else dict(output)):
            node = self._graph.node(tensor)
            if node is not None and tensor.is_floating_point():
                count, positions = float(tensor.numel()), max(_positions(node), 1)
                energies[node] = _Energy(count, count / positions, count / positions / self.examples)
        for node, flows in reversed(self._flows):
            for source, flow in flows:
                if node in energies:
                    share = energies[node].through(flow, max(_positions(source), 1), self.examples)
                    energies[source] = energies.get(source, _Energy()) + share
        for holder, attribute, node in self._wanted:
            energy = energies.get(node, _Energy())
            count = float(max(1, torch.Size(node.shape).numel()))
            squared_mean = energy.common / count
            setattr(holder, attribute, _moments_of(squared_mean, max(energy.total / count - squared_mean, 0.0)))

    def points(self) -> tuple[SignalPoint, ...]:
        """As :func:`normfree.spp` has them, with the operators that had no rule since the point before."""
        result = self.result
        points = _points(result)
        nodes = self._point_nodes(result)
        marked, done = [], -1
        for point, node in zip(points, nodes, strict=True):
            names = []
            if node is not None:
                names = [name for index, name in self._gaps if done < index and node.ancestors >> index & 1]
                done = node.index
            marked.append(_with_gap(point, ", ".join(dict.fromkeys(names))))
        return tuple(marked)

    def _point_nodes(self, result: TraceResult) -> list[Node | None]:
        if not result.merges:
            return [self._nodes_of_points.get(id(layer)) for layer in result.layers]
        return [self._nodes_of_points.get(id(result)), *(self._nodes_of_points.get(id(m)) for m in result.merges)]


def _positions(node: Node) -> int:
    return node.state.grid.positions if node.state is not None else 1


def _with_gap(point: SignalPoint, gap: str) -> SignalPoint:
    return replace(point, gap=gap) if gap else point


def _on_meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"), value)


def _moments_of(squared_mean: float, variance: float) -> ChannelMoments:
    mean = torch.tensor([squared_mean], dtype=torch.float64).sqrt()
    return ChannelMoments(1, mean, torch.tensor([variance], dtype=torch.float64))
