import csv
import json

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.contenders import Setting, contenders
from benchmarks.memory import AllocatedBytes

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
