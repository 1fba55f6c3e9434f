"""One place for what every benchmark writes: a table on the terminal, JSON, CSV, and a figure."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Columns as wide as their widest entry; the columns of the first row that has any other are kept in order."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_figure(result: dict[str, Any], path: Path) -> None:
    """Bars of ours over every other contender; 1 is the same cost."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "ours_over_it" in row and row["contender"] != "ours"]
    if not rows:
        rows = [{"ours_over_it": 0.0, "contender": "nothing could be compared"}]
    labels = [
        " ".join(str(row[k]) for k in ("model", "axis", "value", "batch", "clipped", "contender") if k in row)
        for row in rows
    ]
    figure = Figure(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), [row["ours_over_it"] for row in rows], color="tab:blue")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("cost of normfree's network / cost of the contender")
    axes.set_title(f"{result['benchmark']}, {result['machine']['threads']} threads, {result['machine']['device']}")
    figure.savefig(path)


_COLOURS = {"conv-only": "tab:gray", "batchnorm": "tab:orange", "timm": "tab:blue"}
_TITLES = {
    "train": "training step",
    "accumulate": "eight microbatches, then an update",
    "infer": "inference",
    "memory": "peak memory in training",
}


def summary(results: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """For each table row, over all rounds, the median of ours over each of the three others."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result["benchmark"] not in _TITLES:
            continue
        how = ", channels_last" * result["setting"]["channels_last"] + ", compiled" * result["setting"]["compile"]
        for row in result["rows"]:
            if row["contender"] in _COLOURS and "ours_over_it" in row:
                label = f"{row['model']}: {_TITLES[result['benchmark']]}, batch {row['batch']}{how}"
                found.setdefault(label, {}).setdefault(row["contender"], []).append(row["ours_over_it"])
    return [(label, {key: statistics.median(values) for key, values in row.items()}) for label, row in found.items()]


def write_summary_figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Three bars for each table row: our cost over that of the conv-only twin, of BatchNorm and of timm.

    Raises:
        ValueError: none of the results compares anything, or they come from different machines.
    """
    from matplotlib.figure import Figure

    lines = summary(results)
    if not lines:
        raise ValueError("results: none of them compares our networks with another")
    machines = {json.dumps(result["machine"], sort_keys=True) for result in results}
    if len(machines) > 1:
        raise ValueError(f"results: they come from different machines: {' and '.join(sorted(machines))}")
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for number, (contender, colour) in enumerate(_COLOURS.items()):
        heights = [row.get(contender, 0.0) for _, row in lines]
        places = [index + 0.27 * (number - 1) for index in range(len(lines))]
        bars = axes.barh(places, heights, 0.25, color=colour, label=f"against {contender}")
        axes.bar_label(bars, [f"{height:.2f}" if height else "" for height in heights], padding=2, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("cost of normfree's network / cost of the other: less than 1 is cheaper")
    axes.margins(x=0.08)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    machine = results[0]["machine"]
    caption = f"{machine['device']} ({machine['processor']}), {machine['threads']} threads, torch {machine['torch']}"
    axes.set_title(caption, fontsize=9)
    figure.savefig(path, dpi=150)
