"""Two processes train as one does, and go on when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import EVERYTHING, run, table, tables, tensors, tiny

from normfree.training import evaluate_run
from normfree.training.distributed import Process, plan_batches, this_process
from normfree.training.run_folder import RunFolder

HERE = Path(__file__).parent
NET = f"model={{name: '{HERE / 'double_net.py'}:make'}}"
ALL = tuple(setting for setting in EVERYTHING if setting != "microbatch_size=8")
CASES = {
    "plain": [NET, "microbatch_size=8"],
    "accumulated": [NET, "microbatch_size=4", "share_standardization=false"],
    "shared": [NET, "microbatch_size=4", "share_standardization=true"],
    "shared_once": [NET, "microbatch_size=8", "share_standardization=true"],
    "one_to_validate_on": [NET, "microbatch_size=8", "epochs=1", "data.validation_limit=1"],
    "everything": [NET, *ALL, "microbatch_size=4"],
    "dies": [NET, *ALL, "microbatch_size=8", "checkpoint.every_epochs=0.5", "evaluation.every_epochs=0.5"],
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*launcher, "--monitor-interval=0.1", HERE / "several_processes.py", folder, json.dumps(CASES)]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_the_same_training_as_on_one(name: str, on_two: Path, tmp_path: Path) -> None:
    one = run(tiny(*CASES[name]), tmp_path / "one")
    two = torch.load(on_two / name / "checkpoints" / "last.pt", weights_only=True)
    assert two["update"] == one["update"]
    compared = 0
    for key in ("model", "optimizer", "average"):
        theirs = dict(tensors(two[key]))
        for place, value in tensors(one[key]):
            torch.testing.assert_close(value, theirs[place], rtol=1e-6, atol=1e-9, msg=f"{key}{place}")
            compared += 1
    assert compared > 150
    assert tables(on_two / name) == tables(tmp_path / "one")


def test_a_process_that_died_was_started_anew_and_went_on(on_two: Path) -> None:
    starts = json.loads((on_two / "dies" / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    assert len({start["launch"] for start in starts}) == 1
    assert [row[0] for row in table(on_two / "dies" / "evaluations.csv")[1:]] == ["2", "4", "6", "8"]


def test_the_same_evaluation_as_on_one(on_two: Path) -> None:
    one = evaluate_run(on_two / "dies", checkpoint="best").to_dict()
    two = json.loads((on_two / "evaluation.json").read_text())
    assert one["examples"] == 40
    for key in ("examples", "classes", "top1", "top5", "skipped"):
        assert two[key] == one[key]
    for key in ("loss", "calibration_error"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_another_launch_does_not_take_a_run_over(tmp_path: Path) -> None:
    """A restart goes on with what its own torchrun has begun, and with nothing else."""
    folder = RunFolder(tmp_path / "run")
    cpu = torch.device("cpu")
    folder.start(tiny())
    folder.describe(Process(cpu, launch="a"))
    assert folder.belongs_to(Process(cpu, launch="a", restarts=1))
    assert not folder.belongs_to(Process(cpu, launch="a"))
    assert not folder.belongs_to(Process(cpu, launch="b", restarts=1))
    assert not folder.belongs_to(Process(cpu))


@pytest.mark.parametrize(
    ("batch", "micro", "world", "accumulation"), [(32, None, 1, 1), (32, None, 4, 1), (32, 4, 2, 4), (4, 1, 4, 1)]
)
def test_plans(batch: int, micro: int | None, world: int, accumulation: int) -> None:
    plan = plan_batches(batch, micro, world)
    assert plan.accumulation == accumulation
    assert plan.microbatch_size * plan.accumulation * world == batch


@pytest.mark.parametrize(
    ("batch", "micro", "world", "message"),
    [
        (4, None, 8, "4 examples are too few for 8 processes"),
        (30, None, 4, "not a multiple of the 4 processes; 28 or 32 is"),
        (32, 16, 4, "make 2 microbatches of 16, which 4 processes cannot share equally; microbatch_size=8 would do"),
        (36, 12, 2, "make 3 microbatches of 12, which 2 processes cannot share equally; microbatch_size=9 would do"),
        (9, 3, 2, "make 3 microbatches of 3, which 2 processes cannot share equally; batch_size=6 would do"),
    ],
)
def test_plans_that_do_not_work_out(batch: int, micro: int | None, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batches(batch, micro, world)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("meta", "expected auto, cpu, cuda, cuda:N or mps, got 'meta'"),
        ("cuda:99", "cuda:99 was asked for, and torch finds no GPU|has no GPU"),
    ],
)
def test_devices_that_are_not_there(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), this_process(device):
        pass


def test_alone() -> None:
    with this_process("cpu") as process:
        assert process.is_first
        assert process.any(True, False) == (True, False)
        values = torch.tensor([1.0, 2.0])
        assert process.mean(values).tolist() == [1.0, 2.0]
        assert process.from_first(lambda: 3) == 3
