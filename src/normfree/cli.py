"""The command line: parses, calls, prints."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import cli_training

if TYPE_CHECKING:
    from torch import nn

    from .signal import SignalPropagation

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

app = typer.Typer(
    help="Build, diagnose and train deep networks that need no activation normalisation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True)


def main() -> None:
    """The command ``normfree``. Exit code 0, or 2 with one line on standard error for anything that it cannot do."""
    app()


def _report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Every failure as one line and exit code 2; NORMFREE_DEBUG=1 shows where it came from."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if os.environ.get("NORMFREE_DEBUG"):
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if not isinstance(error, (ValueError, OSError)):
        message = f"{type(error).__name__}: {message}" if lines else message
    notes = [note.removeprefix("spp: raised ") for note in getattr(error, "__notes__", [])]
    return message + (f" ({'; '.join(notes)})" if notes else "")


@app.command()
@_report_errors
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'nf_*'.")] = "*",
    cost: Annotated[bool, typer.Option(help="Count parameters and multiply-adds (takes a while for many).")] = False,
    size: Annotated[int, typer.Option(min=1, help="Input height and width that multiply-adds are counted at.")] = 224,
    as_json: AsJson = False,
) -> None:
    """List the models, with their BatchNorm twins."""
    import torch

    from .cost import model_cost
    from .models import create_model, list_models, model_entry

    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; normfree models lists all")
    rows = []
    for name in _tracked(names, "counting") if cost else names:
        entry = model_entry(name)
        row: dict[str, Any] = {
            "name": name,
            "description": entry.description,
            "batchnorm_twin": entry.batchnorm_twin,
        }
        if cost:
            with torch.device("meta"):
                counted = model_cost(create_model(name), (1, 3, size, size))
            row |= {"parameters": counted.parameters, "multiply_adds": counted.multiply_adds}
        rows.append(row)
    if as_json:
        _print_json(rows)
        return
    titles = ["name", "description", "BatchNorm twin"] + (["parameters", f"multiply-adds at {size} px"] if cost else [])
    table = _table(titles, numeric=titles[3:])
    for row in rows:
        numbers = [f"{row['parameters'] / 1e6:.1f} M", f"{row['multiply_adds'] / 1e9:.2f} G"] if cost else []
        table.add_row(row["name"], row["description"], row["batchnorm_twin"] or "", *numbers)
    _print_table(table)


@app.command()
@_report_errors
def gain(
    activations: Annotated[
        list[str] | None,
        typer.Argument(help="Names, such as silu or 'leaky_relu(0.2)'; all if none.", metavar="NAME..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show γ of activations: exact, and as published."""
    from .activation import activation_names
    from .gain import gain as exact_gain

    rows: list[dict[str, Any]] = []
    for name in activations or activation_names():
        try:
            exact = exact_gain(name)
        except ValueError:
            if activations:
                raise
            continue  # listed without being asked for, such as threshold, which has no default
        published: float | None = None
        with contextlib.suppress(ValueError):
            published = exact_gain(name, source="published")
        rows.append({"activation": name, "gain": exact, "published": published})
    if as_json:
        _print_json(rows)
        return
    table = _table(["activation", "exact", "published"], numeric=["exact", "published"])
    for row in rows:
        table.add_row(
            row["activation"], f"{row['gain']:.15g}", "" if row["published"] is None else f"{row['published']:.10g}"
        )
    _print_table(table)


@app.command()
@_report_errors
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

    from .signal import predict_spp

    _check_outputs(out, csv)
    settings: dict[str, Any] = {"norm_statistics": norm_statistics, "backward": backward, "channel_axis": channel_axis}
    signals = []
    for name in models:
        torch.manual_seed(seed)
        model, shape = _model_and_shape(name, option, size, batch)
        if predicted:
            signals.append(predict_spp(model, shape, label=f"{name} (predicted)", **settings))
        model = model.to(torch.device(device), getattr(torch, dtype))
        signals.append(_measured(name, model, shape, input, batches, settings))
    _show_signals(signals, out, csv, as_json)


@app.command()
@_report_errors
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
    from .signal import predict_spp, without_weights

    _check_outputs(out, csv)
    signals = []
    for name in models:
        with without_weights():
            model, shape = _model_and_shape(name, option, size, batch)
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


@app.command()
@_report_errors
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

    from .signal import diagnose as find
    from .signal import predict_spp
    from .surgery import without_norms

    diagnoses = []
    for name in models:
        torch.manual_seed(seed)
        model, shape = _model_and_shape(name, option, size, batch)
        label = name
        if without_norm:
            model, label = without_norms(model), f"{name} without normalisation"
        if measured:
            signal = _measured(label, model, shape, "noise", 1, {"backward": True})
        else:
            signal = predict_spp(model, shape, label=label, backward=True)
        diagnoses.append(find(signal, model=model))
    if as_json:
        _print_json([diagnosis.to_dict() for diagnosis in diagnoses])
    else:
        print("\n\n".join(str(diagnosis) for diagnosis in diagnoses))


_STUDIES = ("cifar10", "microbatch", "table1", "depth")


@app.command()
@_report_errors
def reproduce(
    experiments: Annotated[
        list[str],
        typer.Argument(
            help=f"figure1, figure2, or all of these; or studies that train: {', '.join(_STUDIES)}.", metavar="NAME..."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller networks and inputs: seconds, not minutes.")] = False,
    data: Annotated[str | None, typer.Option(help="For studies: folder with CIFAR-10's Parquet files.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="For studies: training runs side by side.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="For studies: time limit; the same command then goes on.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For studies: of every recipe, such as epochs=10; repeat."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, numbers and training runs.")] = Path("reproduced"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures and run its studies; say of each claim whether the numbers bear it out."""
    import difflib

    from .experiments import FIGURES, Settings

    names = list(FIGURES) if experiments == ["all"] else experiments
    known = [*FIGURES, *_STUDIES]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"there is no experiment {name!r}{hint}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {out} is not a folder")
    settings = Settings(quick, seed, data, out, jobs, minutes, tuple(setting or ()), _say)
    reports: list[Any] = []
    for name in names:
        if name in FIGURES:
            report: Any = FIGURES[name](settings)
        else:
            from .experiments.training_studies import STUDIES

            report = STUDIES[name](settings)
        written = report.write(out)
        reports.append(report)
        if not as_json:
            print(f"{name}: {report.title}")
            if name in _STUDIES:
                print(report.table)
            print("\n".join(f"  {claim}" for claim in report.claims))
            print(f"  wrote {', '.join(str(path) for path in written)}\n")
    if as_json:
        from .signal.propagation import without_non_finite

        _print_json(without_non_finite([report.to_dict() for report in reports]))


app.command("train")(_report_errors(cli_training.train))
app.command("eval")(_report_errors(cli_training.evaluate))


def _model_and_shape(
    name: str, option: list[str] | None, size: int | None, batch: int
) -> tuple[nn.Module, tuple[int, int, int, int]]:
    from .sources import input_size, load_model

    model = load_model(name, **_parse_options(option or []))
    channels, height, width = input_size(model)
    return model, (batch, channels, size or height, size or width)


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

    from .images import ImageBatches
    from .signal import spp as measure

    images: ImageBatches | None = None
    stream: Iterable[torch.Tensor]
    if input == "noise":
        stream = (torch.randn(shape) for _ in range(batches))
    else:
        images = ImageBatches(input, size=shape[2], batch_size=shape[0], limit=shape[0] * batches)
        stream = images
    with _batch_progress(name, batches) as on_batch:
        signal = measure(model, stream, label=name, max_batches=batches, on_batch=on_batch, **settings)
    note = images.note() if images is not None else None
    return signal if note is None else replace(signal, notes=(*signal.notes, note))


def _check_outputs(out: Path | None, csv: Path | None) -> None:
    """Fails before the work is done, not after."""
    from .signal.plot import check_figure_path

    if out is not None:
        check_figure_path(out)
    for path in (out, csv):
        _check_writable(path)


def _show_signals(signals: list[SignalPropagation], out: Path | None, csv: Path | None, as_json: bool) -> None:
    from .files import write_text
    from .signal import plot_signals
    from .signal.propagation import signals_csv, without_non_finite

    if out is not None:
        plot_signals(signals, out)
    if csv is not None:
        write_text(csv, signals_csv(signals))
    if as_json:
        _print_json(without_non_finite([signal.to_dict() for signal in signals]))
    else:
        print("\n\n".join(str(signal) for signal in signals))
    for path in (out, csv):
        if path is not None:
            _say(f"wrote {path}")


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


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {path.parent}")


@contextlib.contextmanager
def _batch_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, plain lines in a log, nothing for a single batch in a log."""
    if not _console.is_terminal:
        yield lambda done: _say(f"{name}: batch {done}") if total > 1 else None
        return
    with _progress_bar() as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def _tracked(items: list[str], what: str) -> Iterator[str]:
    if not _console.is_terminal:
        yield from items
        return
    with _progress_bar() as bar:
        yield from bar.track(items, description=what)


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_console, transient=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def _table(titles: list[str], numeric: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in numeric else "left", no_wrap=True)
    return table


def _print_table(table: Table) -> None:
    console = Console()
    # a pipe has no width to fit into
    (console if console.is_terminal else Console(width=200)).print(table)
