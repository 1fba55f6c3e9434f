"""Watching a forward pass without values, with the statistics that the theory gives every tensor of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .graph import Node, is_mutable, name_of, tensors_in
from .moments import ChannelMoments
from .points import points_of
from .propagation import SignalPoint
from .record import TraceResult
from .scalars import scalar_value
from .shapes import shape_of_result
from .theory.pointwise import is_elementwise, pointwise
from .theory.rules import Call, Flow, NoRule, regrid, rule_of
from .theory.state import State
from .theory.weights import declares_weight
from .trace import Trace


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

    # running without values

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

    # reading off

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
        points = points_of(result)
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
