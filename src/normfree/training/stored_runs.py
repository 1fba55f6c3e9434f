"""Evaluating a run that is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from .augmentation import evaluation_transform
from .building import build_model
from .checkpoint import ResumeError, evaluated_weights, load_checkpoint
from .data import VALIDATION, EvaluationBatches, open_data
from .distributed import this_process
from .evaluation import EvaluationResult, evaluate
from .mixing import BatchFinisher
from .run_folder import RunFolder


def evaluate_run(
    run: str | Path,
    *,
    data: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
    weights: Literal["auto", "ema", "raw"] = "auto",
    batch_size: int = 128,
    device: str = "auto",
) -> EvaluationResult:
    """Evaluates a run on its own validation data or on other data with the same classes.

    Args:
        run: its folder.
        data: where other data is, as a recipe's ``data.path``.
        checkpoint: the state at the end, or the one with the best validation accuracy.
        weights: ``"ema"`` for averaged weights, ``"raw"`` for those that were trained, ``"auto"`` for what the recipe
            evaluates. ``"best"`` holds only what was evaluated.
        batch_size: examples per batch, per process.

    Raises:
        ResumeError: no such run, checkpoint or weights.
        ValueError: data that does not go with it.
    """
    folder = RunFolder(Path(run))
    recipe = folder.read_recipe()
    state = load_checkpoint(folder.last if checkpoint == "last" else folder.best)
    classes, images = folder.read_images()
    section = recipe.data
    if data is not None:
        section = section.model_copy(
            update={"path": data, "train": None, "validation": None, "holdout": None, "validation_limit": None}
        )
    opened = open_data(section, recipe.seed, splits=VALIDATION, channels=images.channels)
    if opened.classes != classes:
        raise ValueError(
            f"data: {section.path} has {len(opened.classes)} classes that are not the {len(classes)} of the run, "
            f"such as {next(iter(set(opened.classes) ^ set(classes)), opened.classes[0])!r}"
        )
    model = build_model(recipe.model, len(classes), images.channels)
    model.load_state_dict(_weights(state, weights, recipe.evaluation.weights, checkpoint))
    finish = BatchFinisher(None, images, len(classes))
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    with this_process(device) as process:
        batches = EvaluationBatches(
            opened.validation,
            evaluation_transform(images),
            batch_size=batch_size,
            rank=process.rank,
            world_size=process.world_size,
        )
        return evaluate(
            model.to(process.device).to(memory_format=layout),  # type: ignore[call-overload]
            batches,
            lambda batch: finish(batch, device=process.device)[0].contiguous(memory_format=layout),
            classes,
            process.device,
            recipe.precision,
        )


def _weights(state: dict[str, Any], wanted: str, by_recipe: str, checkpoint: str) -> dict[str, torch.Tensor]:
    if checkpoint == "best":
        if wanted != "auto":
            raise ResumeError("weights: the best checkpoint holds only the weights that were evaluated; use auto")
        return dict(state["model"])
    if wanted == "ema" and state["average"] is None:
        raise ResumeError("weights: this run has no averaged weights; its recipe has no ema_decay")
    return evaluated_weights(state, is_raw=(by_recipe if wanted == "auto" else wanted) == "raw")
