"""The computation behind every tensor of one forward pass, as far as it descends from the model's input.

A tensor is known by its storage, so views need no bookkeeping: slicing, transposing or flattening an activation
leaves it the same node. Every operation that computes something new makes a node that knows all its ancestors, as
bits of one integer, and how much computation it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

_CHANNELS_SECOND = ("convolution", "batch_norm", "group_norm", "instance_norm")
_CHANNELS_LAST = ("layer_norm", "rms_norm", "addmm", "aten::mm", "embedding", "linear")
_CONSTANT = ("_like", "aten::new_", "aten::empty")
_COMPUTES = (
    *("pool", "fft_", "attention", "transformer_encoder", "lstm", "gru", "rnn_", "unfold", "im2col"),
    *("conv", "matmul", "linear", "einsum"),  # seen whole where they are not taken apart
)


@dataclass(slots=True, eq=False)
class Node:
    """One computed tensor.

    Attributes:
        index: position in execution order.
        ancestors: bit i is set if node i is this node or lies behind it.
        parents: the nodes that it was computed from.
        cost: multiply-adds of the operation (elements, for pooling and the like); 0 for elementwise operations.
        shape: of the tensor as it was computed.
        channel: size and stride of the channel axis, if known: survives any view.
        modules: the module calls that were running, outermost first.
        scale: product of the scalars that the tensor was multiplied with since it was computed.
        unscaled: what was measured before a multiplication by zero.
        state: what the theory knows of the tensor, in a prediction.
    """

    index: int
    ancestors: int
    parents: tuple[Node, ...]
    cost: float
    shape: tuple[int, ...]
    channel: tuple[int, int] | None
    modules: tuple[Any, ...]
    scale: float = 1.0
    unscaled: Any = None
    state: Any = None


@dataclass
class Graph:
    """The nodes of one forward pass by the storage that holds them."""

    count: int = 0
    _by_storage: dict[int, tuple[StorageWeakRef, Node]] = field(default_factory=dict)

    def node(self, tensor: Tensor) -> Node | None:
        """The node of a tensor or of any view of it; None if it does not descend from the input."""
        storage = _storage(tensor)
        entry = None if storage is None else self._by_storage.get(storage._cdata)
        return None if entry is None else entry[1]

    def add(
        self,
        tensor: Tensor,
        parents: Iterable[Node] = (),
        cost: float = 0.0,
        channel: tuple[int, int] | None = None,
        modules: tuple[Any, ...] = (),
    ) -> Node | None:
        """A new node for a tensor, in place of the one that its storage had; None for tensors without storage."""
        storage = _storage(tensor)
        if storage is None:
            return None
        parents = tuple(dict.fromkeys(parents))
        ancestors = 1 << self.count
        for parent in parents:
            ancestors |= parent.ancestors
        node = Node(self.count, ancestors, parents, cost, tuple(tensor.shape), channel, modules)
        self.count += 1
        # the weak reference keeps the address from being given to another storage while this graph lives
        self._by_storage[storage._cdata] = (StorageWeakRef(storage), node)
        return node


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, opaque
        return None


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (tuple, list, dict)):
                yield from tensors_in(value)


@cache
def name_of(func: Any) -> str:
    """An operation's name, such as ``aten::add_``."""
    return func._schema.name


@cache
def is_mutable(func: Any) -> bool:
    """Whether an operation writes into one of its arguments."""
    return func._schema.is_mutable


@cache
def is_constant(operation: str) -> bool:
    """Whether an operation takes only the shape of its tensor arguments."""
    return any(part in operation for part in _CONSTANT)


@cache
def _computes(operation: str) -> bool:
    return not operation.startswith(("aten::", "prims::")) or any(part in operation for part in _COMPUTES)


def operation_cost(func: Any, operation: str, args: Any, kwargs: Any, result: Any) -> float:
    """Multiply-adds of an operation, 0 for elementwise ones."""
    if operation == "aten::convolution":  # what flop_registry says, without its detour through shapes
        weight, transposed = args[1], args[6]
        return (args[0] if transposed else result).numel() * weight.numel() / weight.shape[0]
    counter = flop_registry.get(func._overloadpacket)
    if counter is not None:
        return counter(*args, **kwargs, out_val=result) / 2.0
    if _computes(operation):
        return float(sum(tensor.numel() for tensor in tensors_in(result)))
    return 0.0


def channel_axis(tensor: Tensor, node: Node | None) -> int | None:
    """Which axis of a tensor holds its channels, from what its node knows; None if that is nothing."""
    if node is None or node.channel is None:
        return None
    size, stride = node.channel
    for axis in range(tensor.ndim):
        if tensor.shape[axis] == size and tensor.stride(axis) == stride:
            return axis
    return None


def default_channel_axis(ndim: int) -> int:
    """(N, tokens, features) has its channels last, everything else second."""
    return ndim - 1 if ndim in (1, 3) else 1


@cache
def _channel_place(operation: str) -> Literal["second", "last"] | None:
    if any(part in operation for part in _CHANNELS_SECOND):
        return "second"
    return "last" if any(part in operation for part in _CHANNELS_LAST) else None


def channel_of_result(operation: str, inputs: Iterable[tuple[Tensor, Node]], result: Tensor) -> tuple[int, int] | None:
    """Size and stride of the channel axis of a new tensor."""
    axis: int | None = None
    place = _channel_place(operation)
    if place == "second" and result.ndim >= 2:
        axis = 1
    elif place == "last":
        axis = result.ndim - 1
    else:
        for tensor, node in inputs:
            if tensor.ndim == result.ndim:
                axis = channel_axis(tensor, node)
                if axis is not None:
                    break
    return None if axis is None or axis < 0 else (result.shape[axis], result.stride(axis))


def lightest_path(node: Node, source: int) -> float:
    """The least computation between the nodes in ``source`` (bits) and a node: 0 if it is one of them.

    The shortest way counts, not the sum: behind x + f(x) lies nothing, because x went straight through.
    """
    if source >> node.index & 1:
        return 0.0
    best: dict[Node, float] = {}
    stack = [node]
    while stack:
        top = stack[-1]
        if top in best:
            stack.pop()
            continue
        between = [parent for parent in top.parents if not source >> parent.index & 1]
        missing = [parent for parent in between if parent not in best]
        if missing:
            stack.extend(missing)
            continue
        starts = [0.0] if len(between) < len(top.parents) else []
        ways = starts + [best[parent] for parent in between]
        best[top] = top.cost + min(ways, default=math.inf)
        stack.pop()
    return best[node]


def total_cost(node: Node, source: int) -> float:
    """All computation between the nodes in ``source`` (bits) and a node."""
    if source >> node.index & 1:
        return 0.0
    seen, stack, total = {node}, [node], 0.0
    while stack:
        top = stack.pop()
        total += top.cost
        for parent in top.parents:
            if not source >> parent.index & 1 and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return total
