"""``normfree models`` and ``normfree gain``."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from .console import new_table, print_json, print_table, tracked
from .options import AsJson


def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'nf_*'.")] = "*",
    cost: Annotated[bool, typer.Option(help="Count parameters and multiply-adds (takes a while for many).")] = False,
    size: Annotated[int, typer.Option(min=1, help="Input height and width that multiply-adds are counted at.")] = 224,
    as_json: AsJson = False,
) -> None:
    """List the models, with their BatchNorm twins."""
    import torch

    from ..cost import model_cost
    from ..models import create_model, list_models, model_entry

    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; normfree models lists all")
    rows = []
    for name in tracked(names, "counting") if cost else names:
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
        print_json(rows)
        return
    titles = ["name", "description", "BatchNorm twin"] + (["parameters", f"multiply-adds at {size} px"] if cost else [])
    table = new_table(titles, numeric=titles[3:])
    for row in rows:
        numbers = [f"{row['parameters'] / 1e6:.1f} M", f"{row['multiply_adds'] / 1e9:.2f} G"] if cost else []
        table.add_row(row["name"], row["description"], row["batchnorm_twin"] or "", *numbers)
    print_table(table)


def gain(
    activations: Annotated[
        list[str] | None,
        typer.Argument(help="Names, such as silu or 'leaky_relu(0.2)'; all if none.", metavar="NAME..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show γ of activations: exact, and as published."""
    from ..activation import activation_names
    from ..gain import gain as exact_gain

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
        print_json(rows)
        return
    table = new_table(["activation", "exact", "published"], numeric=["exact", "published"])
    for row in rows:
        table.add_row(
            row["activation"], f"{row['gain']:.15g}", "" if row["published"] is None else f"{row['published']:.10g}"
        )
    print_table(table)
