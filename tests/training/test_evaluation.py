"""Evaluation against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_runs import quiet, run, table, tiny
from torch import Tensor, nn

import normfree as nf
from normfree.training import evaluate, evaluate_run, load_recipe, train
from normfree.training.checkpoint import ResumeError, load_checkpoint
from normfree.training.data import open_data
from normfree.training.feed import Feed
from normfree.training.image_config import resolve_images


class Examples(NamedTuple):
    images: Tensor
    targets: Tensor
    skipped: tuple[str, ...] = ()


def in_numpy(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """All of it, in percent, by the definitions; calibration by Guo et al. 2017, 15 bins, (lower, upper]."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")
    right = order[:, 0] == targets
    confidence = p.max(1)
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    gaps = [
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean())
        for b in range(15)
        if (bins == b).any()
    ]
    return {
        "examples": len(targets),
        "loss": -np.log(p[np.arange(len(targets)), targets]).mean(),
        "top1": 100 * right.mean(),
        "top5": 100 * (order[:, :5] == targets[:, None]).any(1).mean(),
        "calibration_error": 100 * sum(gaps),
        "classes": [(int((targets == k).sum()), int((right & (targets == k)).sum())) for k in range(logits.shape[1])],
    }


def assert_agrees(result: Any, expected: dict[str, Any]) -> None:
    for key in ("examples", "loss", "top1", "top5", "calibration_error"):
        assert getattr(result, key) == pytest.approx(expected[key], rel=1e-4, abs=1e-4), key
    assert [(entry.examples, entry.correct) for entry in result.classes] == expected["classes"]


@pytest.mark.parametrize("classes", [2, 3, 5, 17])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_against_numpy(classes: int, scale: float) -> None:
    """The model gives back its input; batches of different sizes, one of them of examples that cannot be read."""
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(200, classes, generator=generator)
    targets = torch.randint(max(2, classes - 1), (200,), generator=generator)  # the last class has no example
    batches = [Examples(logits[a:b], targets[a:b]) for a, b in ((0, 64), (64, 65), (65, 190), (190, 200))]
    batches.insert(2, Examples(logits[:0], targets[:0], ("one.jpg: broken", "two.jpg: broken")))
    names = [f"class {k}" for k in range(classes)]
    result = evaluate(nn.Identity(), batches, lambda batch: batch.images, names)
    assert_agrees(result, in_numpy(logits.numpy(), targets.numpy()))
    assert [entry.name for entry in result.classes] == names
    assert result.skipped == ("one.jpg: broken", "two.jpg: broken")
    if classes > 2:
        assert np.isnan(result.classes[-1].accuracy)
    assert "top-1" in str(result)
    assert "2 not readable" in str(result)


def test_sure_and_right_is_calibrated() -> None:
    targets = torch.tensor([0, 1, 2, 1])
    logits = 100.0 * nn.functional.one_hot(targets, 3).float()
    batch = [Examples(logits, targets)]
    result = evaluate(nn.Identity(), batch, lambda b: b.images, ["a", "b", "c"])
    assert (result.top1, result.calibration_error, result.loss) == (100.0, 0.0, 0.0)
    result = evaluate(nn.Identity(), [Examples(logits, (targets + 1) % 3)], lambda b: b.images, ["a", "b", "c"])
    assert (result.top1, result.calibration_error) == (0.0, 100.0)


def test_bad_input() -> None:
    def prepared(batch: Examples) -> Tensor:
        return batch.images

    with pytest.raises(ValueError, match="no example that could be read"):
        evaluate(nn.Identity(), [], prepared, ["a", "b"])
    too_few = [Examples(torch.randn(3, 2), torch.tensor([0, 1, 1]))]
    with pytest.raises(ValueError, match=r"expected logits \(N, 4\) for 4 classes, got \(3, 2\)"):
        evaluate(nn.Identity(), too_few, prepared, ["a", "b", "c", "d"])


def test_modes_are_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model.train()
    model[1].eval()  # frozen
    statistics = model[1].running_mean.clone()
    batch = Examples(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    evaluate(model, [batch], lambda b: b.images, ["a", "b"])
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(model[1].running_mean, statistics)
    with pytest.raises(ValueError, match="logits"):
        evaluate(model, [batch], lambda b: b.images, "abcdefg")
    assert [module.training for module in model] == [True, False, True]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(tiny("ema_decay=0.8", "evaluation.every_epochs=0.25", "calibrate=theory"), folder, say=quiet)
    return folder


def logits_of(state: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Of a fresh network with these weights, on all validation digits, prepared as by hand."""
    recipe = tiny()
    data = open_data(recipe.data)
    model = nf.create_model("nf_resnet26", num_classes=10, width=0.0625, stem="small").eval()
    images = resolve_images(recipe.data, data, model)
    model.load_state_dict(state)
    assert data.validation is not None
    pixels = torch.stack(
        [
            data.validation.load(i).permute(2, 0, 1)
            if isinstance(data.validation.load(i), Tensor)
            else torch.from_numpy(np.array(data.validation.load(i))).permute(2, 0, 1)
            for i in range(40)
        ]
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    with torch.no_grad():
        logits = model((pixels.float() / 255.0 - mean) / std)
    return logits.numpy(), np.array([data.validation.label(i) for i in range(40)])


@pytest.mark.parametrize("weights", ["ema", "raw", "auto"])
def test_runs_with_either_weights(weights: str, trained: Path) -> None:
    state = load_checkpoint(trained / "checkpoints" / "last.pt")
    average = {key.removeprefix("module."): value for key, value in state["average"].items() if key != "n_averaged"}
    result = evaluate_run(trained, weights=weights)  # type: ignore[arg-type]
    assert_agrees(result, in_numpy(*logits_of(state["model"] if weights == "raw" else average)))


def test_the_best_is_the_best(trained: Path) -> None:
    rows = table(trained / "evaluations.csv")[1:]
    accuracies = [float(row[2]) for row in rows]
    best = load_checkpoint(trained / "checkpoints" / "best.pt")
    assert best["top1"] == pytest.approx(max(accuracies), rel=1e-5)
    assert best["update"] == int(rows[accuracies.index(max(accuracies))][0])
    assert_agrees(evaluate_run(trained, checkpoint="best"), in_numpy(*logits_of(best["model"])))
    with pytest.raises(ResumeError, match="holds only the weights that were evaluated"):
        evaluate_run(trained, checkpoint="best", weights="raw")


def test_the_weights_at_the_end_are_those_of_the_last_evaluation(trained: Path) -> None:
    model = nf.load_weights(trained / "model.safetensors")
    recorded = table(trained / "evaluations.csv")[-1]
    expected = in_numpy(*logits_of(model.state_dict()))
    assert float(recorded[2]) == pytest.approx(expected["top1"], rel=1e-5)
    assert float(recorded[4]) == pytest.approx(expected["loss"], rel=1e-4)


def test_raw_weights_are_evaluated_if_the_recipe_says_so(tmp_path: Path) -> None:
    state = run(tiny("ema_decay=0.99", "evaluation.weights=raw", "epochs=1"), tmp_path / "run")
    row = table(tmp_path / "run" / "evaluations.csv")[-1]
    assert float(row[4]) == pytest.approx(in_numpy(*logits_of(state["model"]))["loss"], rel=1e-4)
    assert evaluate_run(tmp_path / "run").loss == pytest.approx(float(row[4]), rel=1e-4)


def test_images_for_the_signal_are_those_of_validation() -> None:
    recipe = load_recipe(
        {}, ["data={path: digits, validation_limit: 40, size: 8}", "batch_size=8", "model=nf_resnet26"]
    )
    data = open_data(recipe.data)
    from normfree.training.distributed import Process, plan_batches

    images = resolve_images(recipe.data, data, None)
    feed = Feed(recipe, data, images, plan_batches(8, None, 1), Process(torch.device("cpu")))
    assert feed.signal_images().shape == (32, 3, 8, 8)
    assert feed.calibration_images().shape == (128, 3, 8, 8)
