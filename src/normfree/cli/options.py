"""Arguments and options that several commands share, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from torch import nn

Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of noise.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="Of the model, such as width=0.25; repeat for more."),
]

Models = Annotated[
    list[str],
    typer.Argument(
        help="nf_resnet50, timm:NAME, torchvision:NAME, package.module:callable or file.py:callable.",
        metavar="MODEL...",
    ),
]
Size = Annotated[int | None, typer.Option(min=1, help="Height and width of the input; by default the model's own.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Picture = Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")]
Csv = Annotated[Path | None, typer.Option(help="Table of all points to write.")]
NormStatistics = Annotated[Literal["batch", "running"], typer.Option(help="What BatchNorm normalises with.")]
Backward = Annotated[bool, typer.Option("--backward", help="The gradients, too.")]
ChannelAxis = Annotated[int | None, typer.Option(help="Of every activation; found by itself if left out.")]


def model_and_shape(
    name: str, option: list[str] | None, size: int | None, batch: int
) -> tuple[nn.Module, tuple[int, int, int, int]]:
    from ..sources import input_size, load_model

    model = load_model(name, **_parse_options(option or []))
    channels, height, width = input_size(model)
    return model, (batch, channels, size or height, size or width)


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE, the value read as JSON where it is JSON and as a word otherwise."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--option: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
    return options
