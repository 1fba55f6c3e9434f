"""A small network in float64, in which the order of a sum does not show, as a recipe's ``file.py:callable``."""

from __future__ import annotations

from torch import Tensor, nn

import normfree as nf


class InDouble(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double())  # type: ignore[no-any-return]


def make(**options: float) -> nn.Module:
    return InDouble(
        nf.create_model("nf_resnet26", num_classes=10, width=0.0625, stem="small", skip_gain=0.3, **options)
    )
