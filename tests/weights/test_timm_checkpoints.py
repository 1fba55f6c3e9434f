"""timm's checkpoints: same logits and features as timm in float64, and clear errors for those that do not fit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import normfree as nf
from normfree._torchvision import import_timm

CLASSES = 11
SMALL = {"nf_resnet26": {"width_factor": 0.5}, "nf_ecaresnet26": {"width_factor": 0.5}}
"""Options that keep the tests quick; timm's other families do not build at a fraction of their width."""

NAMES = (
    "nf_resnet26",
    "nf_seresnet26",
    "nf_ecaresnet26",
    "nf_regnet_b0",
    "nf_regnet_b2",
    "nfnet_l0",
    "eca_nfnet_l0",
    "nfnet_f0",
    "dm_nfnet_f0",
    "test_nfnet",
)


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return import_timm()


def timm_model(timm: ModuleType, name: str, **options: object) -> torch.nn.Module:
    """In float64, with numbers where timm starts at 0 or 1, so that nothing hides."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **{**SMALL.get(name, {}), **options}).double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gain"):
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter_name == "head.fc.weight":
                parameter.normal_(0.0, 0.05)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_are_timms(name: str, timm: ModuleType) -> None:
    theirs = timm_model(timm, name)
    ours = nf.from_timm(theirs.state_dict())
    assert ours.info.name == name.removeprefix("dm_")
    assert not ours.training
    if name.startswith("dm_"):
        published = timm.get_pretrained_cfg(name)
        assert (ours.info.data.crop_fraction, ours.info.data.crop_mode) == (published.crop_pct, published.crop_mode)
    with torch.no_grad():
        for size in (64, 49):
            images = torch.randn(2, 3, size, size, dtype=torch.float64)
            assert relative_error(ours(images), theirs(images)) <= 1e-10
            pooled = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
            assert relative_error(ours.forward_head(ours.forward_features(images), pre_logits=True), pooled) <= 1e-10


@pytest.mark.parametrize("name", ["nf_resnet26", "test_nfnet"])
def test_float32_logits_are_timms(name: str, timm: ModuleType) -> None:
    theirs = timm_model(timm, name).float()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(nf.from_timm(theirs.state_dict())(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nf_ecaresnet26", "test_nfnet"])
def test_the_signal_is_timms(name: str, timm: ModuleType) -> None:
    theirs = timm_model(timm, name)
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    expected, got = nf.spp(theirs, images), nf.spp(nf.from_timm(theirs.state_dict()), images)
    measures = ["avg_channel_squared_mean", "avg_channel_variance"]
    if name in ("nf_resnet26", "nf_regnet_b0"):  # timm doubles a last attention on the activation, like a scalar
        measures.append("residual_avg_channel_variance")
    for measure in measures:
        values = [[getattr(point, measure) for point in signal.points] for signal in (expected, got)]
        present = [[value for value in signal if value is not None] for signal in values]
        assert present[1] == pytest.approx(present[0], rel=1e-10)


def test_a_default_model_takes_over_what_timm_computes_with(timm: ModuleType) -> None:
    theirs = timm_model(timm, "nf_resnet26")
    ours = nf.create_model("nf_resnet26", num_classes=CLASSES, width=0.5).double().eval()
    parameters = {id(parameter) for parameter in ours.parameters()}
    assert nf.load_timm(ours, theirs.state_dict()) is ours
    assert {id(parameter) for parameter in ours.parameters()} == parameters
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) <= 1e-10
    assert ours.info.options["shortcut"] == "avgpool"
    assert ours.info.options["eps_mode"] == "added"


@pytest.mark.parametrize("name", ["nf_resnet26", "test_nfnet"])
def test_the_learnable_skip_gains_that_timm_can_have(name: str, timm: ModuleType) -> None:
    theirs = timm_model(timm, name, skipinit=True)
    ours = nf.from_timm(theirs.state_dict())
    assert ours.info.data.crop_mode == "center"
    images = torch.randn(1, 3, 49, 49, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) <= 1e-10


def test_parameters_are_timms_own(timm: ModuleType) -> None:
    state = timm_model(timm, "test_nfnet", skipinit=True).state_dict()
    ours = nf.from_timm(state)
    assert torch.equal(ours.stages[1][0].conv1.weight, state["stages.1.0.conv2.weight"])
    assert torch.equal(ours.stages[1][0].conv1b.gain, state["stages.1.0.conv2b.gain"].flatten())
    assert torch.equal(ours.stages[1][0].skip_gain, state["stages.1.0.skipinit_gain"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(suffix: str, timm: ModuleType, tmp_path) -> None:
    from safetensors.torch import save_file

    theirs = timm_model(timm, "test_nfnet")
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": t for name, t in theirs.state_dict().items()}, "epoch": 3}, path)
    else:
        save_file(theirs.state_dict(), path)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(nf.from_timm(path)(images), theirs(images)) <= 1e-10


def test_other_classes_other_channels_and_no_classifier(timm: ModuleType) -> None:
    state = timm_model(timm, "test_nfnet", in_chans=1).state_dict()
    model = nf.from_timm(state, num_classes=3)
    assert model(torch.randn(1, 1, 64, 64, dtype=torch.float64)).shape == (1, 3)
    assert torch.equal(model.stem.conv0.weight, state["stem.conv1.weight"])
    features = nf.from_timm(state, num_classes=0)
    assert features(torch.randn(1, 1, 64, 64, dtype=torch.float64)).shape == (1, 192)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    assert nf.from_timm(headless).num_classes == 0


@pytest.mark.parametrize("name", ["nf_resnet50", "test_nfnet", "nf_regnet_b1"])
def test_the_data_configuration_comes_along(name: str, timm: ModuleType) -> None:
    data = nf.from_timm(timm.create_model(name).state_dict()).info.data
    published = timm.get_pretrained_cfg(name)
    test_size = (published.test_input_size or published.input_size)[1]
    assert (data.train_size, data.test_size) == (published.input_size[1], test_size)
    assert (data.crop_fraction, data.interpolation) == (published.crop_pct, published.interpolation)
    assert (data.mean, data.std) == (tuple(published.mean), tuple(published.std))


def changed(state: dict[str, torch.Tensor], **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def test_misfits_are_named_and_change_nothing(timm: ModuleType) -> None:
    state = timm_model(timm, "test_nfnet").state_dict()
    resnet = timm_model(timm, "nf_resnet26").state_dict()
    nan = state["stages.1.0.conv1.gain"].clone()
    nan[3] = torch.nan
    cases = [
        (resnet, "It looks like nf_resnet26"),
        (changed(state, head__fc__weight=torch.zeros(5, 192), head__fc__bias=torch.zeros(5)), "classifier='keep'"),
        (changed(state, stages__1__0__conv1__gain=nan), "stages.1.0.conv1.gain: 1 of 16 numbers are NaN"),
        (changed(state, stages__1__0__conv1__weight=torch.zeros(3)), "stages.1.0.conv1.weight: expected shape"),
        (changed(state, more=torch.zeros(3)), r"more: the model has no such tensor, got shape \(3,\)"),
        ({name: t for name, t in state.items() if name != "final_conv.bias"}, "final_conv.bias: missing"),
        (changed(state, head__fc__weight=torch.zeros(())), r"head.fc.weight: expected 2 axes, got shape \(\)"),
        ({name: t for name, t in state.items() if name != "head.fc.weight"}, "head.fc.weight: missing"),
        ({name: t for name, t in state.items() if "conv3" not in name}, "stages.3.0.conv3.weight: missing"),
        ({"conv1.weight": torch.zeros(2)}, "not one of timm's normaliser-free models"),
        ({"conv1.weight": 3}, "expected tensors only"),
        ({}, "expected named tensors"),
    ]
    model = nf.create_model("test_nfnet", num_classes=CLASSES)
    before, options = snapshot(model), dict(model.info.options)
    for source, message in cases:
        with pytest.raises(nf.CheckpointError, match=message):
            nf.load_timm(model, source)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.info.options == options


class Executed:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_damaged_and_dangerous_files(timm: ModuleType, tmp_path) -> None:
    from safetensors.torch import save_file

    state = timm_model(timm, "test_nfnet").state_dict()
    torch.save(state, tmp_path / "whole.pth")
    torch.save({"state_dict": state, "args": Executed()}, tmp_path / "dangerous.pth")
    save_file(state, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        (tmp_path / f"noise.{suffix}").write_bytes(bytes(range(256)))
    damaged = [f"{kind}.{suffix}" for kind in ("truncated", "empty", "noise") for suffix in ("pth", "safetensors")]
    for name in [*damaged, "dangerous.pth"]:
        with pytest.raises(nf.CheckpointError, match=r"corrupt|never executed"):
            nf.from_timm(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        nf.from_timm(tmp_path / "absent.pth")
