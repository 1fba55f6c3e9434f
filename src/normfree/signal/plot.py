"""The paper's three panels for one or several signals."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_path
from .propagation import SignalPropagation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_PANELS = (
    ("Average channel squared mean", "avg_channel_squared_mean"),
    ("Average channel variance", "avg_channel_variance"),
    ("Residual average channel variance", "residual_avg_channel_variance"),
)
# Okabe and Ito's colours, ordered by falling contrast; line style and marker tell the curves apart without colour
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (5, 1)), "v"),
    ("#E69F00", (0, (3, 1, 1, 1)), "P"),
    ("#56B4E9", (0, (1, 1)), "X"),
)
_LOG_RANGE = 30.0  # largest over smallest value from which an axis is logarithmic


def plot_signals(
    signals: Sequence[SignalPropagation],
    path_or_axes: str | os.PathLike[str] | Sequence[Axes],
    title: str | None = None,
) -> Figure:
    """Signal Propagation Plot: squared mean, variance and residual variance against the block's index.

    Args:
        signals: drawn over each other, one legend entry each.
        path_or_axes: a file name ending in .png, .svg or .pdf, or three matplotlib axes to draw on.
        title: above the panels.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no signals, another ending, or not three axes.
        OSError: the file cannot be written; nothing is left behind then.
    """
    from matplotlib.figure import Figure

    if not signals:
        raise ValueError("signals: expected at least one")
    if not isinstance(path_or_axes, (str, os.PathLike)):
        axes = list(path_or_axes)
        if len(axes) != len(_PANELS):
            raise ValueError(f"path_or_axes: expected a file name or {len(_PANELS)} axes, got {len(axes)}")
        _draw(signals, axes)
        return axes[0].get_figure()  # type: ignore[return-value]
    path = check_figure_path(path_or_axes)
    figure = Figure(figsize=(13.0, 4.3), layout="constrained")
    axes = list(figure.subplots(1, len(_PANELS)))
    _draw(signals, axes)
    if title:
        figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(signals), 4), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return figure


def check_figure_path(path: str | os.PathLike[str]) -> Path:
    """The path, if its ending is one of the three formats.

    Raises:
        ValueError: it is not.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path: expected a name ending in {', '.join(FORMATS)}, got {path.name!r}")
    return path


def _draw(signals: Sequence[SignalPropagation], axes: Sequence[Axes]) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis, (title, statistic) in zip(axes, _PANELS, strict=True):
        for index, signal in enumerate(signals):
            _draw_curve(axis, signal, statistic, index, len(signals))
        _mark_stages(axis, signals)
        _scale(axis, signals, statistic)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("layer" if signals[0].points[0].kind == "layer" else "residual block (0: stem)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(axis: Axes, signal: SignalPropagation, statistic: str, index: int, total: int) -> None:
    colour, line, marker = _STYLES[index % len(_STYLES)]
    values = [math.nan if value is None else value for value in signal.values(statistic)]
    spacing = max(1, len(values) // 12)
    axis.plot(
        range(len(values)),
        values,
        color=colour,
        linestyle=line,
        marker=marker,
        markevery=(index * spacing // max(total, 1), spacing),
        markersize=4.5,
        linewidth=1.6,
        label=signal.label,
    )


def _mark_stages(axis: Axes, signals: Sequence[SignalPropagation]) -> None:
    for start in sorted({start for signal in signals for start in signal.stage_starts if start > 1}):
        shared = all(start in signal.stage_starts for signal in signals)
        axis.axvline(start - 0.5, color="0.75" if shared else "0.88", linewidth=0.8, linestyle="-", zorder=0)


def _scale(axis: Axes, signals: Sequence[SignalPropagation], statistic: str) -> None:
    values = [value for signal in signals for value in signal.values(statistic) if value is not None]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if positive and max(positive) > _LOG_RANGE * min(positive):
        axis.set_yscale("log")
        # a mean that is zero up to rounding must not stretch the axis over thirty decades
        floor = 1e-9 if statistic == "avg_channel_squared_mean" else 0.0
        axis.set_ylim(bottom=max(min(positive) / 2.0, max(positive) * floor))
    elif positive:
        axis.set_ylim(bottom=0.0, top=1.08 * max(positive))
    elif not values or all(not math.isfinite(value) for value in values):
        axis.text(0.5, 0.5, "no finite values" if values else "none", ha="center", transform=axis.transAxes)
