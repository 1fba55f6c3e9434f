"""Accuracies of training runs by two labels: as a table in Markdown, as lines, as bars."""

from __future__ import annotations

import math
from typing import Any

Results = dict[tuple[Any, Any], tuple[float, float, int]]
"""Of each row and column of a table: mean accuracy, spread, number of seeds."""


def number(result: tuple[float, float, int] | None) -> str:
    """``63.21 ± 0.30 (3)``: mean, sample standard deviation, seeds."""
    if result is None:
        return "–"
    mean, spread, count = result
    return f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f} ({count})"


def markdown(results: Results, column: str) -> str:
    """A table in Markdown; ``column`` says what its columns are."""
    rows, columns = _axes(results)
    text = [f"| {column} | " + " | ".join(str(c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    text += [f"| {r} | " + " | ".join(number(results.get((r, c))) for c in columns) + " |" for r in rows]
    return "\n".join(text)


def _spread(result: tuple[float, float, int]) -> float:
    return 0.0 if math.isnan(result[1]) else result[1]


def _axes(results: Results) -> tuple[list[Any], list[Any]]:
    columns = dict.fromkeys(c for _, c in results)
    ordered = sorted(columns) if all(isinstance(c, int) for c in columns) else list(columns)
    return list(dict.fromkeys(r for r, _ in results)), ordered


def lines(axes: Any, results: Results, column: str) -> None:
    """A line for each row over columns that are numbers, drawn on a logarithmic scale."""
    rows, columns = _axes(results)
    for row in rows:
        own = [c for c in columns if (row, c) in results]
        spreads = [_spread(results[row, c]) for c in own]
        axes.errorbar(own, [results[row, c][0] for c in own], yerr=spreads, marker="o", capsize=3, label=row)
    axes.set_xscale("log", base=2)
    axes.set_xticks(columns, [str(c) for c in columns])
    _finish(axes, column)


def bars(axes: Any, results: Results, column: str) -> None:
    """A group of bars for each column, with a bar for each row in it."""
    rows, columns = _axes(results)
    width = 0.8 / max(1, len(rows))
    for place_in_group, row in enumerate(rows):
        own = [(place, results[row, c]) for place, c in enumerate(columns) if (row, c) in results]
        places = [place + (place_in_group - (len(rows) - 1) / 2) * width for place, _ in own]
        spreads = [_spread(result) for _, result in own]
        drawn = axes.bar(places, [result[0] for _, result in own], width * 0.92, yerr=spreads, capsize=3, label=row)
        axes.bar_label(drawn, [f"{result[0]:.1f}" for _, result in own], fontsize=7, padding=2)
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    lowest = min((result[0] for result in results.values()), default=0.0)
    axes.set_ylim(bottom=max(0.0, math.floor(lowest / 10.0) * 10.0 - 10.0))
    _finish(axes, column)


def _finish(axes: Any, column: str) -> None:
    axes.set_xlabel("batch size" if column == "batch" else column)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    names = axes.get_legend_handles_labels()[1]
    if names:  # below, where it hides nothing
        side_by_side = len(names) if len(names) < 4 else 2
        axes.legend(frameon=False, fontsize=8, ncols=side_by_side, loc="upper center", bbox_to_anchor=(0.5, -0.13))
