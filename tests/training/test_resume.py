"""A run that was stopped, however it was, ends as one that was not: bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import EVERYTHING, assert_same_state, learned, quiet, run, tables, tiny

from normfree.training import RecipeError, TrainingInterrupted, evaluate_run, train
from normfree.training.checkpoint import ResumeError, load_checkpoint, save_checkpoint
from normfree.training.run_folder import RunFolder
from normfree.training.stopping import stop_on_signals
from normfree.training.update import Learner

UPDATES = 8


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(tiny(*EVERYTHING, "evaluation.every_epochs=0.5"), folder)


def stop_after(monkeypatch: pytest.MonkeyPatch, update: int, number: int) -> None:
    """A signal to this process after one update."""
    step = Learner.step

    def stepping(self: Learner, *args: Any) -> Any:
        result = step(self, *args)
        if self.update == update:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Learner, "step", stepping)


@pytest.mark.parametrize(
    ("number", "stops"),
    [
        (signal.SIGTERM, (1,)),
        (signal.SIGTERM, (2, 3)),
        (signal.SIGINT, (4, 6)),
        (signal.SIGTERM, (8,)),
    ],
)
def test_stopped_at_any_update(
    number: int,
    stops: tuple[int, ...],
    uninterrupted: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, resumed = tmp_path / "run", {}
    for place, stop in enumerate((*stops, None)):
        options = {"resume": folder} if place else {"out": folder}
        recipe = None if place else tiny(*EVERYTHING, "evaluation.every_epochs=0.5")
        with monkeypatch.context() as patch:
            if stop is None:
                resumed = run(recipe, **options)
                break
            stop_after(patch, stop, number)
            with pytest.raises(TrainingInterrupted, match=f"stopped at update {stop} of 8") as caught:
                train(recipe, **options, say=quiet)
            assert caught.value.signal == number
            assert load_checkpoint(folder / "checkpoints" / "last.pt")["update"] == stop
    assert_same_state(uninterrupted[1], resumed)
    assert tables(folder) == tables(uninterrupted[0])
    best = [load_checkpoint(path / "checkpoints" / "best.pt") for path in (folder, uninterrupted[0])]
    assert best[0]["update"] == best[1]["update"]
    assert all(torch.equal(value, best[1]["model"][key]) for key, value in best[0]["model"].items())


def test_signals_are_what_they_were_afterwards() -> None:
    def own(number: int, frame: Any) -> None:
        pass

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, own) for number in numbers}
    try:
        with stop_on_signals():
            assert all(signal.getsignal(number) is not own for number in numbers)
        assert all(signal.getsignal(number) is own for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


DRIVER = """
import io, os, signal, sys
import torch
from normfree.cli import main

write, count, victim = torch.save, 0, int(os.environ["VICTIM"])

def killed_in_the_middle(state, file):
    global count
    if not file.name.endswith(".pt") or "/.last" not in file.name:
        return write(state, file)
    count += 1
    if count != victim:
        return write(state, file)
    whole = io.BytesIO()
    write(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_in_the_middle
main()
"""


def test_killed_in_the_middle_of_a_write_and_again(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    frequent = ("checkpoint.every_epochs=0.25", "evaluation.every_epochs=0.5")

    def killed(write: int, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", DRIVER, "train", *arguments]
        environment = {**os.environ, "VICTIM": str(write)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        return [file.name for file in (folder / "checkpoints").iterdir() if file.name.startswith(".")]

    (tmp_path / "recipe.yaml").write_text(tiny(*EVERYTHING, *frequent).to_yaml())
    assert len(killed(1, str(tmp_path / "recipe.yaml"), "--out", str(folder))) == 1  # half a file, and no other
    assert not (folder / "checkpoints" / "last.pt").is_file()
    assert len(killed(2, "--resume", str(folder))) == 1
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["update"] == 1
    assert_same_state(uninterrupted[1], run(None, resume=folder))
    assert tables(folder) == tables(uninterrupted[0])
    assert [file.name for file in folder.rglob(".*-*")] == []


def test_a_run_without_a_checkpoint_begins_again(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder(folder).start(tiny(*EVERYTHING, "evaluation.every_epochs=0.5"))
    (folder / "log.csv").write_text("update,epoch,loss,learning_rate,images_per_second,data_wait\n3,0.75,9,9,9,9\n6,")
    assert_same_state(uninterrupted[1], run(None, resume=folder))
    assert tables(folder) == tables(uninterrupted[0])


def test_going_on_with_a_finished_run_changes_nothing(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, state = uninterrupted
    before = tables(folder)
    assert_same_state(state, run(None, resume=folder))
    assert tables(folder) == before


def test_checkpoints_by_the_clock_are_enough(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    settings = ("checkpoint={every_epochs: null, every_minutes: 1.0e-9}", "evaluation.every_epochs=0.5")
    assert_same_state(uninterrupted[1], run(tiny(*EVERYTHING, *settings), tmp_path / "run"))


def test_a_changed_recipe(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = tiny("epochs=1", "ema_decay=0.9")
    run(first, folder)
    longer = tiny("epochs=2", "ema_decay=0.9", "optimizer.learning_rate=0.05", "optimizer.weight_decay=0.01")
    with pytest.raises(RecipeError, match=r"--force is needed: epochs: 1.0 → 2.0; optimizer.learning_rate: 0.2 → 0.05"):
        run(longer, resume=folder)
    assert RunFolder(folder).read_recipe() == first
    state = run(longer, resume=folder, force=True)
    assert state["update"] == UPDATES
    group = state["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.05, 0.01)  # the new ones, in force
    assert RunFolder(folder).read_recipe() == longer
    rates = [float(row[3]) for row in tables(folder)[0][1:]]
    assert max(rates[1:]) < 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=8"], "an epoch had 4 updates and now has 8"),
        (["data.limit=48"], "an epoch had 4 updates and now has 3"),
        (["epochs=0.5"], "it has made 4 updates already, more than the 2 of 0.5 epochs"),
        (["model.options.width=0.125"], "the checkpoint is of another model: size mismatch for"),
        (["model=skipinit_resnet26"], "the checkpoint is of another model: "),
        (["model.options.widht=1"], "widht"),
    ],
)
def test_what_force_cannot_do(overrides: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = tiny("epochs=1")
    before = learned(run(recipe, folder))
    with pytest.raises(ValueError, match=message):
        run(tiny("epochs=1", *overrides), resume=folder, force=True)
    assert RunFolder(folder).read_recipe() == recipe  # still one that can be gone on with
    after = learned(load_checkpoint(folder / "checkpoints" / "last.pt"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="is no folder of a run"):
        train(resume=tmp_path)
    with pytest.raises(ValueError, match="no run to resume"):
        train()
    with pytest.raises(ValueError, match="give out or resume"):
        train(tiny(), tmp_path / "a", resume=tmp_path / "b")


@pytest.mark.parametrize("damage", ["half", "empty", "text", "older"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny())
    folder.checkpoints.mkdir()
    save_checkpoint(folder.last, {"model": {"weight": torch.ones(1000)}})
    content = folder.last.read_bytes()
    if damage == "older":
        torch.save({"model": {}}, folder.last)
    else:
        folder.last.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ResumeError, match=r"last.pt is no (readable )?checkpoint"):
        train(resume=folder.path, say=quiet)


def test_two_processes_on_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny())
    claim = (
        "import sys; from pathlib import Path; from normfree.training.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claimed(): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", claim, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ResumeError, match="worked on by another process"):
            train(resume=folder.path, say=quiet)
        other.communicate("")
    assert run(None, resume=folder.path)["update"] == UPDATES


def test_averages_can_be_added_to_a_run(tmp_path: Path) -> None:
    run(tiny("epochs=1"), tmp_path / "run")
    run(tiny("epochs=2", "ema_decay=0.5"), resume=tmp_path / "run", force=True)
    assert evaluate_run(tmp_path / "run", weights="ema").loss != evaluate_run(tmp_path / "run", weights="raw").loss
