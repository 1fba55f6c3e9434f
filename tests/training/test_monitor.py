"""A signal that is measured during training leaves the training as it is."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import EVERYTHING, assert_same_state, quiet, run, tables, tiny
from torch import Tensor, nn

import normfree as nf
from normfree.training import SignalMonitor, TrainingInterrupted, lightning_callback, train
from normfree.training.update import Learner


class Block(nn.Module):
    """All that could be disturbed: running statistics, dropout, frozen modules, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def a_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.Flatten(), nn.Linear(4 * 36, 3))


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def everything_of(model: nn.Module) -> dict[str, Any]:
    """What a measurement must leave alone."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameters": [(id(p), p._version, p.requires_grad, p.clone()) for p in model.parameters()],
        "gradients": [
            None if p.grad is None else (id(p.grad), p.grad._version, p.grad.clone()) for p in model.parameters()
        ],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "random": [torch.get_rng_state(), random.getstate(), *np.random.get_state()[1:]],  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.all(one == other))


@pytest.mark.parametrize("inputs", ["a tensor", "a loader"])
def test_nothing_of_the_model_changes(inputs: str, tmp_path: Path) -> None:
    model = a_model()
    model[2].eval()  # frozen, as in fine-tuning
    model[2].body[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *arguments: None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    a_step(model, optimizer)
    images = torch.randn(6, 3, 8, 8)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 3, shuffle=True)
    monitor = SignalMonitor(model, images if inputs == "a tensor" else batches, 1, tmp_path)
    before = everything_of(model)
    for step in range(2):
        assert monitor(step) is not None
    after = everything_of(model)
    assert [name for name in before if not same(before[name], after[name])] == []


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    def trained(every: int | None) -> tuple[list[Tensor], list[tuple[int, nf.SignalPropagation]]]:
        torch.manual_seed(1)
        model = a_model()
        heard: list[int] = []
        monitor = None
        if every is not None:
            probe = torch.ones(2, 3, 8, 8)
            monitor = SignalMonitor(model, probe, every, tmp_path, lambda step, _: heard.append(step))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(5):
            if monitor is not None:
                monitor(step)
            a_step(model, optimizer)
        signals = [] if monitor is None else monitor.signals
        assert heard == [step for step, _ in signals]
        return list(model.state_dict().values()), signals

    (weights, signals), (unwatched, _) = trained(2), trained(None)
    assert same(weights, unwatched)
    assert [step for step, _ in signals] == [0, 2, 4]
    names = [f"step-{step:08d}.{end}" for step in (0, 2, 4) for end in ("json", "png")]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    kept = json.loads((tmp_path / "step-00000002.json").read_text())
    assert kept["label"] == "step 2"
    points = signals[1][1].points
    assert [point["avg_channel_variance"] for point in kept["points"]] == [p.avg_channel_variance for p in points]
    assert points[0].avg_channel_variance != signals[0][1].points[0].avg_channel_variance  # it did train


def test_the_measurement_is_spp() -> None:
    model, images = a_model(), torch.randn(2, 3, 8, 8)
    measured, expected = SignalMonitor(model, images).measure(7), nf.spp(model, images)
    assert [vars(point) for point in measured.points] == [vars(point) for point in expected.points]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="every: expected a positive number of steps, got 0"):
        SignalMonitor(a_model(), torch.ones(1, 3, 8, 8), every=0)
    with pytest.raises(ValueError, match="to go through again and again, got a generator"):
        SignalMonitor(a_model(), (torch.ones(1, 3, 8, 8) for _ in range(3)))


def test_a_run_with_signals_is_the_run_without(tmp_path: Path) -> None:
    with_signals = run(tiny(*EVERYTHING, "log.signal_every=3", "log.tensorboard=true"), tmp_path / "with")
    assert_same_state(run(tiny(*EVERYTHING), tmp_path / "without"), with_signals)
    assert tables(tmp_path / "with") == tables(tmp_path / "without")
    names = [f"step-{step:08d}.{end}" for step in (0, 3, 6) for end in ("json", "png")]
    assert sorted(file.name for file in (tmp_path / "with" / "signal").iterdir()) == names
    assert not (tmp_path / "without" / "signal").exists()
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert_tensorboard_says_the_same(tmp_path / "with")


def assert_tensorboard_says_the_same(folder: Path) -> None:
    """As the tables of a run, each step once, and the pictures of its signals."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    log, evaluations = tables(folder)
    for prefix, rows in (("train", log), ("validation", evaluations)):
        for column in set(rows[0]) - {"update", "examples", "skipped"}:
            if (prefix, column) == ("validation", "epoch"):
                continue
            found = [(event.step, event.value) for event in events.Scalars(f"{prefix}/{column}")]
            expected = [(int(row[0]), pytest.approx(float(row[rows[0].index(column)]), rel=1e-5)) for row in rows[1:]]
            assert found == expected, column
    assert [image.step for image in events.Images("signal")] == [0, 3, 6]
    assert events.Images("signal")[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_resumed_run_measures_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had measured updates 0, 3 and 6, and is gone on with from 5."""
    settings = (*EVERYTHING, "log.signal_every=3", "log.tensorboard=true", "checkpoint.every_epochs=null")
    step = Learner.step

    def stepping(self: Learner, *arguments: Any) -> Any:
        result = step(self, *arguments)
        if self.update == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stepping)
        with pytest.raises(TrainingInterrupted):
            train(tiny(*settings), tmp_path / "run", say=quiet)
    run(None, resume=tmp_path / "run")
    assert_tensorboard_says_the_same(tmp_path / "run")


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of Lightning that the callback uses: the class to derive from. The trainer is an object, too."""
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError:
        package, module = ModuleType("lightning"), ModuleType("lightning.pytorch")
        package.pytorch = module  # type: ignore[attr-defined]
        module.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lightning", package)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", module)


@pytest.mark.usefixtures("lightning")
def test_the_lightning_callback(tmp_path: Path) -> None:
    """Two batches to each optimiser step, as with ``accumulate_grad_batches=2``."""
    model, images = a_model(), torch.randn(2, 3, 8, 8)
    callback = lightning_callback(images, every=2, folder=tmp_path)
    for batch in range(10):
        trainer = SimpleNamespace(is_global_zero=True, global_step=batch // 2)
        callback.on_train_batch_start(trainer, model, (images, None), batch)
    assert [step for step, _ in callback.monitor.signals] == [0, 2, 4]
    assert len(list(tmp_path.glob("step-*.json"))) == 3
    other = lightning_callback(images, every=1)
    other.on_train_batch_start(SimpleNamespace(is_global_zero=False, global_step=0), model, None, 0)
    assert other.monitor is None


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        lightning_callback(torch.ones(1, 3, 8, 8))
