"""Adaptive gradient clipping: ours, timm's, and for scale PyTorch's clipping of the whole gradient's norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import nn

import normfree as nf
from normfree._torchvision import import_timm
from normfree.agc import classifier_of

from .contenders import Setting
from .timing import in_turn, machine, ratio

_SHRINKS = 0.99  # λ, from call to call, so that gradients which were just clipped are above it again


def contenders(model: nn.Module, clips: bool) -> dict[str, Callable[[], Any]]:
    """Each clips the gradients of a copy of ``model``: all units' with every call, or none's.

    timm's function gets a list without the classifier, as its users have to do.
    """
    import_timm()
    from timm.utils.agc import adaptive_clip_grad  # type: ignore[import-untyped]

    def limits() -> Iterator[float]:
        return (1e-3 * _SHRINKS**call if clips else 1e6 for call in count())

    ours, timms, plain = (_with_gradients(model) for _ in range(3))
    head = {id(parameter) for module in classifier_of(timms) for parameter in module.parameters()}
    rest = [parameter for parameter in timms.parameters() if id(parameter) not in head]
    for_ours, for_timms, for_plain = limits(), limits(), limits()
    return {
        "ours": lambda: nf.adaptive_gradient_clip_(ours, next(for_ours)),
        "timm": lambda: adaptive_clip_grad(rest, next(for_timms)),
        "whole norm": lambda: nn.utils.clip_grad_norm_(plain.parameters(), next(for_plain)),
    }


def _with_gradients(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = torch.randn_like(parameter)
    return copied


def run(models: tuple[str, ...], setting: Setting, repeats: int, rounds: int = 2) -> dict[str, Any]:
    """Milliseconds of clipping once, ``rounds`` times over, where no unit is above the limit and where all are."""
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        for name in models:
            model = setting.place(nf.create_model(name, width=setting.width))
            for clips in (False, True):
                timings = in_turn(contenders(model, clips), repeats)
                head = {"round": number + 1, "model": name, "clipped": "all" if clips else "none"}
                rows += [
                    {
                        **head,
                        "contender": timing.name,
                        "ms": round(timing.median * 1e3, 3),
                        "spread": round(timing.spread, 4),
                        "ours_over_it": round(ratio(timings[0], timing), 4),
                    }
                    for timing in timings
                ]
    return {"benchmark": "clip", "machine": machine(), "setting": vars(setting), "repeats": repeats, "rows": rows}
