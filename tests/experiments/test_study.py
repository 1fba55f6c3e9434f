"""Studies: many runs, one table; and what the numbers are held to say."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree.experiments import Settings
from normfree.experiments.study import Cell, Outcome, OutOfTime, Runner, mean_and_spread
from normfree.experiments.training_studies import BN, BN_PLAIN, NEITHER, NF, STUDIES
from normfree.experiments.tuned_study import Method
from normfree.training import load_recipe, train

Command = Callable[..., tuple[int, str, str]]

TINY = (
    "model={name: nf_resnet26, options: {width: 0.0625, stem: small}}",
    "data={path: digits, limit: 64, validation_limit: 40, size: 8}",
    "batch_size=16",
    "optimizer={learning_rate: 0.2, learning_rate_batch: null, warmup_epochs: 0.5}",
    "checkpoint={every_epochs: null, every_minutes: null}",
    "log={every: 1}",
)


def cell(name: str, *overrides: str) -> Cell:
    return Cell({"method": name, "seed": 0}, load_recipe({}, [*TINY, *overrides]))


def test_runs_side_by_side_and_beyond_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run is cut off in its middle and ends as if it had not been; another one diverges."""
    cells = [
        cell("long", "epochs=25", "evaluation.every_epochs=25"),
        cell("diverges", "epochs=1", "optimizer.learning_rate=1e30"),
    ]
    said: list[str] = []
    whole, diverged = Runner(tmp_path / "whole", jobs=2, say=said.append).finish(cells)
    assert (whole.cell, diverged.cell) == tuple(cells)
    assert (whole.diverged, diverged.diverged) == (False, True)
    assert f"{cells[1].name}: diverged" in said

    runner = Runner(tmp_path / "cut", jobs=2, say=said.append)
    log = runner.folder / cells[0].name / "log.csv"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_is_over", lambda: log.is_file() and len(log.read_text().splitlines()) > 3)
        with pytest.raises(OutOfTime, match=r"1 of 1 runs are not finished"):
            runner.finish(cells[:1])
    assert runner.outcome(cells[0]) is None
    assert 3 < len(log.read_text().splitlines()) < 101
    (cut,) = Runner(tmp_path / "cut", jobs=2, say=said.append).finish(cells[:1])
    assert (cut.top1, cut.loss, cut.evaluations) == (whole.top1, whole.loss, whole.evaluations)
    starts = json.loads((runner.folder / cells[0].name / "run.json").read_text())["starts"]
    assert len(starts) == 2

    before = log.read_bytes()
    again = Runner(tmp_path / "cut", minutes=0.0, say=said.append)
    assert again.finish(cells[:1]) == [cut]  # nothing is left to do
    assert log.read_bytes() == before


def test_termination_ends_the_runs_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(self: Runner, cell: Cell) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(Runner, "_start", start)
    monkeypatch.setattr(Runner, "_is_over", lambda self: started and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        Runner(tmp_path, say=[].append).finish([cell("a")])
    assert end.value.code == 143
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    broken = cell("broken", "data=nowhere/at/all")
    with pytest.raises(RuntimeError, match=r"broken-0-.* failed: error: .*nowhere/at/all"):
        Runner(tmp_path, say=[].append).finish([broken])


def test_every_recipe_has_a_folder_of_its_own() -> None:
    names = {cell("a").name, cell("a", "epochs=3").name, cell("b").name}
    assert len(names) == 3
    assert cell("a").name == cell("a").name
    odd = Cell({"method": "x/y: z é", "rate": 0.4}, load_recipe({}, [*TINY]))
    assert odd.name.startswith("x_y__z_é-0.4-")


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7.0)))
    mean, spread = mean_and_spread([2.5])
    assert mean == 2.5
    assert math.isnan(spread)


Accuracy = Callable[[dict[str, Any]], float]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Accuracy], list[Cell]]:
    """Lets every run end at once, with an accuracy by its labels (NaN: it diverged), and lists the runs."""

    def by(accuracy: Accuracy) -> list[Cell]:
        asked: list[Cell] = []

        def finish(self: Runner, cells: list[Cell]) -> list[Outcome]:
            asked.extend(cells)
            return self.finished(cells)

        def outcome(self: Runner, cell: Cell) -> Outcome:
            top1 = accuracy(cell.labels)
            return Outcome(cell, top1, 1.0, math.isnan(top1), 60.0, {"device": "cpu", "time": "now"})

        monkeypatch.setattr(Runner, "finish", finish)
        monkeypatch.setattr(Runner, "outcome", outcome)
        return asked

    return by


def studied(name: str, folder: Path, **settings: Any) -> Any:
    return STUDIES[name](Settings(data="somewhere", folder=folder, say=[].append, **settings))


@pytest.mark.parametrize(("name", "others"), [("cifar10", [BN]), ("full_width", [BN, BN_PLAIN])])
@pytest.mark.parametrize(("ahead", "holds"), [(1.0, True), (0.99, False), (-3.0, False)])
def test_claims_of_the_comparison_with_batchnorm(
    ahead: float, holds: bool, name: str, others: list[Method], pretend: Any, tmp_path: Path
) -> None:
    asked = pretend(lambda labels: 60.0 + ahead * (labels["method"] == NF.name) + 0.1 * labels.get("seed", 0))
    report = studied(name, tmp_path)
    assert [(claim.text, claim.holds) for claim in report.claims] == [
        (f"batch {batch}: normaliser-free at least 1 point above {other.name}", holds)
        for other in others
        for batch in (64, 128)
    ]
    finals = [c for c in asked if c.labels.get("stage") != "sweep"]
    assert {c.labels["seed"] for c in finals} == {0, 1, 2}
    assert len({c.name for c in asked}) == len(asked)
    assert all(c.recipe.data.holdout is None and c.recipe.data.limit is None for c in finals)
    sweep = [c for c in asked if c not in finals]
    assert all(c.recipe.data.holdout for c in sweep)  # test images are not what rates are picked by
    assert all((c.recipe.epochs, c.recipe.batch_size) == (finals[0].recipe.epochs, 128) for c in sweep)
    assert all(c.recipe.data.path == "somewhere" for c in asked)
    assert f"| {NF.name} | {60.1 + ahead:.2f} ± 0.10 (3) | {60.1 + ahead:.2f} ± 0.10 (3) |" in report.table


def test_the_best_choice_of_each_method_is_used(pretend: Any, tmp_path: Path) -> None:
    chosen: dict[str, dict[str, Any]] = {}

    def accuracy(labels: dict[str, Any]) -> float:
        if labels.get("stage") != "sweep":
            return 50.0
        choice = {key: labels[key] for key in ("optimizer", "rate")}
        chosen.setdefault(labels["method"], choice)  # the first one is the best, later ones diverge
        return 50.0 if chosen[labels["method"]] == choice else math.nan

    asked = pretend(accuracy)
    report = studied("cifar10", tmp_path)
    assert report.settings["tuned"] == chosen
    for run in asked:
        section, choice = run.recipe.optimizer, run.labels
        assert section.learning_rate == choice["rate"]
        assert (section.adaptive_clipping is None) == (choice["optimizer"] == "plain")
        if run.labels.get("stage") != "sweep":
            assert {key: choice[key] for key in ("optimizer", "rate")} == chosen[run.labels["method"]]


def test_each_method_has_its_own_optimiser(pretend: Any, tmp_path: Path) -> None:
    best = {NF.name: ("clipped", 1.2), BN.name: ("plain", 0.8)}
    asked = pretend(lambda labels: 50.0 + (best[labels["method"]] == (labels["optimizer"], labels["rate"])))
    report = studied("cifar10", tmp_path)
    assert report.settings["tuned"] == {name: {"optimizer": o, "rate": rate} for name, (o, rate) in best.items()}
    finals = [run for run in asked if "seed" in run.labels]
    assert len(finals) == 12
    assert {run.recipe.model.options["alpha"] for run in finals if run.labels["method"] == NF.name} == {1.0}
    for recipe in (run.recipe for run in finals if run.labels["method"] == BN.name):
        section = recipe.optimizer
        assert (section.learning_rate, section.adaptive_clipping) == (0.8, None)
        assert (section.vector_learning_rate, section.classifier_learning_rate) == (1.0, 1.0)
        assert recipe.model.name == "resnetv2_26"


def test_every_method_has_the_same_choices(pretend: Any, tmp_path: Path) -> None:
    asked = pretend(lambda labels: 50.0)
    studied("table1", tmp_path)
    choices: dict[str, list[tuple[str, float]]] = {}
    for run in asked:
        if run.labels.get("stage") == "sweep":
            choices.setdefault(run.labels["method"], []).append((run.labels["optimizer"], run.labels["rate"]))
    assert len(choices) == 4
    assert len({tuple(choice) for choice in choices.values()}) == 1


def test_rates_beyond_the_end_of_the_choices(pretend: Any, tmp_path: Path) -> None:
    """They are tried where the best is at the end, one after the other, until it is not or there were three."""

    def accuracy(labels: dict[str, Any]) -> float:
        if labels["optimizer"] == "plain":
            return 30.0
        if labels["method"] == BN.name:
            return 60.0 - abs(math.log2(labels["rate"] / 4.8))  # best at 4.8: one beyond, and one more to see it
        return 60.0 - labels["rate"]  # the smaller, the better

    asked = pretend(accuracy)
    report = studied("cifar10", tmp_path)
    beyond = defaultdict(list)
    for run in asked:
        if (run.labels.get("stage"), run.labels["optimizer"]) == ("sweep", "clipped"):
            beyond[run.labels["method"]].append(run.labels["rate"])
    assert beyond == {BN.name: [0.6, 1.2, 2.4, 4.8, 9.6], NF.name: [0.6, 1.2, 2.4, 0.3, 0.15, 0.075]}
    assert {name: choice["rate"] for name, choice in report.settings["tuned"].items()} == {BN.name: 4.8, NF.name: 0.075}


def test_every_rate_diverges(pretend: Any, tmp_path: Path) -> None:
    pretend(lambda labels: math.nan if labels["method"] == BN.name else 50.0)
    with pytest.raises(ValueError, match=f"{BN.name} diverged with every choice"):
        studied("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("place", "drop", "batchnorm", "holds"),
    [
        ((128, None), 0.5, 40.0, [True, True, True, True]),
        ((128, None), 0.6, 40.0, [False, True, True, True]),
        ((1, 64), 0.6, 40.0, [True, True, False, True]),
        ((64, None), 0.6, 40.0, [False, True, False, True]),  # updates of 64 at once belong to both
        ((2, 64), 0.4, 50.0, [True, True, True, False]),
        ((128, None), 0.0, 50.5, [True, False, True, False]),
    ],
)
def test_claims_of_microbatch(
    place: tuple[int, int | None], drop: float, batchnorm: float, holds: list[bool], pretend: Any, tmp_path: Path
) -> None:
    def accuracy(labels: dict[str, Any]) -> float:
        if labels["method"] == BN.name:
            return batchnorm
        luck = 0.125 * (labels.get("seed", 1) % 3 - 1)
        return 65.0 + luck - drop * ((labels.get("batch"), labels.get("update")) == place)

    asked = pretend(accuracy)
    report = studied("microbatch", tmp_path)
    assert [claim.holds for claim in report.claims] == holds
    rows = [line.split(" | ") for line in report.table.splitlines()]
    assert rows[0] == ["| batch", "1", "2", "4", "16", "64", "128 |"]
    assert [(row[0], [c for c in row if c.startswith("–")]) for row in rows[2:]] == [
        (f"| {NF.name}", []),
        (f"| {BN.name}", []),
        (f"| {NF.name}, updates of 64", ["– |"]),  # 128 are more than an update has
        (f"| {BN.name}, updates of 64", ["– |"]),
    ]
    assert rows[2][5].endswith("(6)")
    assert [row[5] for row in rows[4:]] == [row[5] for row in rows[2:4]], "64 at once are the same runs"
    finals = [run.labels for run in asked if "batch" in run.labels]
    counts = Counter((labels["method"], labels["batch"], labels.get("update")) for labels in finals)
    assert len({run.name for run in asked}) == len(asked)
    assert counts.pop((NF.name, 1, None)) == counts.pop((BN.name, 1, None)) == counts.pop((BN.name, 1, 64)) == 1
    assert counts.pop((NF.name, 64, None)) == 6, "of updates of 64, too"
    assert {key: count for key, count in counts.items() if count != 3} == {
        (NF.name, part, 64): 6 for part in (1, 2, 4, 16)
    }
    for run in asked:
        if "update" in run.labels:
            assert (run.recipe.batch_size, run.recipe.microbatch_size) == (64, run.labels["batch"])


def test_a_run_that_diverged_counts_as_chance(pretend: Any, tmp_path: Path) -> None:
    pretend(lambda labels: math.nan if labels["method"] == NEITHER.name else 40.0)
    report = studied("depth", tmp_path)
    assert len(report.claims) == 4
    assert all(claim.holds for claim in report.claims)
    assert report.claims[0].evidence == "40.00 with, 10.00 without"
    assert f"| {NEITHER.name} | 10.00 | 10.00 | 10.00 | 10.00 |" in report.table
    pretend(lambda labels: math.nan)
    assert not any(claim.holds for claim in studied("depth", tmp_path).claims)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_what_is_written(name: str, pretend: Any, tmp_path: Path) -> None:
    asked = pretend(lambda labels: 50.0 + len(labels["method"]))
    written = studied(name, tmp_path / "runs", overrides=("label_smoothing=0.05",)).write(tmp_path / "out")
    assert [path.name for path in written] == [f"{name}.png", f"{name}.csv", f"{name}.json", f"{name}.md"]
    picture, table, numbers, words = (path.read_bytes() for path in written)
    assert picture.startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.decode().splitlines()))
    assert [row["run"] for row in rows] == [cell.name for cell in asked]
    assert all(c.recipe.label_smoothing == 0.05 for c in asked)
    kept = json.loads(numbers)
    assert len(kept["runs"]) == len(rows)
    assert kept["settings"]["overrides"] == ["label_smoothing=0.05"]
    assert kept["made_by"]["command"].startswith("normfree")
    assert words.decode().count("\n| ") >= 2
    assert "`normfree" in words.decode()
    title, images = kept["title"], "12 000 images, 4 epochs" if name in ("microbatch", "table1") else ""
    assert title.startswith("CIFAR-10, ")
    assert title.endswith(f"{images}, label_smoothing=0.05: test accuracy" if images else "=0.05: test accuracy")


@pytest.mark.parametrize("name", sorted(STUDIES))
@pytest.mark.parametrize("finished", [0, 3])
def test_time_is_over(name: str, finished: int, pretend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is by then is written down, with what is missing."""
    pretend(lambda labels: 50.0)

    def too_late(self: Runner, cells: list[Cell]) -> list[Outcome]:
        raise OutOfTime(f"{len(cells)} of {len(cells)} runs are not finished")

    monkeypatch.setattr(Runner, "finish", too_late)
    monkeypatch.setattr(Runner, "finished", lambda self, cells: [self.outcome(c) for c in cells[:finished]])
    report = studied(name, tmp_path / "runs")
    assert report.missing.endswith("runs are not finished")
    files = report.write(tmp_path)
    assert "Not finished: " in files[3].read_text()
    assert len(json.loads(files[2].read_text())["runs"]) == finished


def test_from_the_command_line(pretend: Any, tmp_path: Path, command: Command) -> None:
    pretend(lambda labels: 40.0)
    words = ["reproduce", "depth", "--quick", "--jobs", "2", "--out", str(tmp_path / "out")]
    code, printed, errors = command(*words)
    assert (code, errors) == (0, "")
    assert "| depth | 26 | 101 |" in printed
    assert "digits, nets of 26 to 101 layers, 256 images, 2 epochs: test accuracy" in printed
    assert "[holds] 101 layers: trains" in printed
    names = sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_file())
    assert names == ["depth.csv", "depth.json", "depth.md", "depth.png"]
    code, answer, _ = command(*words, "--json")
    assert [run["depth"] for run in json.loads(answer)[0]["runs"]] == [26, 26, 101, 101]


def test_the_runs_of_quick_studies_can_be_made(pretend: Any, tmp_path: Path) -> None:
    """Each kind of network at its smallest batch makes two updates, a BatchNorm with a single example, too."""
    asked = pretend(lambda labels: 40.0)
    for name in STUDIES:
        STUDIES[name](Settings(quick=True, folder=tmp_path, say=[].append))
    smallest: dict[str, Cell] = {}
    for run in sorted(asked, key=lambda run: -run.recipe.batch_size):
        smallest[run.recipe.model.model_dump_json()] = run
    assert min(run.recipe.batch_size for run in smallest.values()) == 1
    for number, run in enumerate(smallest.values()):
        examples = 2 * run.recipe.batch_size
        overrides = [f"data.limit={examples}", "data.validation_limit=8", "epochs=1", "optimizer.warmup_epochs=0"]
        gentle = "optimizer.learning_rate=1e-3"
        result = train(load_recipe(run.recipe.to_dict(), [*overrides, gentle]), tmp_path / str(number), say=[].append)
        assert result.updates == 2
        assert run.recipe.data.size == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["microbatch", "--quick", "--set", "epoch=3"], "epoch: unknown key; did you mean epochs"),
        (["microbatch", "--quick", "--set", "epochs"], "expected key=value, got 'epochs'"),
        (["cifar10", "--data", "nowhere"], "nowhere"),
        (["depth"], "depth: needs --data"),
        (["tabel1"], "there is no experiment 'tabel1'; did you mean table1"),
    ],
)
def test_errors_in_one_line(words: list[str], message: str, tmp_path: Path, command: Command) -> None:
    code, printed, errors = command("reproduce", *words, "--out", str(tmp_path / "out"))
    assert (code, printed) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_folder_that_is_a_file(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    code, _, errors = command("reproduce", "depth", "--quick", "--out", str(tmp_path / "file"))
    assert (code, errors.count("\n")) == (2, 1)
    assert "is not a folder" in errors
