"""One place for what every benchmark writes: a table on the terminal, JSON, CSV, and a figure."""

from __future__ import annotations

import csv
import json
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
    labels = [
        " ".join(str(row[k]) for k in ("model", "axis", "value", "batch", "contender") if k in row) for row in rows
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
