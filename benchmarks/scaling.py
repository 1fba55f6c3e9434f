"""How the cost of a training step grows with depth, width, resolution and batch, against the conv-only twin."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from .contenders import Setting, contenders
from .passes import training_step
from .timing import in_turn, machine, ratio

DEPTHS = (26, 50, 101, 152, 200, 288, 600)
WIDTHS = (0.25, 0.5, 1.0)
SIZES = (64, 128, 224)
BATCHES = (1, 4, 16)


def run(setting: Setting, repeats: int, depths: tuple[int, ...] = DEPTHS) -> dict[str, Any]:
    """One axis at a time, from NF-ResNet-50 in the given setting."""
    points = [("depth", depth, f"nf_resnet{depth}", setting) for depth in depths]
    points += [("width", width, "nf_resnet50", replace(setting, width=width)) for width in WIDTHS]
    points += [("size", size, "nf_resnet50", replace(setting, size=size)) for size in SIZES]
    points += [("batch", batch, "nf_resnet50", replace(setting, batch=batch)) for batch in BATCHES]
    rows = []
    for axis, value, name, here in points:
        print(f"{name}: {axis} {value}", file=sys.stderr, flush=True)  # the whole table takes minutes
        models = contenders(name, here, timm=False)
        timings = in_turn({key: training_step(model, here) for key, model in models.items()}, repeats)
        for timing in timings:
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "model": name,
                    "contender": timing.name,
                    "ms": round(timing.median * 1e3, 2),
                    "spread": round(timing.spread, 4),
                    "ours_over_it": round(ratio(timings[0], timing), 4),
                }
            )
    return {"benchmark": "scaling", "machine": machine(), "setting": vars(setting), "repeats": repeats, "rows": rows}
