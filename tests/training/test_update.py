"""One update against the same one written out by hand, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_state, run, tiny
from torch import Tensor, nn

import normfree as nf
from normfree.training import Recipe
from normfree.training.distributed import Process, plan_batches
from normfree.training.optimization import averaged, learning_rate_factor, parameter_groups
from normfree.training.recipe import OptimizerSection
from normfree.training.update import Learner

CPU = Process(torch.device("cpu"))
UPDATES, BATCH = 6, 8
RATE = 0.02
OPTIMIZER = f"optimizer={{learning_rate: {RATE}, learning_rate_batch: null, warmup_epochs: 1, weight_decay: 0.01}}"
BASE = (f"batch_size={BATCH}", "epochs=3", "label_smoothing=0.1", OPTIMIZER)


def small_net() -> nn.Module:
    torch.manual_seed(1)
    model = nf.create_model("nf_resnet26", width=0.0625, stem="small", num_classes=5, skip_gain=0.3)
    return model.double()


def examples() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield images, torch.randint(5, (BATCH,), generator=generator)


def learner(model: nn.Module, recipe: Recipe) -> Learner:
    plan = plan_batches(recipe.batch_size, recipe.microbatch_size, 1)
    return Learner(model, recipe, plan, CPU, UPDATES, UPDATES // 3)


def trained(recipe: Recipe, model: nn.Module | None = None) -> tuple[Learner, list[float]]:
    model = small_net() if model is None else model
    trainee = learner(model.train(), recipe)
    micro, losses = trainee.plan.microbatch_size, []
    for images, targets in examples():
        parts = zip(images.split(micro), targets.split(micro), range(BATCH), strict=False)
        losses.append(float(trainee.step(parts)))
    return trainee, losses


def by_hand(clip_norm: float | None = None, adaptive: float | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """SGD with Nesterov momentum as in its formulas: the paper's recipe on the whole batch at once."""
    model = small_net().train()
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses = []
    for update, (images, targets) in enumerate(examples()):
        log_p = model(images).log_softmax(1)
        right = log_p.gather(1, targets[:, None]).mean()
        loss = -(0.9 * right + 0.1 * log_p.mean())
        losses.append(loss.item())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        if clip_norm is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) + 1e-6  # as torch does
            gradients = {name: g * min(1.0, clip_norm / norm) for name, g in gradients.items()}
        if adaptive is not None:
            gradients = {name: clipped(name, g, parameters[name].detach(), adaptive) for name, g in gradients.items()}
        warm = 2
        rate = RATE * (
            (update + 1) / warm if update < warm else (1 + math.cos(math.pi * (update - warm) / (UPDATES - warm))) / 2
        )
        with torch.no_grad():
            for name, value in parameters.items():
                gradient = gradients[name] + (0.01 * value if name.endswith("weight") else 0.0)
                velocity[name] = 0.9 * velocity[name] + gradient
                value -= rate * (gradient + 0.9 * velocity[name])
    return {name: value.detach() for name, value in parameters.items()}, losses


def clipped(name: str, gradient: Tensor, weight: Tensor, clipping: float) -> Tensor:
    if name.startswith("head.classifier"):
        return gradient
    if gradient.ndim < 2:
        return gradient * min(1.0, clipping * max(float(weight.norm()), 1e-3) / max(float(gradient.norm()), 1e-30))
    rows = zip(gradient, weight, strict=True)
    return torch.stack(
        [g * min(1.0, clipping * max(float(w.norm()), 1e-3) / max(float(g.norm()), 1e-30)) for g, w in rows]
    )


@pytest.mark.parametrize("sharing", ["true", "false"])
@pytest.mark.parametrize("microbatch", [8, 4, 1])
def test_the_update_is_the_one_in_the_formulas(microbatch: int, sharing: str) -> None:
    recipe = tiny(*BASE, f"microbatch_size={microbatch}", f"share_standardization={sharing}")
    trainee, losses = trained(recipe)
    expected, expected_losses = by_hand()
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert losses[-1] < losses[0]
    for name, parameter in trainee.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize(("key", "value"), [("clip_norm", 0.3), ("adaptive_clipping", 0.02)])
def test_clipping(key: str, value: float) -> None:
    trainee, losses = trained(tiny(*BASE, f"optimizer.{key}={value}"))
    assert "head.classifier.weight" in dict(trainee.model.named_parameters())
    unclipped, _ = by_hand()
    expected, expected_losses = by_hand(**{"clip_norm" if key == "clip_norm" else "adaptive": value})
    assert losses == pytest.approx(expected_losses, rel=1e-8)
    for name, parameter in trainee.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert any(not torch.allclose(expected[name], unclipped[name]) for name in expected)


def test_only_weights_decay() -> None:
    model = nf.create_model("nf_regnet_b0", width=0.25)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(
        model, OptimizerSection(weight_decay=0.1, scalar_learning_rate=0.5, vector_learning_rate=0.25)
    )
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name in names.values() if name.rpartition(".")[2] == "weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)
    slow = {names[id(p)] for group in groups if group["rate"] == 0.5 for p in group["params"]}
    assert slow == {name for name in names.values() if name.endswith("skip_gain")}
    vectors = {names[id(p)] for group in groups if group["rate"] == 0.25 for p in group["params"]}
    assert vectors == set(names.values()) - decayed - slow
    everything = parameter_groups(model, OptimizerSection(weight_decay=0.1, decay_scalars=True))
    assert {group["weight_decay"] for group in everything} == {0.1}


def test_the_classifier_has_a_rate_of_its_own() -> None:
    section = OptimizerSection(classifier_learning_rate=0.1)
    for model, name in (
        (nf.create_model("nf_resnet26", width=0.25), "head.classifier.weight"),
        (nn.Linear(3, 5), "weight"),
    ):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        slow = [
            names[id(p)] for group in parameter_groups(model, section) if group["rate"] == 0.1 for p in group["params"]
        ]
        assert slow == [name]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        learner(nn.Linear(3, 5).requires_grad_(False), tiny(*BASE))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates(schedule: str) -> None:
    section = OptimizerSection(learning_rate=0.4, final_learning_rate=0.1, warmup_epochs=2.0, schedule=schedule)
    factor = learning_rate_factor(section, updates=30, updates_per_epoch=5)
    rates = [0.4 * factor(update) for update in range(30)]
    assert rates[:10] == pytest.approx([0.04 * (update + 1) for update in range(10)])
    assert rates[10] == pytest.approx(0.4)
    middle = {"cosine": 0.25, "linear": 0.25, "constant": 0.4}[schedule]
    assert rates[20] == pytest.approx(middle)
    quarter = {"cosine": 0.1 + 0.15 * (1 + math.cos(math.pi / 4)), "linear": 0.325, "constant": 0.4}[schedule]
    assert rates[15] == pytest.approx(quarter)
    assert 0.4 * factor(30) == pytest.approx(0.4 if schedule == "constant" else 0.1)


def test_the_schedule_of_a_run_goes_over_all_of_it() -> None:
    trainee, _ = trained(tiny(*BASE, "optimizer.final_learning_rate=0.02"))
    assert trainee.learning_rate == pytest.approx(0.02)


def test_average_against_its_formula() -> None:
    trainee, _ = trained(tiny(*BASE, "ema_decay=0.35"))
    assert trainee.average is not None
    model = small_net().train()
    other, average = learner(model, tiny(*BASE)), {}
    for n, (images, targets) in enumerate(examples()):
        other.step([(images, targets, 0)])
        decay = min(0.35, (1 + n) / (10 + n)) if n else 0.0
        for name, value in model.named_parameters():
            average[name] = decay * average.get(name, 0.0) + (1 - decay) * value.detach()
    for name, value in trainee.average.module.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], rtol=1e-6, atol=1e-9, msg=name)
    assert trainee.evaluated is trainee.average.module


def test_the_average_takes_whole_numbers_as_they_are() -> None:
    norm = nn.BatchNorm1d(3)
    average = averaged(norm, 0.9)
    for _ in range(4):
        norm(torch.randn(8, 3))
        average.update_parameters(norm)
    assert int(average.module.num_batches_tracked) == 4
    assert not torch.equal(average.module.running_mean, norm.running_mean)


def test_microbatches_are_alike_wherever_they_are_computed() -> None:
    """Dropout and stochastic depth belong to the microbatch, not to what was drawn before it."""
    model = nf.create_model("nf_resnet26", width=0.0625, stem="small", num_classes=5, drop_rate=0.5)
    images, targets = next(examples())
    parts = [(images[:4].float(), targets[:4], 0), (images[4:].float(), targets[4:], 1)]
    recipe = tiny(*BASE, "microbatch_size=4", "share_standardization=false")
    losses = []
    for order in (parts, parts[::-1]):
        torch.rand(7)
        losses.append(float(learner(copy.deepcopy(model).train(), recipe).step(order)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    renumbered = [(*part[:2], 9) for part in parts]
    assert losses[0] != pytest.approx(float(learner(copy.deepcopy(model), recipe).step(renumbered)), rel=1e-6)


@pytest.mark.parametrize("setting", ["precision=bfloat16", "channels_last=true", "model.recompute=true"])
def test_ways_to_compute_give_the_same_training(setting: str, tmp_path: Path) -> None:
    gentle = "optimizer.learning_rate=0.002"
    plain, other = run(tiny(gentle), tmp_path / "plain"), run(tiny(gentle, setting), tmp_path / "other")
    tolerance = 0.03 if "bfloat16" in setting else 1e-3
    for name, value in plain["model"].items():
        change = (value - other["model"][name]).norm() / value.norm().clamp(min=0.1)
        assert change < tolerance, name
    if setting == "model.recompute=true":
        assert_same_state(plain, other)
    else:
        assert any(not torch.equal(value, other["model"][name]) for name, value in plain["model"].items())
