"""How the cost of a training step grows with depth, width, resolution and batch, against the conv-only twin.

Every point runs in a process of its own, so that one that needs too much time or memory is a named gap in the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from .contenders import Setting, contenders
from .passes import rows, training_step
from .timing import first_runs, machine

DEPTHS = (26, 50, 101, 152, 200, 288, 600)
WIDTHS = (0.25, 0.5, 1.0)
SIZES = (64, 128, 224)
BATCHES = (1, 4, 16)
_FEWEST = 3  # repeats
_START = 60.0  # seconds that a process may take before it measures, beyond its budget


def points(setting: Setting, depths: tuple[int, ...]) -> Iterator[tuple[str, float, str, Setting]]:
    """One axis at a time, from NF-ResNet-50 in the given setting: axis, value, model, setting."""
    for depth in depths:
        yield "depth", depth, f"nf_resnet{depth}", setting
    for width in WIDTHS:
        yield "width", width, "nf_resnet50", replace(setting, width=setting.width * width)
    for size in SIZES:
        yield "size", size, "nf_resnet50", replace(setting, size=min(setting.size, size))
    for batch in BATCHES:
        yield "batch", batch, "nf_resnet50", replace(setting, batch=batch)


def run(setting: Setting, repeats: int, depths: tuple[int, ...] = DEPTHS, budget: float = 300.0) -> dict[str, Any]:
    """A row for each point and contender; ``budget`` is in seconds for each point."""
    found = []
    for axis, value, name, here in points(setting, depths):
        here_rows = _in_a_process(name, here, repeats, budget)
        found += [{"axis": axis, "value": value, **row} for row in here_rows]
        for row in here_rows:  # the whole table takes a while
            text = row.get("gap") or f"{row['ms']} ms, ours / it {row.get('ours_over_it', '?')}"
            print(f"{axis} {value}: {row['contender']}: {text}", file=sys.stderr, flush=True)
    return {"benchmark": "scaling", "machine": machine(), "setting": vars(setting), "repeats": repeats, "rows": found}


def _in_a_process(name: str, setting: Setting, repeats: int, budget: float) -> list[dict[str, Any]]:
    order = json.dumps([name, asdict(setting), repeats, budget, torch.get_num_threads()])
    try:
        command = [sys.executable, "-m", "benchmarks.scaling", order]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=budget + _START)
    except subprocess.TimeoutExpired:
        reason = f"left out: over the budget of {budget:g} s"
    else:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
        reason = f"left out: its process ended with {done.returncode}" + " (memory?)" * (done.returncode == -9)
    return [{"model": name, "batch": setting.batch, "contender": "all", "gap": reason}]


def point(name: str, setting: Setting, repeats: int, budget: float) -> list[dict[str, Any]]:
    """The rows of one point, with as many repeats as the budget allows."""
    runs = {key: training_step(model, setting) for key, model in contenders(name, setting, timm=False).items()}
    seconds, gaps = first_runs(runs)
    each = sum(seconds.values())
    affordable = int((budget - each) / each) - 3 if each else repeats  # three rounds warm up
    if affordable < _FEWEST:
        reason = f"left out: {_FEWEST + 3} rounds of {each:.0f} s are over the budget of {budget:g} s"
        return [{"model": name, "batch": setting.batch, "contender": key, "gap": reason} for key in runs]
    found = rows(name, setting, "train", {k: r for k, r in runs.items() if k in seconds}, min(repeats, affordable))
    return found + [
        {"model": name, "batch": setting.batch, "contender": key, "gap": reason} for key, reason in gaps.items()
    ]


if __name__ == "__main__":
    _name, _setting, _repeats, _budget, _threads = json.loads(sys.argv[1])
    torch.set_num_threads(_threads)
    print(json.dumps(point(_name, Setting(**_setting), _repeats, _budget)))
