"""Residual branches that are dropped at random, example by example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
        # what selects and adds answers in the contiguous format, whatever it is given: channels go last where they are
        axis = -1 if input.movedim(1, -1).is_contiguous() else 1
        rows = branch(input.movedim(1, axis).index_select(0, kept).movedim(axis, 1)).to(shortcut.dtype)
        return shortcut.movedim(1, axis).index_add(0, kept, rows.movedim(1, axis)).movedim(axis, 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate}" + ("" if self.batch_independent else ", batch_independent=False")
