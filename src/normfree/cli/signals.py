"""``normfree spp``, ``normfree predict`` and ``normfree diagnose``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import batch_progress, print_json, say
from .options import (
    AsJson,
    Backward,
    Batch,
    ChannelAxis,
    Csv,
    Device,
    Models,
    NormStatistics,
    Options,
    Picture,
    Seed,
    Size,
    model_and_shape,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..signal import SignalPropagation


def spp(
    models: Models,
    input: Annotated[
        str, typer.Option(help="noise, a folder of images, an image, or a Parquet file of images.")
    ] = "noise",
    size: Size = None,
    batch: Batch = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches to average over, at most.")] = 1,
    predicted: Annotated[bool, typer.Option("--predicted", help="Lay what the theory predicts over it.")] = False,
    out: Picture = None,
    csv: Csv = None,
    as_json: AsJson = False,
    option: Options = None,
    norm_statistics: NormStatistics = "batch",
    backward: Backward = False,
    channel_axis: ChannelAxis = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], typer.Option(help="Of weights and input.")
    ] = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Signal Propagation Plots of one or more models, drawn over each other."""
    import torch

    from ..signal import predict_spp

    check_outputs(out, csv)
    settings: dict[str, Any] = {"norm_statistics": norm_statistics, "backward": backward, "channel_axis": channel_axis}
    signals = []
    for name in models:
        torch.manual_seed(seed)
        model, shape = model_and_shape(name, option, size, batch)
        if predicted:
            signals.append(predict_spp(model, shape, label=f"{name} (predicted)", **settings))
        model = model.to(torch.device(device), getattr(torch, dtype))
        signals.append(_measured(name, model, shape, input, batches, settings))
    _show_signals(signals, out, csv, as_json)


def predict(
    models: Models,
    size: Size = None,
    batch: Batch = 8,
    out: Picture = None,
    csv: Csv = None,
    as_json: AsJson = False,
    option: Options = None,
    norm_statistics: NormStatistics = "batch",
    backward: Backward = False,
    channel_axis: ChannelAxis = None,
) -> None:
    """Signal Propagation Plots that the theory expects: no forward pass, no weights in memory."""
    from ..signal import predict_spp, without_weights

    check_outputs(out, csv)
    signals = []
    for name in models:
        with without_weights():
            model, shape = model_and_shape(name, option, size, batch)
        signals.append(
            predict_spp(
                model,
                shape,
                label=f"{name} (predicted)",
                norm_statistics=norm_statistics,
                backward=backward,
                channel_axis=channel_axis,
            )
        )
    _show_signals(signals, out, csv, as_json)


def diagnose(
    models: Models,
    size: Size = None,
    batch: Batch = 8,
    without_norm: Annotated[
        bool, typer.Option("--without-norm", help="Take the normalisation layers out first.")
    ] = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="From a forward and a backward pass on noise, not from the theory.")
    ] = False,
    as_json: AsJson = False,
    option: Options = None,
    seed: Seed = 0,
) -> None:
    """Say what is wrong with a model's signal: where, why, and what would help."""
    import torch

    from ..signal import diagnose as find
    from ..signal import predict_spp
    from ..surgery import without_norms

    diagnoses = []
    for name in models:
        torch.manual_seed(seed)
        model, shape = model_and_shape(name, option, size, batch)
        label = name
        if without_norm:
            model, label = without_norms(model), f"{name} without normalisation"
        if measured:
            signal = _measured(label, model, shape, "noise", 1, {"backward": True})
        else:
            signal = predict_spp(model, shape, label=label, backward=True)
        diagnoses.append(find(signal, model=model))
    if as_json:
        print_json([diagnosis.to_dict() for diagnosis in diagnoses])
    else:
        print("\n\n".join(str(diagnosis) for diagnosis in diagnoses))


def _measured(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int, int],
    input: str,
    batches: int,
    settings: dict[str, Any],
) -> SignalPropagation:
    from dataclasses import replace

    import torch

    from ..images import ImageBatches
    from ..signal import spp as measure

    images: ImageBatches | None = None
    stream: Iterable[torch.Tensor]
    if input == "noise":
        stream = (torch.randn(shape) for _ in range(batches))
    else:
        images = ImageBatches(input, size=shape[2], batch_size=shape[0], limit=shape[0] * batches)
        stream = images
    with batch_progress(name, batches) as on_batch:
        signal = measure(model, stream, label=name, max_batches=batches, on_batch=on_batch, **settings)
    note = images.note() if images is not None else None
    return signal if note is None else replace(signal, notes=(*signal.notes, note))


def check_outputs(out: Path | None, csv: Path | None) -> None:
    """Fails before the work is done, not after."""
    from ..signal.plot import check_figure_path

    if out is not None:
        check_figure_path(out)
    for path in (out, csv):
        check_writable(path)


def _show_signals(signals: list[SignalPropagation], out: Path | None, csv: Path | None, as_json: bool) -> None:
    from ..files import write_text
    from ..signal import plot_signals
    from ..signal.propagation import signals_csv, without_non_finite

    if out is not None:
        plot_signals(signals, out)
    if csv is not None:
        write_text(csv, signals_csv(signals))
    if as_json:
        print_json(without_non_finite([signal.to_dict() for signal in signals]))
    else:
        print("\n\n".join(str(signal) for signal in signals))
    for path in (out, csv):
        if path is not None:
            say(f"wrote {path}")


def check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {path.parent}")
