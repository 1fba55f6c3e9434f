"""Telling which addition joins a residual branch to a skip path, and which module the block is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .graph import Graph, Node, lightest_path, total_cost
from .record import ModuleCall, size_of


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """The two ways from a fork to an addition.

    Attributes:
        branch, skip: the operands; the branch is the one with more computation behind it.
        branch_node, skip_node: theirs.
        shared: the nodes, as bits, that lie behind both.
        is_plain_skip: whether nothing was computed on the skip path.
    """

    branch: Tensor
    branch_node: Node
    skip: Tensor
    skip_node: Node
    shared: int
    is_plain_skip: bool

    def is_identity(self, axis: int) -> bool:
        """Whether nothing was computed on the skip path and the shape is that of the block's input."""
        fork, channels = self._fork(), self.branch.shape[axis]
        fork_channels = fork.channel[0] if fork.channel is not None else channels
        return self.is_plain_skip and size_of(fork.shape, fork_channels) == size_of(tuple(self.branch.shape), channels)

    def _fork(self) -> Node:
        """The last of the shared nodes that the branch starts from."""
        branch, shared = self.branch_node, self.shared
        latest: Node | None = None
        seen, stack = {branch}, [branch]
        while stack:
            for parent in stack.pop().parents:
                if shared >> parent.index & 1:
                    if latest is None or parent.index > latest.index:
                        latest = parent
                elif parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return latest or branch

    def block(self, running: Sequence[ModuleCall]) -> ModuleCall | None:
        """The innermost running module that holds both paths from the fork on; None for the model itself.

        A module that is only handed the branch, to call it and add, holds it in time but not in its path.
        """
        own = (self.branch_node.ancestors | self.skip_node.ancestors) & ~self.shared
        first = (own & -own).bit_length() - 1
        maker = self.branch_node.modules[-1].path if self.branch_node.modules else ""
        for depth in range(len(running) - 1, 0, -1):
            call = running[depth]
            if call.first_node <= first and f"{maker}.".startswith(f"{call.path}."):
                return call
        return None

    def branch_path(self, block: ModuleCall | None) -> str:
        """The module directly below the block that made the branch, seen from the branch's end."""
        stack = [self.branch_node]
        while stack:
            node = stack.pop(0)
            below = node.modules.index(block) + 1 if block in node.modules else 1
            if below < len(node.modules):
                return node.modules[below].path
            stack.extend(parent for parent in node.parents if not self.shared >> parent.index & 1)
        return ""


def paths_to_addition(left: object, right: object, graph: Graph) -> Paths | None:
    """The branch and the skip path that an addition joins; None if it is no residual merge."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.shape != right.shape or left.ndim < 2:
        return None
    if not (left.is_floating_point() and right.is_floating_point()):
        return None
    left_node, right_node = graph.node(left), graph.node(right)
    if left_node is None or right_node is None or left_node is right_node:
        return None
    shared = left_node.ancestors & right_node.ancestors
    if not shared:
        return None
    # the lightest way first: behind x + f(x) lies nothing, although f was computed
    left_cost, right_cost = (
        (lightest_path(node, shared), total_cost(node, shared)) for node in (left_node, right_node)
    )
    if left_cost == right_cost:
        return None
    left_is_branch = left_cost > right_cost
    branch, branch_node = (left, left_node) if left_is_branch else (right, right_node)
    skip, skip_node = (right, right_node) if left_is_branch else (left, left_node)
    return Paths(branch, branch_node, skip, skip_node, shared, min(left_cost, right_cost)[0] == 0.0)


def is_only_activated(output: Node, merge: Node) -> bool:
    """Whether an output is a merge, but for activations and normalisation."""
    if not output.ancestors >> merge.index & 1:
        return False
    while output is not merge:
        if output.cost or len(output.parents) != 1:
            return False
        output = output.parents[0]
    return True
