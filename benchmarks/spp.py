"""What a Signal Propagation Plot costs, against a bare forward pass and against the usual forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfree as nf
from normfree.sources import load_model

from .timing import in_turn, machine, ratio

MODELS = ("nf_resnet50", "torchvision:resnet50", "timm:resnetv2_50")


def hooked_forward(model: nn.Module, blocks: list[nn.Module], branches: list[nn.Module]) -> Callable[[Tensor], None]:
    """The recipe that is usually copied: torch.var and torch.mean over (0, 2, 3) in forward hooks."""

    def forward(images: Tensor) -> None:
        numbers: list[float] = []

        def statistics(_: nn.Module, __: Any, output: Tensor) -> None:
            numbers.append(output.mean(dim=(0, 2, 3)).square().mean().item())
            numbers.append(output.var(dim=(0, 2, 3)).mean().item())

        def variance(_: nn.Module, __: Any, output: Tensor) -> None:
            numbers.append(output.var(dim=(0, 2, 3)).mean().item())

        handles = [block.register_forward_hook(statistics) for block in blocks]
        handles += [branch.register_forward_hook(variance) for branch in branches]
        model(images)
        for handle in handles:
            handle.remove()

    return forward


def run(models: tuple[str, ...] = MODELS, batch: int = 8, size: int = 224, repeats: int = 15) -> dict[str, Any]:
    """Milliseconds and ratios for each model; BatchNorm normalises with running statistics in every contender."""
    rows = []
    images = torch.randn(batch, 3, size, size)
    for name in models:
        model = load_model(name).eval()
        names = [point.name for point in nf.spp(model, images[:1], norm_statistics="running").points[1:]]
        modules = dict(model.named_modules())
        blocks = [modules[path] for path in names]
        branches = [[m for m in block.modules() if isinstance(m, nn.Conv2d)][-1] for block in blocks]
        hooked = hooked_forward(model, blocks, branches)
        contenders: dict[str, Callable[[], Any]] = {
            "forward": lambda model=model: model(images),
            "spp": lambda model=model: nf.spp(model, images, norm_statistics="running"),
            "hooks": lambda hooked=hooked: hooked(images),
        }
        with torch.no_grad():
            forward, spp, hooks = in_turn(contenders, repeats)
        rows.append(
            {
                "model": name,
                "forward_ms": forward.median * 1e3,
                "spp_ms": spp.median * 1e3,
                "hooks_ms": hooks.median * 1e3,
                "spp_over_forward": ratio(spp, forward),
                "hooks_over_forward": ratio(hooks, forward),
                "spread": max(timing.spread for timing in (forward, spp, hooks)),
            }
        )
    return {"machine": machine(), "batch": batch, "size": size, "repeats": repeats, "rows": rows}
