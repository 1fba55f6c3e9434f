from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from normfree.training import Recipe, RecipeError, load_recipe, shipped_recipes
from normfree.training.building import build_model
from normfree.training.recipe import differences

SHIPPED = {
    "digits",
    "cifar10",
    "cifar100",
    "finetune",
    "imagenet_nf_resnet50",
    "imagenet_nf_resnet50_regularised",
    "imagenet_nf_resnet50_microbatch",
    "imagenet_nfnet_f0",
    *(f"imagenet_nf_regnet_b{level}" for level in range(6)),
}


def test_what_is_shipped() -> None:
    assert set(shipped_recipes()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_shipped_recipe_builds_its_model(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(f"recipes/{name}.yaml") == recipe
    with torch.device("meta"):
        model = build_model(recipe.model, 7, 3)
    assert model.num_classes == 7


@pytest.mark.parametrize("name", [name for name in sorted(SHIPPED) if "resnet50" in name])
def test_resnet_recipes_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    batch = 4 if "microbatch" in name else 1024
    assert (recipe.batch_size, recipe.epochs, recipe.label_smoothing) == (batch, 90, 0.1)
    section = recipe.optimizer
    assert (section.momentum, section.nesterov, section.schedule) == (0.9, True, "cosine")
    assert (section.warmup_epochs, section.final_learning_rate) == (5, 0)
    assert (section.weight_decay, section.decay_scalars) == (1e-4, False)
    assert recipe.peak_learning_rate == pytest.approx(0.1 * batch / 256)
    assert (recipe.augmentation.crop, recipe.augmentation.flip) == ("random_resized", 0.5)
    assert not recipe.augmentation.mixup
    with torch.device("meta"):
        info = build_model(recipe.model, 1000, 3).info
    assert info.data.train_size == 224
    regularised = 0.0 if name == "imagenet_nf_resnet50" else 1.0
    assert info.options["drop_rate"] == 0.25 * regularised
    assert info.options["stochastic_depth_rate"] == 0.1 * regularised


@pytest.mark.parametrize("level", range(6))
def test_regnet_recipes_are_the_papers(level: int) -> None:
    recipe = load_recipe(f"imagenet_nf_regnet_b{level}")
    section = recipe.optimizer
    assert recipe.epochs == 360
    assert recipe.peak_learning_rate == pytest.approx(0.4)
    assert section.final_learning_rate * recipe.learning_rate_factor == pytest.approx(0.001)
    assert section.weight_decay == pytest.approx(5e-5 + 1e-5 * level)
    assert (section.momentum, section.nesterov) == (0.9, True)
    assert recipe.ema_decay == 0.99999
    assert recipe.augmentation.mixup == 0.2
    assert recipe.augmentation.cutmix > 0
    with torch.device("meta"):
        info = build_model(recipe.model, 1000, 3).info
    assert info.options["stochastic_depth_rate"] == 0.1
    assert info.options["drop_rate"] == (0.2, 0.2, 0.3, 0.3, 0.4, 0.4)[level]
    assert info.data.train_size == (192, 224, 240, 288, 320, 384)[level]
    assert info.data.test_size == (224, 256, 272, 320, 384, 456)[level]


def test_nfnet_recipe_clips_adaptively() -> None:
    recipe = load_recipe("imagenet_nfnet_f0")
    assert recipe.optimizer.adaptive_clipping == recipe.clipping == 0.01
    assert (recipe.augmentation.randaugment_operations, recipe.augmentation.randaugment_magnitude) == (4, 15)
    with torch.device("meta"):
        assert build_model(recipe.model, 1000, 3).info.options["drop_rate"] == 0.2


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_yaml_and_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["optimizer.weight_decay=1e-5", "model.options.alpha=3e-1", "data.mean=[0.5, 0.5, 0.1]"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert differences(recipe, load_recipe(path)) == []
    assert yaml.safe_load(recipe.to_yaml())["seed"] == 0  # defaults are written down, too


def test_overrides() -> None:
    recipe = load_recipe(
        "cifar10",
        [
            "data=some/folder",
            "data.limit=10",
            "model=nf_resnet50",
            "model.options.width=0.5",
            "optimizer.learning_rate_batch=null",
            "optimizer.weight_decay=1e-5",
            "checkpoint.every_minutes=null",
            "batch_size=2",
        ],
    )
    assert (recipe.data.path, recipe.data.limit) == ("some/folder", 10)
    assert (recipe.model.name, recipe.model.options["width"], recipe.model.options["stem"]) == (
        "nf_resnet50",
        0.5,
        "small",
    )
    assert recipe.optimizer.learning_rate_batch is None
    assert recipe.optimizer.weight_decay == 1e-5
    assert recipe.peak_learning_rate == recipe.optimizer.learning_rate
    assert recipe.checkpoint.every_minutes is None
    assert load_recipe(None, ["data=2024"]).data.path == "2024"  # a folder, not a number
    assert load_recipe({"model": "nf_resnet50"}, ["model.options.width=1"]).model.name == "nf_resnet50"


def test_an_option_that_is_null_is_the_models_own() -> None:
    recipe = load_recipe("cifar10", ["model=resnetv2_26", "model.options.alpha=null"])
    assert recipe.model.options == {"width": 0.25, "stem": "small"}
    with torch.device("meta"):
        assert build_model(recipe.model, 10, 3).info.options["width"] == 0.25


def test_the_mapping_that_came_is_left_alone() -> None:
    values = {"optimizer": {"learning_rate": 0.5}}
    load_recipe(values, ["optimizer.learning_rate=0.1"])
    assert values == {"optimizer": {"learning_rate": 0.5}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batchsize=3"], "batchsize: unknown key; did you mean batch_size"),
        (["optimizer.learning_rat=3"], "optimizer.learning_rat: unknown key; did you mean learning_rate"),
        (["data.validatoin=x"], "data.validatoin: unknown key; did you mean validation"),
        (["xyz=1"], "xyz: unknown key; there are model, data"),
        (["batch_size=many"], "batch_size: got 'many', expected a valid integer$"),
        (["batch_size=2.5"], "batch_size: got 2.5, expected a valid integer$"),
        (["batch_size=0"], "batch_size: got 0, expected greater than or equal to 1"),
        (["data.workers=many"], "data.workers: got 'many', expected a valid integer or 'auto'$"),
        (["augmentation.crop_scale=[0.5]"], "augmentation.crop_scale.1: .* expected one more value"),
        (["precision=fp16"], "precision: got 'fp16', expected 'float32' or 'bfloat16'"),
        (["epochs=.nan"], "epochs: got nan"),
        (["seed=-1"], "seed: got -1"),
        (["optimizer=3"], "optimizer: got 3, expected a valid dictionary$"),
        (["model.name.x=1"], "model.name is a value, not a section"),
        (["foo"], "expected key=value, got 'foo'"),
        (["batch_size=10", "microbatch_size=3"], "10 is not a multiple of microbatch_size 3"),
        (["batch_size=1", "augmentation.mixup=0.2"], "MixUp and CutMix mix examples"),
        (["batch_size=8", "microbatch_size=1", "augmentation.cutmix=1"], "MixUp and CutMix mix examples"),
        (["optimizer.momentum=0"], "nesterov needs a momentum"),
        (["epochs=0.5"], "warmup_epochs: 1.0 is more than epochs 0.5"),
        (["optimizer.final_learning_rate=2"], "final_learning_rate: it is above learning_rate"),
        (["evaluation.weights=ema"], "evaluation.weights: ema needs an ema_decay"),
        (["augmentation.crop_scale=[1.0, 0.5]"], "expected the smaller scale first"),
    ],
)
def test_what_cannot_be_followed(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(None, overrides)
    assert "\n" not in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"epochs: .*; .*batch_size: "):
        load_recipe(None, ["epochs=x", "batch_size=y"])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no file cifar11.*did you mean cifar10"):
        load_recipe("cifar11")
    with pytest.raises(RecipeError, match=r"there is no file some/where\.yaml"):
        load_recipe("some/where.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("model: nf_resnet50\noptimizer: {")
    with pytest.raises(RecipeError, match=r"broken\.yaml, line 2: not YAML"):
        load_recipe(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(RecipeError, match="expected keys and values, got a list"):
        load_recipe(path)
    path.write_text("")
    assert load_recipe(path) == Recipe()


def test_differences() -> None:
    old = load_recipe({"model": {"options": {"alpha": 0.3}}, "optimizer": {"learning_rate": 0.4}})
    new = load_recipe({}, ["optimizer.learning_rate=0.2"])
    assert differences(old, new) == ["model.options.alpha: 0.3 → (not set)", "optimizer.learning_rate: 0.4 → 0.2"]
    assert differences(new, old) == ["optimizer.learning_rate: 0.2 → 0.4", "model.options.alpha: (not set) → 0.3"]


@given(st.integers(1, 4096), st.floats(1e-6, 10.0))
def test_the_rate_is_in_proportion_to_the_batch(batch: int, rate: float) -> None:
    recipe = load_recipe({}, [f"batch_size={batch}", f"optimizer.learning_rate={rate!r}"])
    assert math.isclose(recipe.peak_learning_rate, rate * batch / 256, rel_tol=1e-12)


@pytest.mark.parametrize(("batch", "expected"), [(64, 0.02), (4, 0.32), (256, 0.005)])
def test_clipping_goes_against_the_rate(batch: int, expected: float) -> None:
    words = ["optimizer.adaptive_clipping=0.02", "optimizer.adaptive_clipping_batch=64", f"batch_size={batch}"]
    recipe = load_recipe("digits", words)
    assert recipe.clipping == pytest.approx(expected)
    at_reference = load_recipe("digits", [*words, "batch_size=64"])
    assert recipe.peak_learning_rate * expected == pytest.approx(at_reference.peak_learning_rate * 0.02)
    assert load_recipe("digits", words[::2]).clipping == 0.02
    assert load_recipe("digits", words[1:]).clipping is None
