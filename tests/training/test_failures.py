"""Bad input and bad luck: one clear error each, and nothing that was there is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY, assert_same_state, learned, quiet, run, table, tiny

from normfree.training import TrainingStopped, train
from normfree.training.checkpoint import load_checkpoint, save_checkpoint
from normfree.training.run_folder import RunFolder
from normfree.training.update import Learner

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny("epochs=1"), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}


def break_weights_after(monkeypatch: pytest.MonkeyPatch, update: int, value: float = float("nan")) -> None:
    step = Learner.step

    def stepping(self: Learner, *arguments: Any) -> Any:
        result = step(self, *arguments)
        if self.update == update:
            next(self.model.parameters()).data[0] = value
        return result

    monkeypatch.setattr(Learner, "step", stepping)


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_loss_that_is_not_finite(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    break_weights_after(monkeypatch, 5, value)
    with pytest.raises(
        TrainingStopped, match=r"the loss is (nan|inf) at update 6; the signal is in .*failure"
    ) as error:
        train(tiny("ema_decay=0.9", "checkpoint.every_epochs=0.25"), folder.path, say=quiet)
    assert "adaptive_clipping may help" in str(error.value)
    assert f"the last good state in {folder.last}" in str(error.value)
    state = load_checkpoint(folder.last)
    assert all(bool(tensor.isfinite().all()) for tensor in learned(state).values())
    assert state["update"] == (4 if value != value else 5)
    signal_file = json.loads((folder.failure / "signal.json").read_text())
    assert len(signal_file["points"]) > 5
    assert (folder.failure / "signal.png").read_bytes().startswith(b"\x89PNG")
    assert not folder.result.exists()


def test_a_loss_that_is_looked_at_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the loss is looked at with the log and before an evaluation: no NaN is kept, the update is named."""
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, batches, check=None: step(self, batches))
    break_weights_after(monkeypatch, 5)
    folder = RunFolder(tmp_path / "run")
    settings = ("log.every=100", "checkpoint.every_epochs=0.25")
    with pytest.raises(TrainingStopped, match="the loss is nan at update 6;"):
        train(tiny(*settings), folder.path, say=quiet)
    assert load_checkpoint(folder.last)["update"] == 4
    assert load_checkpoint(folder.best)["update"] == 4


def test_a_diverged_run_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_weights_after(patch, 5)
        with pytest.raises(TrainingStopped):
            train(tiny(), tmp_path / "run", say=quiet)
    state = run(tiny("optimizer.learning_rate=0.01"), resume=tmp_path / "run", force=True)
    assert state["update"] == 8


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    write, writes = torch.save, 0

    def fills_up(state: Any, file: Any) -> None:
        nonlocal writes
        writes += 1
        if writes <= 2:  # one evaluation's best, one last
            write(state, file)
            return
        file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fills_up)
        with pytest.raises(OSError, match=r"cannot write .*(No space left|PytorchStreamWriter).*untouched"):
            train(tiny("evaluation.every_epochs=1"), folder.path, say=quiet)
    assert load_checkpoint(folder.last)["update"] == 4
    assert sorted(file.name for file in folder.checkpoints.iterdir()) == ["best.pt", "last.pt"]
    assert_same_state(run(None, resume=folder.path), run(tiny(), tmp_path / "whole"))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"number": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"number": lambda: 2})
    assert load_checkpoint(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_folder_that_is_there_is_left_alone(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    with pytest.raises(FileExistsError, match=f"is there already; go on with it by --resume {finished}; nothing was"):
        train(tiny(), finished, say=quiet)
    assert contents(finished) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already; nothing was overwritten"):
        train(tiny(), tmp_path / "notes", say=quiet)
    with pytest.raises(FileExistsError):
        train(tiny(), tmp_path / "notes" / "text", say=quiet)
    assert contents(tmp_path / "notes") == {"text": b"mine"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".recipe-x.yaml").write_text("half a recipe of a process that was killed")
    run(tiny("epochs=1"), tmp_path / "empty")
    assert not (tmp_path / "empty" / ".recipe-x.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=nowhere"], "nowhere"),
        (["batch_size=1000"], "has 64 examples, fewer than one batch of 1000"),
        (["model=nf_resnet27"], "nf_resnet27.*did you mean"),
        (["model.options.widht=0.5"], "model nf_resnet26: .*widht"),
        (["model=skipinit_resnet26", "model.options.alpha=0.3"], "alpha"),
        (["model=timm:resnet999"], "timm has no model"),
        (["model=torchvision:resnet999"], "torchvision has no model"),
        (["model=nowhere.py:make"], "there is no file nowhere.py"),
        (["model=torch.nn:Identity", "model.options={}"], "nothing to train"),
        (["model.recompute=true", "model=torchvision:resnet18", "model.options={}"], "has no set_grad_checkpointing"),
        (["device=cuda:99"], "cuda:99 was asked for|no GPU"),
        (["calibrate=theory", "model=torchvision:resnet18", "model.options={}"], "calibrate|layer"),
        (["calibrate=center", "model=resnetv2_26"], r"calibrate: center needs .*calibrate=none"),
        (["model.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["optimizer.learning_rat=1"], "did you mean learning_rate"),
    ],
)
def test_one_line_and_exit_code_2(overrides: list[str], message: str, tmp_path: Path, command: Command) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(tiny().to_yaml())
    code, printed, errors = command("train", str(recipe), *overrides, "--out", str(out))
    assert code == 2
    assert printed == ""
    lines = errors.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not out.exists()


def test_errors_of_the_commands(finished: Path, tmp_path: Path, command: Command) -> None:
    before = contents(finished)
    cases = {
        ("train", "--resume", str(tmp_path)): "is no folder of a run",
        ("train", "--resume", str(finished), "epochs=2"): "--force is needed: epochs: 1.0 → 2.0",
        ("train", "--out", str(finished)): "is there already",
        ("train", "--resume", str(finished), "--out", str(tmp_path / "x")): "give out or resume, not both",
        ("train", "digits", "cifar10"): "expected one recipe",
        ("train", "digts"): "did you mean digits",
        ("eval", str(tmp_path)): "is no folder of a run",
        ("eval", str(finished), "--weights", "ema"): "this run has no averaged weights",
        ("eval", str(finished), "--data", "nowhere"): "nowhere",
        ("reproduce", "microbach"): "did you mean microbatch",
        ("reproduce", "microbatch"): "needs --data",
    }
    for words, message in cases.items():
        code, _, errors = command(*words)
        assert code == 2, words
        assert message in errors, words
        assert len(errors.splitlines()) == 1, words
    assert contents(finished) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_of_signals(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    step = Learner.step

    def stepping(self: Learner, *arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Learner, "step", stepping)
    out = tmp_path / "run"
    found, _, errors = command("train", *TINY, "--out", str(out))
    assert found == code
    assert errors.splitlines()[-1] == f"stopped at update 1 of 8 as asked; normfree train --resume {out} goes on"


def test_ctrl_c_before_training_begins(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("normfree.training.loop.open_data", interrupted)
    assert command("train", *TINY)[0] == 130
    assert not Path("runs").exists()


def test_lost_checkpoint_files(finished: Path, tmp_path: Path, command: Command) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    last = copy / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    for words in (("train", "--resume", str(copy)), ("eval", str(copy))):
        code, _, errors = command(*words)
        assert (code, len(errors.splitlines())) == (2, 1)
        assert "last.pt is no readable checkpoint" in errors
    assert command("eval", str(copy), "--checkpoint", "best")[0] == 0


def picture(path: Path, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def class_folders(root: Path, classes: str = "ab", count: int = 8, validation: str | None = None) -> Path:
    for split, names in (("train", classes), ("val", validation or classes)):
        for name in names:
            for i in range(count):
                picture(root / split / name / f"{i}.png")
    return root


def parquet(path: Path, labels: list[int | None]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    Image.new("RGB", (12, 12)).save(content, "PNG")
    images = [{"bytes": content.getvalue(), "path": None}] * len(labels)
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), path)
    return path


def no_image_can_be_read(root: Path) -> Path:
    class_folders(root)
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    return root


BAD_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty folder": (lambda root: root, "has no class folders, and no images"),
    "one class": (lambda root: class_folders(root, "a"), "16 training examples .* one class|are of one class"),
    "a class of validation alone": (
        lambda root: class_folders(root, "ab", 8, "ac"),
        "has a class 'c' that is not among",
    ),
    "a label below 0": (lambda root: parquet(root / "t.parquet", [0, 1, -1, 1] * 8), "has the label -1 .*count from 0"),
    "a missing label": (lambda root: parquet(root / "t.parquet", [0, None, 1] * 8), "8 of 24 labels .* are missing"),
    "no readable image": (no_image_can_be_read, "no readable image found in .*data"),
    "no image that can be read, of a known mean": (no_image_can_be_read, "cannot be read as images; .*truncated"),
    "too few for a batch": (lambda root: class_folders(root, "ab", 3), "has 6 examples, fewer than one batch of 16"),
}


@pytest.mark.parametrize("kind", list(BAD_DATA))
def test_data_that_nothing_can_be_learned_from(kind: str, tmp_path: Path, command: Command) -> None:
    make, message = BAD_DATA[kind]
    (tmp_path / "data").mkdir()
    data = make(tmp_path / "data")
    settings = [*TINY, f"data={{path: '{data}', size: 8, workers: 0}}"]
    if "of a known mean" in kind:
        settings += ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.2, 0.2, 0.2]"]
    code, printed, errors = command("train", *settings, "--out", str(tmp_path / "run"))
    assert (code, printed) == (2, "")
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert errors.splitlines()[-1] == lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in errors
    if "of a known mean" not in kind:  # which shows only when images are read
        assert len(errors.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_mixed_modes_and_sizes_and_a_few_broken_images(tmp_path: Path, command: Command) -> None:
    """Trained on all the same, and said."""
    root = class_folders(tmp_path / "data", count=20)
    for number, mode in enumerate(("L", "RGBA", "P", "1", "LA", "CMYK")):
        ending = "tif" if mode == "CMYK" else "png"
        picture(root / "train" / "a" / f"odd{number}.{ending}", (9 + 5 * number, 30), mode)
    (root / "train" / "b" / "3.png").write_bytes(b"not an image at all")
    (root / "val" / "a" / "5.png").write_bytes((root / "val" / "a" / "5.png").read_bytes()[:70])
    settings = [*TINY, f"data={{path: '{root}', size: 8, workers: 0}}", "epochs=3"]
    code, _, errors = command("train", *settings, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    assert "examples could not be read so far; others took their places" in errors
    assert "1 not readable" in errors
    assert table(tmp_path / "run" / "evaluations.csv")[-1][-2:] == ["39", "1"]
    code, printed, errors = command("eval", str(tmp_path / "run"))
    assert code == 0
    assert "39 examples" in printed
    assert re.search(r"not readable: .*a.5\.png", errors)


def test_a_recipe_for_another_model(finished: Path, command: Command) -> None:
    """Going on with a run by the recipe of another one shows every difference, and changes nothing."""
    before = contents(finished)
    code, _, errors = command("train", "imagenet_nf_regnet_b0", "--resume", str(finished))
    assert (code, len(errors.splitlines())) == (2, 1)
    for difference in (
        "model.name: 'nf_resnet26' → 'nf_regnet_b0'",
        "epochs: 1.0 → 360.0",
        "ema_decay: None → 0.99999",
        "model.options.stochastic_depth_rate: (not set) → 0.1",
    ):
        assert difference in errors
    for forced in (["--force"], ["--force", "epochs=1", "batch_size=16", "data=digits"]):
        code, _, errors = command("train", "imagenet_nf_regnet_b0", *forced, "--resume", str(finished))
        assert code == 2
        assert len(errors.splitlines()) == 1
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["train", "eval", "reproduce"])
def test_help(name: str, command: Command) -> None:
    code, printed, errors = command(name, "--help")
    assert (code, errors) == (0, "")
    assert f"normfree {name}" in printed
    assert max(len(line) for line in printed.splitlines()) <= 120
