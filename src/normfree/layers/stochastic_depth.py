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
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            # of an (N, H, W, C) view: both operations answer in the contiguous format, whatever that of their input
            rows = branch(input.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return shortcut.permute(0, 2, 3, 1).index_add(0, kept, rows.to(shortcut.dtype)).permute(0, 3, 1, 2)
        return shortcut.index_add(0, kept, branch(input.index_select(0, kept)).to(shortcut.dtype))

    def extra_repr(self) -> str:
        return f"rate={self.rate}" + ("" if self.batch_independent else ", batch_independent=False")
