"""``normfree train`` and ``normfree eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        help="A YAML file or a shipped recipe, then any number of KEY=VALUE, such as data=PATH model=NAME "
        "batch_size=2 optimizer.learning_rate=0.2. Without a recipe: scikit-learn's digits.",
        metavar="[RECIPE] [KEY=VALUE]...",
    ),
]


def train(
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; by default runs/MODEL-DATE-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the recipe has changed.")] = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the shipped recipes and stop.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole recipe, defaults included, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a network by a recipe, on one process or under torchrun; go on with a run that was stopped.

    \b
    normfree train                                          a real run on scikit-learn's digits
    normfree train cifar10 data=FOLDER batch_size=2         a shipped recipe, changed
    normfree train my.yaml --out runs/x                     a recipe of your own
    normfree train --resume runs/x                          what was stopped goes on
    torchrun --nproc-per-node 8 -m normfree train my.yaml   on eight processes
    """
    from ..training.recipe import load_recipe, shipped_recipes

    if recipes:
        print("\n".join(shipped_recipes()))
        return
    sources, overrides = [word for word in words or [] if "=" not in word], [w for w in words or [] if "=" in w]
    if len(sources) > 1:
        raise ValueError(f"expected one recipe and KEY=VALUE, got {' and '.join(sources)}")
    recipe = None
    if resume is not None and not sources:
        from ..training.run_folder import RunFolder

        if overrides:
            recipe = load_recipe(RunFolder(resume).read_recipe().to_dict(), overrides)
    else:
        recipe = load_recipe(sources[0] if sources else None, overrides)
    if show:
        from ..training.run_folder import RunFolder

        shown = recipe if recipe is not None else RunFolder(resume or Path()).read_recipe()
        print(shown.to_yaml(), end="")
        return
    from ..training import TrainingInterrupted
    from ..training import train as run

    try:
        result = run(recipe, out, resume=resume, force=force)
    except TrainingInterrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(128 + stop.signal) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's own.")] = None,
    checkpoint: Annotated[Literal["last", "best"], typer.Option(help="Which state of the run.")] = "last",
    weights: Annotated[Literal["auto", "ema", "raw"], typer.Option(help="Averaged weights, or the raw ones.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    per_class: Annotated[bool, typer.Option("--per-class", help="A line for each class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a trained run: accuracy, loss, calibration error, classes one by one, speed."""
    from ..training import evaluate_run

    result = evaluate_run(run, data=data, checkpoint=checkpoint, weights=weights, batch_size=batch, device=device)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
        return
    print(result)
    for name in result.skipped:
        typer.echo(f"not readable: {name}", err=True)
    if per_class:
        width = max(len(entry.name) for entry in result.classes)
        for entry in result.classes:
            print(f"{entry.name:{width}}  {entry.correct:6d} of {entry.examples:6d}  {entry.accuracy:6.2f} %")
