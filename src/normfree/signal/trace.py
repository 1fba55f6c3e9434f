"""Watching one forward pass, operation by operation and call by call, and measuring the signal where it matters."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import (
    Graph,
    Node,
    channel_axis,
    channel_of_result,
    default_channel_axis,
    is_constant,
    is_mutable,
    name_of,
    operation_cost,
    tensors_in,
)
from .merging import is_only_activated, paths_to_addition
from .moments import ChannelMoments
from .record import LayerOutput, Merge, ModuleCall, TraceResult
from .scalars import about_to_be_erased, scalar_value, scale_after, without_scale

aten = torch.ops.aten

_ADDITIONS = {aten.add.Tensor, aten.add_.Tensor, aten.add.out}
# in place behind an addition, these are still part of the block: relu_(x + f(x))
_ACTIVATIONS_IN_PLACE = (
    *("relu_", "relu6_", "leaky_relu_", "elu_", "celu_", "selu_", "silu_", "gelu_", "mish_", "sigmoid_", "tanh_"),
    *("hardtanh_", "hardswish_", "hardsigmoid_", "threshold_", "clamp_", "clamp_min_", "prelu_"),
)


class Trace(TorchDispatchMode):
    """Watches what runs inside ``with``: every operation as a dispatch mode, every module call through hooks.

    Args:
        model: whose module calls give the names.
        channel_axis: of every activation, or None to find it.
        layers: measure layer outputs, not residual merges.
        gradients: measure the gradients, too, when a backward pass follows.
    """

    def __init__(
        self, model: nn.Module, channel_axis: int | None = None, layers: bool = False, gradients: bool = False
    ):
        super().__init__()
        _keep_from_compiler()
        self.result = TraceResult()
        self._model = model
        self._channel_axis = channel_axis
        self._layers = layers
        self._gradients = gradients
        self._graph = Graph()
        self._stack: list[ModuleCall] = []
        self._open: list[Merge] = []  # merges whose block has not returned yet
        self._merge_of: dict[Node, Merge] = {}
        self._tensors: dict[Node, weakref.ref[Tensor]] = {}  # until the first block is known
        self._to_hook: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._measuring = False
        self.module_path = ""  # of the call that was running last: where a failing forward pass failed

    # inputs and module calls

    def watch_inputs(self, inputs: Any) -> None:
        """Declares the tensors from which everything else descends."""
        for tensor in tensors_in(inputs):
            node = self._graph.add(tensor)
            if node is not None:
                self._tensors[node] = weakref.ref(tensor)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every module, removed at the end whatever happens."""
        handles = []
        try:
            for path, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(path), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._measuring:
                return
            self._attach_gradient_hooks()
            self.module_path = path
            tensor = None if self.result.merges else next(tensors_in((args, kwargs)), None)
            self._stack.append(ModuleCall(path, self._graph.count, tensor))

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._measuring:
                return
            self._attach_gradient_hooks()
            call = self._pop(path)
            tensor = next(tensors_in(output), None)
            scale = kwargs.get("output_scale")
            if scale is not None and tensor is not None:
                self._note_output_scale(module, args, kwargs, tensor, scale)
            if self._layers:
                self._measure_layer(path, module, tensor)
            elif call is not None:
                self._close_block(call, tensor)
            if call is not None:
                call.input = None  # nodes keep their calls, and must not keep activations through them
            self.module_path = self._stack[-1].path if self._stack else ""

        return hook

    def _pop(self, path: str) -> ModuleCall | None:
        while self._stack:  # calls whose forward raised inside the model's own try are still on the stack
            call = self._stack.pop()
            if call.path == path:
                return call
        return None

    def _note_output_scale(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor, scale: Any) -> None:
        """A layer that was called with ``output_scale`` carries that scalar in its weight."""
        node = self._graph.node(output)
        value = scalar_value(scale, self._graph)
        if node is None or value is None:
            return
        if value == 0.0:
            node.unscaled = self._without_output_scale(module, args, kwargs, node)
        node.scale *= value

    def _without_output_scale(self, module: nn.Module, args: Any, kwargs: Any, node: Node) -> ChannelMoments:
        with self._paused(), torch.no_grad():
            unscaled = module.forward(*args, **{**kwargs, "output_scale": None})
            return self._moments(unscaled, self._axis(unscaled, node))

    # operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see _keep_from_compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._measuring:
            return self._run(func, args, kwargs)
        self._attach_gradient_hooks()
        inputs = [(tensor, node) for tensor in tensors_in((args, kwargs)) if (node := self._graph.node(tensor))]
        if not inputs:
            return self._run(func, args, kwargs)
        if func is aten.copy_.default and self._graph.node(args[0]) is self._graph.node(args[1]):
            return self._run(func, args, kwargs)  # the second half of x[part] += y writes the sum to where it is
        operation = name_of(func)
        merge = None
        if func in _ADDITIONS and not self._layers:
            merge = self._find_merge(args[0], args[1])
        if is_mutable(func):
            self._before_overwriting(operation, args, kwargs)
        unscaled = self._before_scaling(func, args)
        result = self._run(func, args, kwargs)
        if not is_constant(operation):
            self._record(func, operation, args, kwargs, inputs, result, unscaled)
            if "softmax" in operation:
                self._forget_attention(inputs)
            if merge is not None:
                self._add_merge(merge, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

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
        cost: float | None = None
        for tensor in tensors_in(result):
            if not is_mutable(func) and self._graph.node(tensor) is not None:
                continue  # a view of what is known already
            if cost is None:
                cost = operation_cost(func, operation, args, kwargs, result)
            channel = channel_of_result(operation, inputs, tensor)
            node = self._graph.add(tensor, (node for _, node in inputs), cost, channel, tuple(self._stack))
            if node is None:
                continue
            node.scale, node.unscaled = scale_after(func, args, self._graph, unscaled)
            if not self.result.merges and not self._layers:
                self._tensors[node] = weakref.ref(tensor)

    def _before_scaling(self, func: Any, args: Any) -> ChannelMoments | None:
        """What a multiplication by zero is about to erase."""
        found = None if self._layers else about_to_be_erased(func, args, self._graph)
        if found is None:
            return None
        tensor, node = found
        return without_scale(self._moments(tensor, self._axis(tensor, node)), node.scale)

    def _before_overwriting(self, operation: str, args: Any, kwargs: Any) -> None:
        target = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("out")
        node = self._graph.node(target) if isinstance(target, Tensor) else None
        if node is None:
            return
        if not self.result.merges and not self._layers:
            for call in self._stack:
                if call.input is not None and call.input_moments is None and self._graph.node(call.input) is node:
                    call.input_moments = self._moments(call.input, self._axis(call.input, node))
        if operation.removeprefix("aten::") not in _ACTIVATIONS_IN_PLACE:
            for merge in self._open:
                if merge.pending is not None and self._graph.node(merge.pending) is node:
                    self._measure(merge, merge.pending)

    # merges

    def _find_merge(self, left: Any, right: Any) -> Merge | None:
        """The merge that an addition is, its branch measured; None if it is no residual merge."""
        paths = paths_to_addition(left, right, self._graph)
        if paths is None:
            return None
        # the skip path knows better: a branch may mix tokens with a linear layer, which is not its channel axis
        axis = self._axis(paths.skip, paths.skip_node, self._known_axis(paths.branch, paths.branch_node))
        residual = self._residual(paths.branch, paths.branch_node, axis)
        block = paths.block(self._stack)
        for merge in self._open:
            if merge.block is block and merge.pending is not None:
                self._measure(merge, merge.pending)
        if not self.result.merges:
            self._measure_stem(block, paths.shared, paths.skip, axis)
        return Merge(
            block,
            paths.branch_path(block),
            paths.is_identity(axis),
            tuple(paths.branch.shape),
            residual,
            paths.branch_node,
            axis,
        )

    def _residual(self, branch: Tensor, node: Node, axis: int) -> ChannelMoments:
        """The branch before the scalars that it was multiplied with."""
        scale = node.scale
        if scale == 0.0 and node.unscaled is not None:
            return node.unscaled
        moments = self._moments(branch, axis)
        return moments if scale in (0.0, 1.0) else without_scale(moments, scale)

    def _add_merge(self, merge: Merge, result: Tensor) -> None:
        node = self._graph.node(result)
        if node is None:
            return
        merge.node = node
        node.channel = (result.shape[merge.axis], result.stride(merge.axis))
        self._merge_of[node] = merge
        self.result.merges.append(merge)
        self._tensors.clear()
        for call in self._stack:
            call.input = None
        if merge.block is None:
            self._measure(merge, result)
        else:
            merge.pending = result
            self._open.append(merge)

    def _close_block(self, call: ModuleCall, output: Tensor | None) -> None:
        mine = [merge for merge in self._open if merge.block is call]
        self._open = [merge for merge in self._open if merge.block is not call]
        for merge in mine:
            if merge.pending is None:
                continue
            is_output = merge is mine[-1] and output is not None and self._only_activated(merge, output)
            self._measure(merge, output if is_output and output is not None else merge.pending)

    def _only_activated(self, merge: Merge, output: Tensor) -> bool:
        """Whether a block's output is its merge, but for activations and normalisation."""
        node = self._graph.node(output)
        return node is not None and tuple(output.shape) == merge.shape and is_only_activated(node, merge.node)

    def _forget_attention(self, inputs: list[tuple[Tensor, Node]]) -> None:
        """Scores that go straight into a softmax are attention logits, whatever was added to them."""
        for _, node in inputs:
            merge = self._merge_of.get(node)
            if merge is not None:
                self.result.merges.remove(merge)
                if merge in self._open:
                    self._open.remove(merge)

    # measuring

    def _measure(self, merge: Merge, tensor: Tensor) -> None:
        axis = self._axis(tensor, self._graph.node(tensor), merge.axis)
        merge.moments, merge.axis, merge.shape, merge.pending = (
            self._moments(tensor, axis),
            axis,
            tuple(tensor.shape),
            None,
        )
        self._want_gradient(tensor, merge, "gradient", axis)

    def _measure_stem(self, block: ModuleCall | None, shared: int, skip: Tensor, axis: int) -> None:
        result = self.result
        tensor = block.input if block is not None else None
        node = self._graph.node(tensor) if tensor is not None else None
        if block is not None and (block.input_moments is not None or (node and shared >> node.index & 1)):
            result.stem_path = block.path
            if block.input_moments is not None:
                result.stem_moments = block.input_moments
                result.stem_shape = tuple(tensor.shape) if tensor is not None else ()
                return
        else:
            alive = {node.index: ref() for node, ref in self._tensors.items() if shared >> node.index & 1}
            latest = max((index for index, value in alive.items() if value is not None), default=None)
            tensor = skip if latest is None else alive[latest]
        assert tensor is not None
        axis = self._axis(tensor, self._graph.node(tensor), axis if tensor.ndim == skip.ndim else None)
        result.stem_moments, result.stem_shape = self._moments(tensor, axis), tuple(tensor.shape)
        self._want_gradient(tensor, result, "stem_gradient", axis)

    def _measure_layer(self, path: str, module: nn.Module, output: Tensor | None) -> None:
        has_weight = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        is_layer = has_weight and (path != "" or not any(True for _ in module.children()))
        if not is_layer or output is None or not output.is_floating_point() or output.ndim < 2:
            return
        axis = self._axis(output, self._graph.node(output))
        layer = LayerOutput(path, tuple(output.shape), axis, self._moments(output, axis))
        self.result.layers.append(layer)
        self._want_gradient(output, layer, "gradient", axis)

    def _known_axis(self, tensor: Tensor, node: Node | None) -> int | None:
        if self._channel_axis is not None:
            return self._channel_axis
        return channel_axis(tensor, node)

    def _axis(self, tensor: Tensor, node: Node | None, fallback: int | None = None) -> int:
        known = self._known_axis(tensor, node)
        if known is None:
            known = default_channel_axis(tensor.ndim) if fallback is None else fallback
        if not -tensor.ndim <= known < tensor.ndim:
            raise ValueError(f"channel_axis: {known} is not an axis of an activation of shape {tuple(tensor.shape)}")
        return known

    def _moments(self, tensor: Tensor, axis: int) -> ChannelMoments:
        with self._paused(), torch.no_grad():
            return ChannelMoments.of(tensor, axis)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._measuring = self._measuring, True
        try:
            yield
        finally:
            self._measuring = before

    # gradients

    def _want_gradient(self, tensor: Tensor, holder: Any, attribute: str, axis: int) -> None:
        if not self._gradients:
            return

        def store(gradient: Tensor) -> None:
            setattr(holder, attribute, self._moments(gradient, axis))

        self._to_hook.append((tensor, store))

    def _attach_gradient_hooks(self) -> None:
        """A tensor that was met below autograd has its place in the autograd graph only by the next event."""
        if not self._to_hook:
            return
        for tensor, store in self._to_hook:
            if tensor.requires_grad:
                tensor.register_hook(store)
        self._to_hook.clear()

    def finish(self) -> None:
        """Measures what is still open when the forward pass has returned."""
        for merge in self._open:
            if merge.pending is not None:
                self._measure(merge, merge.pending)
        self._open.clear()
        self._attach_gradient_hooks()
        self._tensors.clear()


def _keep_from_compiler() -> None:
    """Keeps :mod:`torch.compile` from compiling the watching itself, where it is in use.

    A mode does so by default, at the price of importing the compiler, which takes a second.
    """
    if "torch._dynamo" in sys.modules and Trace.__torch_dispatch__ is _watch:
        Trace.__torch_dispatch__ = torch._disable_dynamo(_watch, recursive=True)  # type: ignore[method-assign]


_watch = Trace.__torch_dispatch__
