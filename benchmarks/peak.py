"""How much arithmetic a network asks for, and how much a card can do at most."""

from __future__ import annotations

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

import normfree as nf

from .contenders import Setting, conv_only_twin

# dense matrix products, 10^12 operations per second, as the vendor publishes them: bfloat16, and float32 as TF32
_PEAKS = {
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def matrix_peak(setting: Setting) -> float | None:
    """Operations per second, or None for a device that is not in the table."""
    if setting.device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    known = next((peaks for key, peaks in _PEAKS.items() if key in name), None)
    return None if known is None else known[0 if setting.dtype == "bfloat16" else 1] * 1e12


@cache
def _forward_flops(name: str, width: float, size: int) -> int:
    model = conv_only_twin(nf.create_model(name, width=width)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops())


def forward_flops(name: str, setting: Setting) -> int:
    """Multiplications and additions in a forward pass of one image through our model's conv-only twin."""
    return _forward_flops(name, setting.width, setting.size)
