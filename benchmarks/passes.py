"""Training steps, accumulated steps and inference, in turn for every contender."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import normfree as nf

from .contenders import Setting, contenders
from .timing import Timing, in_turn, machine, ratio

MICROBATCHES = 8


def training_step(model: nn.Module, setting: Setting, microbatches: int = 1, share: bool = False) -> Callable[[], Any]:
    """One SGD update from ``microbatches`` passes of ``setting.batch`` images each."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, foreach=True)
    images = setting.images()
    targets = torch.randint(0, 1000, (len(images),), device=images.device)
    run = setting.compiled(model)

    def step() -> None:
        with nf.shared_standardization(model) if share else contextlib.nullcontext():
            for _ in range(microbatches):
                with setting.autocast():
                    loss = F.cross_entropy(run(images), targets)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """A forward pass in evaluation."""
    model.eval()
    images = setting.images()
    run = setting.compiled(model)

    def forward() -> None:
        with torch.inference_mode(), setting.autocast():
            run(images)

    return forward


def compare(kind: str, name: str, setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """One row for each contender: milliseconds, spread, and ours over it.

    Args:
        kind: ``train`` (one update per batch), ``accumulate`` (eight microbatches, then an update) or ``infer``.
    """
    models = contenders(name, setting)
    if kind == "infer":
        models["folded"] = setting.place(nf.fold(models["ours"]))
        runs = {key: inference(model, setting) for key, model in models.items()}
    else:
        count = MICROBATCHES if kind == "accumulate" else 1
        runs = {
            key: training_step(model, setting, count, share=kind == "accumulate" and key == "ours")
            for key, model in models.items()
        }
    timings = in_turn(runs, repeats)
    ours = timings[0]
    return [_row(name, setting, timing, ours) for timing in timings]


def _row(name: str, setting: Setting, timing: Timing, ours: Timing) -> dict[str, Any]:
    return {
        "model": name,
        "batch": setting.batch,
        "contender": timing.name,
        "ms": round(timing.median * 1e3, 2),
        "spread": round(timing.spread, 4),
        "ours_over_it": round(ratio(ours, timing), 4),
    }


def run(kind: str, models: tuple[str, ...], settings: list[Setting], repeats: int, rounds: int = 2) -> dict[str, Any]:
    """The whole table, ``rounds`` times over: what differs between the rounds is noise."""
    rows = []
    for number in range(rounds):
        for name in models:
            for setting in settings:
                rows += [{"round": number + 1, **row} for row in compare(kind, name, setting, repeats)]
    return {"benchmark": kind, "machine": machine(), "setting": vars(settings[0]), "repeats": repeats, "rows": rows}
