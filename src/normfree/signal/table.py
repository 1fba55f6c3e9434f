"""A signal as a compact table for a terminal: one row per stage, with sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from .propagation import SignalPoint, SignalPropagation

_BARS = "▁▂▃▄▅▆▇█"
_LONGEST_SPARKLINE = 24
_LOG_RANGE = 30.0  # largest over smallest value from which the bars are logarithmic


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """One character per value between ``low`` and ``high``; NaN and infinite values are ``!``, absent ones ``·``.

    Longer series than 24 are thinned out evenly, first and last kept.
    """
    if len(values) > _LONGEST_SPARKLINE:
        step = (len(values) - 1) / (_LONGEST_SPARKLINE - 1)
        values = [values[round(index * step)] for index in range(_LONGEST_SPARKLINE)]
    return "".join(_bar(value, low, high) for value in values)


def _bar(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "·"
    if not math.isfinite(value):
        return "!"
    share = (value - low) / (high - low) if high > low else 0.0
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]


def signal_table(signal: SignalPropagation) -> str:
    """The whole signal in a few lines of text."""
    statistics = (
        ("squared mean", "avg_channel_squared_mean"),
        ("variance", "avg_channel_variance"),
        ("residual variance", "residual_avg_channel_variance"),
    )
    rows = [["stage", "points", "shape", *(title for title, _ in statistics)]]
    for stage, group in groupby(signal.points, key=lambda point: point.stage):
        points = list(group)
        cells = [_series(signal, points, statistic) for _, statistic in statistics]
        rows.append([_stage_name(stage, points), str(len(points)), "×".join(map(str, points[-1].shape[1:])), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"{signal.label}: {len(signal.points)} points, {signal.examples} examples"
    return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:], *_remarks(signal)])


def _stage_name(stage: int, points: Sequence[SignalPoint]) -> str:
    kinds = {point.kind for point in points}
    return "stem" if kinds == {"stem"} else f"{stage}"


def _series(signal: SignalPropagation, points: Sequence[SignalPoint], statistic: str) -> str:
    values = [getattr(point, statistic) for point in points]
    everything = [value for value in signal.values(statistic) if value is not None and math.isfinite(value)]
    if all(value is None for value in values):
        return "-"
    low, high = (min(everything), max(everything)) if everything else (0.0, 0.0)
    bars = values
    if low > 0.0 and high > _LOG_RANGE * low:
        low, high = math.log(low), math.log(high)
        bars = [math.log(value) if value is not None and math.isfinite(value) else value for value in values]
    ends = f"{values[0]:.3g}" if len(values) == 1 else f"{_number(values[0])} → {_number(values[-1])}"
    return f"{ends} {sparkline(bars, low, high)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _remarks(signal: SignalPropagation) -> list[str]:
    remarks = [f"note: {note}" for note in signal.notes]
    point = signal.first_non_finite
    if point is not None:
        remarks.append(
            f"! {point.name} is the first point with {point.nan_count} NaN and {point.inf_count} infinite values"
        )
    return remarks
