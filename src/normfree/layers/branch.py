"""The scalars behind a residual branch, for the weight of its last layer to carry."""

from __future__ import annotations

from torch import Tensor, nn

from .keeping import KeepsWhatItComputes


class ScaledBranch(KeepsWhatItComputes, nn.Module):
    """A block with a residual branch whose last layer is called with ``output_scale=self.output_scale()``: α · s."""

    skip_gain: nn.Parameter | None
    alpha: float

    def output_scale(self) -> Tensor | None:
        """α times the skip gain, a tensor without axes; None where the weights hold it already."""
        if self.skip_gain is None:
            return None
        if self._shared is not None:
            shared = self._shared.get(self, None)
            if shared is not None:
                return shared
        skip_gain = self.skip_gain
        return self._computed((skip_gain,), self.alpha, lambda: skip_gain * self.alpha)

    def last_layer(self) -> nn.Module:
        """The layer that applies it."""
        raise NotImplementedError
