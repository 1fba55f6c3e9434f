import csv
import json

import pytest
import torch
from torch import nn

import normfree as nf
from benchmarks import clipping, report, scaling, suite
from benchmarks.__main__ import main
from benchmarks.contenders import Setting, contenders
from benchmarks.memory import AllocatedBytes
from benchmarks.peak import forward_flops
from benchmarks.timing import machine

SMALL = ["--models", "nf_resnet26", "--batch", "2", "--size", "32", "--width", "0.0625"]


@pytest.mark.parametrize("command", ["train", "infer", "accumulate", "memory"])
def test_every_benchmark_runs_and_writes(command, tmp_path, capsys):
    files = {kind: tmp_path / f"result.{kind}" for kind in ("json", "csv", "png")}
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--figure", str(files["png"])]
    main([command, *SMALL, "--repeats", "2", "--rounds", "1", *outputs])
    rows = json.loads(files["json"].read_text())["rows"]
    names = {row["contender"] for row in rows}
    assert {"ours", "conv-only", "batchnorm"} <= names
    assert all(row["ours_over_it"] == 1.0 for row in rows if row["contender"] == "ours")
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert files["png"].stat().st_size > 1000
    assert "ours_over_it" in capsys.readouterr().out


def test_clipping_against_timm(tmp_path):
    torch.manual_seed(0)
    model = nf.create_model("nf_resnet26", width=0.0625, num_classes=3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for clips in (False, True):
        for run in clipping.contenders(model, clips).values():
            run()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    file = tmp_path / "clip.json"
    main(["clip", *SMALL, "--repeats", "2", "--rounds", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["clipped"], row["contender"]) for row in rows] == [
        (clipped, name) for clipped in ("none", "all") for name in ("ours", "timm", "whole norm")
    ]
    assert all(row["ours_over_it"] == 1.0 for row in rows if row["contender"] == "ours")


def test_scaling_names_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    for axis, values in {"WIDTHS": (), "SIZES": (), "BATCHES": (1,)}.items():
        monkeypatch.setattr(scaling, axis, values)
    file = tmp_path / "scaling.json"
    few = ["--size", "32", "--width", "0.0625", "--batch", "2", "--depths", "26", "--repeats", "2"]
    main(["scaling", *few, "--budget", "60", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["axis"] for row in rows} == {"depth", "batch"}
    gaps = [row for row in rows if "gap" in row]
    assert [(row["axis"], row["value"], row["contender"]) for row in gaps] == [("batch", 1, "batchnorm")]
    assert "more than 1 value per channel" in gaps[0]["gap"]
    assert "depth 26: ours:" in capsys.readouterr().err


def test_a_point_over_its_budget_is_left_out():
    rows = scaling.point("nf_resnet26", Setting(batch=2, size=32, width=0.0625), 5, budget=1e-3)
    assert {row["contender"] for row in rows} == {"ours", "conv-only", "batchnorm"}
    assert all("over the budget of 0.001 s" in row["gap"] for row in rows)


def test_all_tables_in_one_go(tmp_path, monkeypatch):
    done = {"benchmark": "scaling", "machine": machine(), "setting": {}, "rows": []}
    monkeypatch.setattr(scaling, "run", lambda *arguments: done)
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: model)
    monkeypatch.setitem(suite._BATCHES, "cpu", dict.fromkeys(("train", "infer", "memory"), (1,)))
    few = ["--models", "nf_resnet26", "--width", "0.0625", "--size", "64", "--batch", "1", "--repeats", "2"]
    main(["gpu", "--device", "cpu", *few, "--rounds", "1", "--out", str(tmp_path / "tables")])
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    expected = {"train", "infer-channels-last", "infer-compiled", "memory", "train-channels-last-compiled"}
    assert {f"{name}.{kind}" for name in expected for kind in ("json", "csv", "png")} <= written
    assert json.loads((tmp_path / "tables" / "failures.json").read_text()) == []
    results = [tmp_path / "tables" / f"{name}.json" for name in ("train", "infer-channels-last", "memory", "scaling")]
    main(["figure", *map(str, results), "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="none of them compares"):
        main(["figure", str(results[-1]), "--out", str(tmp_path / "figure.png")])


def test_the_summary_is_the_median_over_rounds():
    setting = {"channels_last": True, "compile": False}
    rows = [
        {"model": "m", "batch": 1, "contender": contender, "ours_over_it": value}
        for value in (1.0, 1.2, 3.0)
        for contender in ("ours", "timm")
    ]
    result = {"benchmark": "train", "setting": setting, "rows": rows}
    assert report.summary([result]) == [("m: training step, batch 1, channels_last", {"timm": 1.2})]


def test_spp_against_a_forward_pass(tmp_path):
    file = tmp_path / "spp.json"
    few = ["--models", "nf_resnet26", "--batch", "2", "--size", "32", "--repeats", "2"]
    main(["spp", *few, "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert row["model"] == "nf_resnet26"
    assert min(row["forward_ms"], row["spp_ms"], row["hooks_ms"]) > 0


def test_arithmetic_of_a_known_network():
    # torchvision's documentation has 4.09 G multiply-adds for ResNet-50 at 224 px; ours has strides in the 3x3 layers
    assert forward_flops("nf_resnet50", Setting()) == pytest.approx(2 * 4.1e9, rel=0.02)


def test_contenders_compute_the_same_where_they_should():
    setting = Setting(batch=2, size=32, width=0.125, channels_last=True)
    models = contenders("nf_seresnet26", setting, timm=False)
    images = setting.images()
    torch.testing.assert_close(models["conv-only"](images), models["ours"](images), rtol=1e-4, atol=1e-5)


def test_allocated_bytes_follow_references():
    with AllocatedBytes() as counter:
        first = torch.empty(1000)
        second = first * 2
        view = second.view(10, 100)
        assert counter.now == 8000
        del second
        assert counter.now == 8000
        del view
        assert counter.now == 4000
        first.add_(1.0)
        assert counter.now == 4000
    assert counter.peak == 8000


def test_allocated_bytes_of_a_known_network():
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Sigmoid())
    x = torch.randn(50, 100)
    with AllocatedBytes() as counter:
        output = model(x)
        # the weight, seen as a view, and the output; what sigmoid reads is held by nobody once it has run
        assert counter.now == 100 * 100 * 4 + 50 * 100 * 4
        del output
    assert counter.peak == 100 * 100 * 4 + 2 * 50 * 100 * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["gpu", "--out", "x"], ["train", *SMALL, "--device", "cuda"]])
def test_no_cuda_device_is_one_clear_error(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
