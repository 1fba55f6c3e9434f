"""Diagnoses of networks with a known fault, and of healthy ones."""

import json

import pytest
import torch
from torch import nn

import normfree as nf
from normfree._torchvision import import_timm
from normfree.signal.propagation import SignalPoint, SignalPropagation

torch.set_num_threads(1)


def kinds(diagnosis):
    return {finding.kind for finding in diagnosis if finding.severity != "info"}


def signal(variances, kinds_=None, means=None, residuals=None, shapes=None, **fields):
    count = len(variances)
    points = []
    for index in range(count):
        kind = (kinds_ or ["stem"] + ["block"] * (count - 1))[index]
        points.append(
            SignalPoint(
                f"b{index}",
                0,
                kind,
                (shapes or [(8, 16, 32, 32)] * count)[index],
                (means or [0.0] * count)[index],
                variances[index],
                None if kind == "stem" else (residuals or [1.0] * count)[index],
                **{name: values[index] for name, values in fields.items()},
            )
        )
    return SignalPropagation(tuple(points), "x", 8)


@pytest.mark.parametrize(("name", "size"), [("nf_resnet50", 224), ("resnetv2_50_relu_bn", 224), ("nf_resnet26", 256)])
def test_healthy_networks(name, size):
    diagnosis = nf.diagnose(nf.create_model(name), (8, 3, size, size))
    assert diagnosis.healthy
    assert str(diagnosis).startswith(f"{name} (predicted): healthy")


def test_a_resnet_without_its_norms():
    timm = import_timm()
    torch.manual_seed(0)
    diagnosis = nf.diagnose(nf.without_norms(timm.create_model("resnet50")), (8, 3, 224, 224))
    assert {"mean-shift", "exploding", "missing-reset"} <= kinds(diagnosis)
    shift = next(finding for finding in diagnosis if finding.kind == "mean-shift")
    assert "from block 1 on" in shift.cause
    assert "Scaled Weight Standardization" in shift.remedy
    data = json.loads(json.dumps(diagnosis.to_dict()))
    assert not data["healthy"]
    assert data["findings"][0]["severity"] == "error"


def test_padding_pooling_and_small_batches():
    torch.manual_seed(0)
    assert kinds(nf.diagnose(nf.create_model("nf_resnet50"), (8, 3, 64, 64))) == {"padding-shortfall"}
    assert kinds(nf.diagnose(nf.create_model("nf_regnet_b0"), (8, 3, 96, 96))) == {"pooled-shortcut"}
    few = nf.diagnose(nf.create_model("resnetv2_26"), (2, 3, 64, 64))
    assert kinds(few) == {"few-samples"}
    assert few[0].numbers["values per channel"] == 8


def test_he_weights_shift_the_mean():
    torch.manual_seed(0)
    model = nf.create_model("nf_resnet26", weights="he", alpha=1.0)
    assert "mean-shift" in kinds(nf.diagnose(model, (8, 3, 224, 224)))


def test_measured_signals():
    assert nf.diagnose(signal([1.0, 1.04, 1.08, 1.12])).healthy
    assert "exploding" in kinds(nf.diagnose(signal([1.0, 10.0, 1e3, 1e5])))
    assert "vanishing" in kinds(nf.diagnose(signal([1.0, 0.1, 1e-3, 1e-5])))
    assert "strong-branch" in kinds(nf.diagnose(signal([1.0, 2.5, 6.0, 20.0], residuals=[0, 1.5, 3.5, 14.0])))
    assert "silent-branch" in {f.kind for f in nf.diagnose(signal([1.0] * 4, residuals=[0.0] * 4))}
    assert "dead" in kinds(nf.diagnose(signal([1.0, 1.0, 0.0, 0.0])))
    assert "fp16-overflow" in kinds(nf.diagnose(signal([1.0, 1e9, 1e9])))
    assert "fp16-underflow" in kinds(nf.diagnose(signal([1e-10, 1e-10, 1e-10])))
    assert "bf16-rounding" in kinds(nf.diagnose(signal([1.0, 1.0, 1.0], means=[0.0, 1e4, 1e4])))


def test_the_origin_of_nan():
    broken = signal([1.0, 1.2, float("nan"), float("nan")], nan_count=[0, 0, 3, 900])
    finding = nf.diagnose(broken)[0]
    assert (finding.kind, finding.place, finding.severity) == ("non-finite", "b2", "error")
    assert finding.numbers["NaN"] == 3
    assert "b2" in str(nf.diagnose(broken))
    json.dumps(nf.diagnose(broken).to_dict(), allow_nan=False)


def test_reports(tmp_path):
    diagnosis = nf.diagnose(signal([1.0, 10.0, 1e3, 1e5]))
    diagnosis.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["findings"]
    assert str(diagnosis).splitlines()[0].startswith("x: ")


def test_bad_input():
    with pytest.raises(ValueError, match="input_shape"):
        nf.diagnose(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="subject"):
        nf.diagnose("nf_resnet50")
    with pytest.raises(ValueError, match="no normalisation layer"):
        nf.without_norms(nf.create_model("nf_resnet26"))
