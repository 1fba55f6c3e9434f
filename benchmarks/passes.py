"""Training steps, accumulated steps and inference, in turn for every contender."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import normfree as nf

from .contenders import Setting, contenders, kept_and_recomputed
from .peak import forward_flops, matrix_peak
from .timing import Timing, first_runs, in_turn, machine, ratio

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
        if kind == "train" and not setting.compile:
            models |= kept_and_recomputed(models["ours"])
        count = MICROBATCHES if kind == "accumulate" else 1
        runs = {
            key: training_step(model, setting, count, share=kind == "accumulate" and key == "ours")
            for key, model in models.items()
        }
    return rows(name, setting, kind, runs, repeats)


def rows(
    name: str, setting: Setting, kind: str, runs: dict[str, Callable[[], Any]], repeats: int
) -> list[dict[str, Any]]:
    """What the runs take, and the gaps: contenders that cannot run in this setting, with the reason."""
    _, gaps = first_runs(runs)
    timings = in_turn({key: run for key, run in runs.items() if key not in gaps}, repeats)
    ours = next((timing for timing in timings if timing.name == "ours"), None)
    head = {"model": name, "batch": setting.batch}
    found = [{**head, **_row(timing, ours), **throughput(name, setting, kind, timing)} for timing in timings]
    return found + [{**head, "contender": key, "gap": reason} for key, reason in gaps.items()]


def _row(timing: Timing, ours: Timing | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "contender": timing.name,
        "ms": round(timing.median * 1e3, 2),
        "spread": round(timing.spread, 4),
    }
    if ours is not None:
        row["ours_over_it"] = round(ratio(ours, timing), 4)
    return row


def throughput(name: str, setting: Setting, kind: str, timing: Timing) -> dict[str, Any]:
    """Images per second and, on a card whose peak is known, the share of it that convolutions and products use."""
    passes, per_image = (1, 1) if kind == "infer" else (MICROBATCHES if kind == "accumulate" else 1, 3)
    images = setting.batch * passes / timing.median
    found: dict[str, Any] = {"images_per_s": round(images, 2)}
    peak = matrix_peak(setting)
    if peak is not None:  # a backward pass does each product twice
        found["share_of_peak"] = round(images * per_image * forward_flops(name, setting) / peak, 4)
    return found


def run(kind: str, models: tuple[str, ...], settings: list[Setting], repeats: int, rounds: int = 2) -> dict[str, Any]:
    """The whole table, ``rounds`` times over: what differs between the rounds is noise."""
    found = []
    for number in range(rounds):
        for name in models:
            for setting in settings:
                found += [{"round": number + 1, **row} for row in compare(kind, name, setting, repeats)]
    return {"benchmark": kind, "machine": machine(), "setting": vars(settings[0]), "repeats": repeats, "rows": found}
