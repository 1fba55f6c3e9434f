"""Fine-tuning, models of others, and every shipped recipe: a few updates each."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import NET, assert_same_state, quiet, run, tiny
from torch import Tensor, nn

import normfree as nf
from normfree.sources import load_model
from normfree.training import RecipeError, TrainingInterrupted, evaluate_run, load_recipe, shipped_recipes, train
from normfree.training.building import build_model, calibrated_model, fill_from
from normfree.training.checkpoint import ResumeError, evaluated_weights, load_checkpoint
from normfree.training.update import Learner
from normfree.weights import CheckpointError

FROZEN = "optimizer.learning_rate=1e-30"
"""No number of a network changes by it, but those that are 0."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    train(tiny("ema_decay=0.8", "model.options.drop_rate=0.1"), folder, say=quiet)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of JPEG, PNG and grey images of many sizes, each class of a colour of its own."""
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (40 + 3 * i, 50, 3))
                pixels[..., number] += 150
                image = Image.fromarray(pixels.astype(np.uint8))
                image = image.convert("L") if i == 2 else image
                image.save(folder / split / name / f"{i}.{'png' if i == 0 else 'jpg'}")
    return folder


def fresh(num_classes: int = 10) -> nn.Module:
    return build_model(tiny("model.options.drop_rate=0.1").model, num_classes, 3)


def ours(path: Path) -> dict[str, Tensor]:
    """The weights that a run evaluates."""
    return evaluated_weights(load_checkpoint(path / "checkpoints" / "last.pt"))


def differing(
    one: dict[str, Tensor], other: dict[str, Tensor], relative: float = 0.0, absolute: float = 1e-20
) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.allclose(one[name], other[name], rtol=relative, atol=absolute)]


@pytest.mark.parametrize("kind", ["run", "safetensors", "state_dict"])
def test_weights_from(kind: str, finished: Path, tmp_path: Path) -> None:
    path = {"run": finished, "safetensors": finished / "model.safetensors", "state_dict": tmp_path / "w.pth"}[kind]
    if kind == "state_dict":
        torch.save({"state_dict": {f"module.{name}": value for name, value in ours(finished).items()}}, path)
    model = fresh()
    assert fill_from(model, str(path)) == [f"weights of {path}"]
    assert differing(model.state_dict(), ours(finished)) == []


def test_weights_of_a_run_that_has_not_come_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def stepping(self: Learner, *arguments: Any) -> Any:
        result = step(self, *arguments)
        if self.update == 5:
            raise KeyboardInterrupt
        return result

    for which in ("ema", "raw"):
        folder = tmp_path / which
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "step", stepping)
            with pytest.raises(KeyboardInterrupt):
                train(tiny("ema_decay=0.8", f"evaluation.weights={which}"), folder, say=quiet)
        state = load_checkpoint(folder / "checkpoints" / "last.pt")
        model = build_model(tiny().model, 10, 3)
        fill_from(model, str(folder))
        assert differing(model.state_dict(), evaluated_weights(state, is_raw=which == "raw")) == []
        assert differing(model.state_dict(), evaluated_weights(state, is_raw=which != "raw")) != []


def test_other_classes(finished: Path) -> None:
    model = fresh(7)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    (note,) = fill_from(model, str(finished))
    assert note.startswith(f"weights of {finished}; the classifier begins anew (head.")
    assert "expected shape (7, " in note
    assert "got (10, " in note
    theirs = ours(finished)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name.startswith("head.") else theirs[name]), name
    assert any(name.startswith("head.") for name in theirs)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_of_others_for_other_classes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    pretrained = load_model(name)
    nf.save_weights(pretrained, tmp_path / "pretrained.safetensors")
    model = build_model(tiny(f"model={{name: '{name}'}}").model, 10, 3)
    (note,) = fill_from(model, str(tmp_path / "pretrained.safetensors"))
    assert note.endswith("the classifier begins anew (fc.weight: expected shape (10, 512), got (1000, 512))")
    theirs = pretrained.state_dict()
    ours_now = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert differing(ours_now, {key: theirs[key] for key in ours_now}) == []


def test_fine_tuning_a_run_on_other_classes(finished: Path, photographs: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = load_recipe(
        "finetune",
        [
            NET,
            f"model.weights={finished}",
            f"data={{path: {photographs}, size: 16, workers: 0}}",
            "epochs=8",
            "batch_size=8",
            "optimizer.learning_rate=0.05",
            "ema_decay=0.5",
        ],
    )
    result = train(recipe, tmp_path / "tuned", say=lines.append)
    assert any("the classifier begins anew" in line for line in lines)
    assert [entry.name for entry in result.evaluation.classes] == ["blue", "green", "red"]
    assert result.evaluation.top1 == 100.0
    lines.clear()
    resumed = train(None, resume=tmp_path / "tuned", say=lines.append)  # does not take the weights once more
    assert not any("begins anew" in line for line in lines)
    assert resumed.evaluation.top1 == 100.0
    assert evaluate_run(tmp_path / "tuned").top1 == 100.0


def test_tuning_begins_where_the_run_ended(finished: Path, tmp_path: Path) -> None:
    settings = (FROZEN, "epochs=1", f"model.weights={finished}", "model.options.drop_rate=0.1")
    train(tiny(*settings), tmp_path / "tuned", say=quiet)
    assert differing(ours(tmp_path / "tuned"), ours(finished)) == []
    assert evaluate_run(tmp_path / "tuned").loss == pytest.approx(evaluate_run(finished).loss, rel=1e-6)


def test_weights_that_do_not_fit(finished: Path, tmp_path: Path) -> None:
    wider = build_model(tiny("model.options.width=0.125").model, 10, 3)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model.weights: .*run does not fit the model: .*: expected shape"):
        fill_from(wider, str(finished))
    assert differing(wider.state_dict(), before) == []
    with pytest.raises(ResumeError, match="is no folder of a run"):
        fill_from(fresh(), str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is truncated or corrupt"):
        fill_from(fresh(), str(tmp_path / "broken.safetensors"))
    with pytest.raises(RecipeError, match="calibrate: it is for fresh weights"):
        tiny("calibrate=theory", f"model.weights={finished}")


FOREIGN = {
    "timm": ["model={name: 'timm:resnet18', options: {}}"],
    "torchvision": ["model={name: 'torchvision:squeezenet1_1', options: {}}", "data.size=32"],
    "file": ["model={name: 'MODELS/net.py:make', options: {features: 4}}"],
}
MODULE = """
from torch import nn

def make(features):
    return nn.Sequential(nn.Conv2d(3, features, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * features, 10))
"""


@pytest.mark.parametrize("source", sorted(FOREIGN))
def test_models_of_others(source: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODULE)
    overrides = [override.replace("MODELS", str(tmp_path)) for override in FOREIGN[source]]
    recipe = tiny(*overrides, "epochs=1", "data.limit=32", "share_standardization=true")
    result = train(recipe, tmp_path / "run", say=quiet)
    assert result.updates == 2
    assert evaluate_run(tmp_path / "run").loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    again = tiny(*overrides, f"model.weights={tmp_path / 'run'}", FROZEN, "epochs=1", "data.limit=32")
    tuned = train(again, tmp_path / "tuned", say=quiet)
    if source == "file":  # no running statistics
        assert tuned.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-6)


@pytest.mark.parametrize("method", ["theory", "data", "center"])
def test_calibrated_training(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains and biases of the first update are as ``calibrate`` sets them; a run that is gone on with has its own."""
    recipe = tiny(FROZEN, f"calibrate={method}", "epochs=1", "seed=3")
    state = run(recipe, tmp_path / "run")
    torch.manual_seed(3)
    model = build_model(recipe.model, 10, 3)
    images = torch.zeros(0)
    if method == "data":
        images = first_digits()
        expected = nf.calibrate(model, images, method="data")
    elif method == "center":
        images = first_digits()
        expected = nf.center(model, images)
    else:
        expected = nf.calibrate(model, input_shape=(3, 8, 8), method="theory")
    assert differing(state["model"], expected.state_dict(), 1e-5, 1e-6) == []
    assert len(differing(state["model"], model.state_dict())) > 5
    via_recipe = calibrated_model(model, recipe, (3, 8, 8), lambda: images)
    assert differing(via_recipe.state_dict(), expected.state_dict()) == []

    trained = tiny(f"calibrate={method}", "optimizer.learning_rate=0.02")
    whole = run(trained, tmp_path / "whole")
    step = Learner.step

    def stepping(self: Learner, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stepping)
        with pytest.raises(TrainingInterrupted):
            train(trained, tmp_path / "resumed", say=quiet)
    assert_same_state(whole, run(None, resume=tmp_path / "resumed"))


def first_digits() -> Tensor:
    """The first training images of the tiny runs, prepared by hand."""
    from normfree.training.data import open_data
    from normfree.training.image_config import resolve_images

    recipe = tiny()
    data = open_data(recipe.data, recipe.seed)
    images = resolve_images(recipe.data, data, None)
    assert data.train is not None
    pixels = torch.stack([torch.from_numpy(np.array(data.train.load(i))) for i in range(64)]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (images.mean, images.std))
    return pixels.float() * (1.0 / (255.0 * std)).float() + (-mean / std).float()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_makes_an_update(name: str, photographs: Path, tmp_path: Path) -> None:
    """All of it but sizes, widths and data: augmentation, mixing, clipping, average, autocast, logs.

    Skip gains do not begin at 0, so that by the second update every parameter has a gradient.
    """
    recipe = load_recipe(name)
    batch = min(8, recipe.batch_size)
    small = load_recipe(
        name,
        [
            f"data={{path: {photographs}, limit: 16, validation_limit: 2, size: 32, test_size: 32, workers: 0}}",
            "epochs=1",
            f"batch_size={batch}",
            f"microbatch_size={min(4, batch)}",
            "optimizer.warmup_epochs=0",
            "model.options.width=0.0625",
            "model.options.skip_gain=1.0",
            "log.signal_every=null",
        ],
    )
    state = run(small, tmp_path / "run")
    assert state["update"] == 16 // batch
    torch.manual_seed(small.seed)
    initial = build_model(small.model, 3, 3).state_dict()
    changed = differing(state["model"], initial)
    assert len(changed) > 0.9 * len(initial)
    assert (state["average"] is None) == (recipe.ema_decay is None)
    assert (tmp_path / "run" / "tensorboard").is_dir() == recipe.log.tensorboard
