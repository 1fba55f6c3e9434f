"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from normfree.cli import app

SMALL = ["--size", "32", "--batch", "2", "-o", "width=0.25"]


def run(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_gain_table_and_json() -> None:
    code, out, _ = run("gain", "silu")
    assert code == 0
    assert "1.78718722210044" in out
    code, out, _ = run("gain", "relu", "leaky_relu(0.2)", "--json")
    assert code == 0
    rows = json.loads(out)
    assert rows[0]["published"] == 1.7139588594436646
    assert rows[1]["published"] is None
    assert len(run("gain")[1].splitlines()) > 20


def test_models_list_and_cost() -> None:
    code, out, _ = run("models", "nf_resnet*")
    assert code == 0
    assert "nf_resnet600" in out
    assert "resnetv2_600" in out
    _, out, _ = run("models", "resnetv1_50", "--cost", "--json")
    assert json.loads(out)[0]["parameters"] == 25557032


def test_spp_writes_a_picture_a_table_and_json(tmp_path: Path) -> None:
    code, out, err = run(
        "spp", "nf_resnet26", "resnetv2_26", *SMALL, "--json", "--out", tmp_path / "a.svg", "--csv", tmp_path / "a.csv"
    )
    assert code == 0
    assert [signal["label"] for signal in json.loads(out)] == ["nf_resnet26", "resnetv2_26"]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 9
    assert f"wrote {tmp_path / 'a.svg'}" in err


def test_spp_is_reproducible_and_reads_images(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (50, 40), (index * 80, 120, 30)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    first = run("spp", "nf_resnet26", *SMALL, "--input", tmp_path)
    assert first[0] == 0
    assert "nf_resnet26: 9 points, 2 examples" in first[1]
    assert run("spp", "nf_resnet26", *SMALL, "--input", tmp_path) == first
    _, out, err = run("spp", "nf_resnet26", *SMALL, "--input", tmp_path, "--batches", "2")
    assert "9 points, 3 examples" in out
    assert "note: 1 of 4 files skipped" in out
    assert "nf_resnet26: batch 2" in err


def test_predict_needs_no_weights_and_lies_over_what_is_measured(tmp_path: Path) -> None:
    code, out, _ = run("predict", "nf_resnet26", "resnetv2_26", *SMALL, "--json")
    assert code == 0
    predicted = json.loads(out)[0]
    assert predicted["label"] == "nf_resnet26 (predicted)"
    code, out, _ = run("spp", "nf_resnet26", *SMALL, "--predicted", "--json", "--out", tmp_path / "both.png")
    assert code == 0
    assert [signal["label"] for signal in json.loads(out)] == ["nf_resnet26 (predicted)", "nf_resnet26"]
    names = [[point["name"] for point in signal["points"]] for signal in json.loads(out)]
    assert names[0] == names[1] == [point["name"] for point in predicted["points"]]


def test_diagnose_in_words_and_json() -> None:
    code, out, _ = run("diagnose", "torchvision:resnet18", "--size", "64", "--without-norm")
    assert code == 0
    assert out.startswith("torchvision:resnet18 without normalisation: ")
    code, out, _ = run("diagnose", "nf_resnet26", "--size", "64", "--batch", "4", "--measured", "--json")
    assert code == 0
    assert json.loads(out)[0]["label"] == "nf_resnet26"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spp", "nf_resnet5"], "did you mean nf_resnet50"),
        (["spp", "timm:nothing_at_all"], "timm has no model"),
        (["spp", "missing.py:f"], "there is no file missing.py"),
        (["spp", "nf_resnet26", "--out", "missing/x.png"], "cannot write missing/x.png: there is no folder missing"),
        (["spp", "nf_resnet26", "--out", "x.bmp"], "ending in .png, .svg, .pdf"),
        (["spp", "nf_resnet26", "--csv", "."], "it is a folder"),
        (["spp", "nf_resnet26", "--input", "missing"], "there is no file or folder missing"),
        (["spp", "nf_resnet26", "--input", "."], "there is no image in"),
        (["spp", "nf_resnet26", "-o", "widht=2"], "did you mean width?"),
        (["spp", "nf_resnet26", "-o", "width"], "expected KEY=VALUE"),
        (["spp", "nf_resnet26", "--device", "nonsense"], "device"),
        (["spp", "torch.nn:Identity"], "neither an addition"),
        (["spp", "failing.py:Net", "--size", "8"], "boom (in module 'inner')"),
        (["predict", "nf_resnet5"], "did you mean nf_resnet50"),
        (["predict", "failing.py:Net", "--size", "8"], "inner"),
        (["diagnose", "nf_resnet26", "--without-norm"], "no normalisation layer"),
        (["gain", "reul"], "did you mean relu"),
        (["gain", "threshold"], "threshold"),
        (["models", "no_such*"], "no model matches"),
        (["reproduce", "figure9"], "did you mean"),
        (["reproduce", "figure1", "--out", "failing.py"], "not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("failing.py").write_text(
        "from torch import nn\n"
        "class Inner(nn.Module):\n    def forward(self, x):\n        raise ArithmeticError('boom\\nsecond line')\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = Inner()\n"
        "    def forward(self, x):\n        return self.inner(x)\n"
    )
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert set(os.listdir()) - {"__pycache__"} == {"failing.py"}


def test_sizes_are_of_one_pixel_or_more() -> None:
    for command in (["spp", "nf_resnet26"], ["models"]):
        code, out, err = run(*command, "--size", "0")
        assert (code, out) == (2, "")
        assert "--size" in err


def test_help_of_every_command() -> None:
    for command in ("models", "gain", "spp", "predict", "diagnose", "reproduce"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "--" in out
