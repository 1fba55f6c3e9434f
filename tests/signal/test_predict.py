"""Predicted against measured signals of whole networks, and what the prediction does with bad input."""

import json
import math

import pytest
import torch
from torch import nn

import normfree as nf
from normfree._torchvision import import_timm
from normfree.signal.predicted_trace import PredictedTrace

torch.set_num_threads(1)


def compare(build, shape, seeds, variance, squared_mean=None, smallest_mean=1e-2):
    """Largest relative errors, both sides averaged over the same networks."""
    measured, predicted = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = build()
        measured.append(nf.spp(model, torch.randn(shape)))
        predicted.append(nf.predict_spp(model, shape))
    assert not predicted[0].notes
    names = [[(p.name, p.kind, p.stage, p.shape) for p in signal.points] for signal in (measured[0], predicted[0])]
    assert names[0] == names[1]
    for index in range(len(measured[0].points)):
        for statistic in ("avg_channel_variance", "residual_avg_channel_variance", "avg_channel_squared_mean"):
            values = [signal.values(statistic)[index] for signal in measured]
            if values[0] is None:
                continue
            truth = sum(values) / seeds
            theory = sum(signal.values(statistic)[index] for signal in predicted) / seeds
            if statistic != "avg_channel_squared_mean":
                assert theory == pytest.approx(truth, rel=variance), (index, statistic)
            elif squared_mean is not None and truth > smallest_mean:
                assert theory == pytest.approx(truth, rel=squared_mean), (index, statistic)


@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_26", "resnetv2_26_relu_bn"])
def test_residual_networks(name):
    compare(lambda: nf.create_model(name), (16, 3, 64, 64), 4, 0.045)


def test_small_squared_means_of_a_normaliser_free_network():
    # nothing but the scatter of narrow layers' kernels leaves channel means of a few parts per thousand
    compare(lambda: nf.create_model("nf_resnet26"), (32, 3, 96, 96), 6, 0.03, 0.15, 1e-3)


def test_squared_means_of_a_mean_shifted_network():
    compare(lambda: nf.create_model("resnetv2_26"), (16, 3, 64, 64), 2, 0.04, 0.1)


@pytest.mark.parametrize(
    "options", [{"weights": "he", "alpha": 1.0}, {"weights": "he", "alpha": 1.0, "padding": "same"}]
)
def test_he_weights(options):
    compare(lambda: nf.create_model("nf_resnet26", **options), (4, 3, 48, 48), 12, 0.25, 0.25)


def test_average_pooled_shortcuts_and_gates():
    compare(lambda: nf.create_model("nf_regnet_b0"), (16, 3, 96, 96), 6, 0.1)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_100", "convnext_atto"])
def test_networks_of_others(name):
    timm = import_timm()
    compare(lambda: timm.create_model(name), (16, 3, 64, 64), 2, 0.15)


def test_layers_of_a_plain_network():
    def build():
        layers = [nn.Conv2d(3, 128, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nf.WSConv2d(128, 128, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers)

    compare(build, (32, 3, 12, 12), 4, 0.06)


def test_without_weights_nothing_big_is_made_and_the_prediction_is_the_same():
    with nf.without_weights():
        model = nf.create_model("nf_resnet50")
    assert sum(p.numel() for p in model.parameters() if not p.is_meta) < 250_000
    declared = nf.predict_spp(model, (8, 3, 128, 128))
    torch.manual_seed(0)
    actual = nf.predict_spp(nf.create_model("nf_resnet50"), (8, 3, 128, 128))
    for one, two in zip(declared.points, actual.points, strict=True):
        assert one.avg_channel_variance == pytest.approx(two.avg_channel_variance, rel=0.02)


def test_declared_initialisations_of_plain_layers():
    def build():
        model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.Conv2d(256, 256, 1))
        nn.init.normal_(model[2].weight, std=0.05)
        nn.init.uniform_(model[3].weight, -0.1, 0.1)
        return model

    with nf.without_weights():
        declared = build()
    assert all(p.is_meta for p in declared.parameters() if p.ndim > 1)
    torch.manual_seed(0)
    pairs = zip(
        nf.predict_spp(declared, (8, 64, 16, 16)).points, nf.predict_spp(build(), (8, 64, 16, 16)).points, strict=True
    )
    for one, two in pairs:
        assert one.avg_channel_variance == pytest.approx(two.avg_channel_variance, rel=0.03)


def test_skip_gain_zero_shows_the_residual_before_it():
    torch.manual_seed(0)
    zero = nf.predict_spp(nf.create_model("nf_resnet26", skip_gain=0.0), (8, 3, 64, 64))
    torch.manual_seed(0)
    one = nf.predict_spp(nf.create_model("nf_resnet26", skip_gain=1.0), (8, 3, 64, 64))
    assert zero.points[1].residual_avg_channel_variance == pytest.approx(
        one.points[1].residual_avg_channel_variance, rel=1e-6
    )
    assert zero.points[2].avg_channel_variance == pytest.approx(zero.points[1].avg_channel_variance, rel=1e-9)


@pytest.mark.parametrize(("name", "tolerance"), [("nf_resnet26", 0.08), ("resnetv2_26", 0.3)])
def test_gradients(name, tolerance):
    torch.manual_seed(0)
    model = nf.create_model(name)
    measured = nf.spp(model, torch.randn(16, 3, 96, 96), backward=True)
    predicted = nf.predict_spp(model, (16, 3, 96, 96), backward=True)
    for one, two in zip(predicted.points, measured.points, strict=True):
        assert one.gradient_avg_channel_variance == pytest.approx(two.gradient_avg_channel_variance, rel=tolerance)


def test_evaluation_statistics_of_batch_norm():
    torch.manual_seed(0)
    model = nf.create_model("resnetv2_26")
    measured = nf.spp(model, torch.randn(8, 3, 64, 64), norm_statistics="running")
    predicted = nf.predict_spp(model, (8, 3, 64, 64), norm_statistics="running")
    for one, two in zip(predicted.points, measured.points, strict=True):
        assert one.avg_channel_variance == pytest.approx(two.avg_channel_variance, rel=0.3)


def test_the_model_is_left_as_it_was():
    model = nf.create_model("resnetv2_26").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    nf.predict_spp(model, (4, 3, 64, 64))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class _Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), function

    def forward(self, x):
        x = self.one(x)
        return x + self.two(self.function(x))


def test_an_unknown_operator_is_named_and_a_rule_can_be_registered():
    model = _Block(lambda x: torch.cumsum(x, dim=2))
    signal = nf.predict_spp(model, (4, 8, 6, 6))
    assert "cumsum: there is no rule for it" in signal.notes[0]
    assert [point.gap for point in signal.points] == ["", "cumsum"]
    assert json.loads(json.dumps(signal.to_dict()))["points"][1]["gap"] == "cumsum"

    from normfree.signal.theory import rules

    nf.register_rule(torch.ops.aten.cumsum.default, lambda call: call.state(call.args[0], (6, 6)).scaled(2.0))
    try:
        assert not nf.predict_spp(model, (4, 8, 6, 6)).notes
    finally:
        del rules._RULES["aten::cumsum"]
    with pytest.raises(TypeError, match=r"operator of torch\.ops"):
        nf.register_rule(3, lambda call: None)


def test_data_dependent_control_flow_falls_back_to_a_measurement():
    model = _Block(lambda x: x if x.mean() > 0 else -x)
    signal = nf.predict_spp(model, (4, 8, 6, 6))
    assert "not predicted but measured with noise" in signal.notes[0]
    assert "cannot run without values" in signal.notes[0]
    assert signal.points[1].avg_channel_variance > 0
    with pytest.raises(nf.PredictionError, match="cannot run without values"):
        nf.predict_spp(model, (4, 8, 6, 6), fallback=False)


def test_bad_input():
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 5))
    with pytest.raises(ValueError, match=r"input_shape: the model cannot run with 1×3×6×6: module '1' raised"):
        nf.predict_spp(model, (1, 3, 6, 6))
    with pytest.raises(ValueError, match="input_shape: expected"):
        nf.predict_spp(model, (3,))
    with pytest.raises(ValueError, match="norm_statistics"):
        nf.predict_spp(model, (1, 3, 32, 32), norm_statistics="none")
    with pytest.raises(ValueError, match="neither an addition"):
        nf.predict_spp(nn.ReLU(), (1, 3, 32, 32))
    sparse = nn.Linear(4, 4)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(ValueError, match="weight is sparse"):
        nf.predict_spp(sparse, (1, 4))


def test_notes_and_labels():
    model = nf.create_model("nf_resnet26")
    assert nf.predict_spp(model, (2, 3, 32, 32)).label == "nf_resnet26 (predicted)"
    assert nf.predict_spp(model, (2, 3, 32, 32), label="x").label == "x"
    assert isinstance(PredictedTrace(model), PredictedTrace)
    assert all(math.isfinite(point.avg_channel_variance) for point in nf.predict_spp(model, (1, 3, 32, 32)).points)


@pytest.mark.parametrize("name", ["nf_resnet26", "fixup_resnet26"])
def test_scalars_on_the_meta_device_get_a_value_and_a_note(name: str) -> None:
    shape = (4, 3, 64, 64)
    with torch.device("meta"):
        bare = nf.create_model(name, 10, width=0.25)
    with nf.without_weights():
        declared = nf.create_model(name, 10, width=0.25)
    predicted, expected = nf.predict_spp(bare, shape), nf.predict_spp(declared, shape)
    assert "have no value" in predicted.notes[0]
    if name == "nf_resnet26":
        for point, other in zip(predicted.points, expected.points, strict=True):
            assert point.avg_channel_variance == pytest.approx(other.avg_channel_variance, rel=0.03)
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_branches_behind_batchnorm_add_nothing_to_the_channel_means() -> None:
    """BatchNorm takes the mean of the very batch: a branch whose last layer is 1×1 then has none, however deep."""
    model = nf.create_model("resnetv2_101_relu_bn", width=0.25)
    for signal in (nf.predict_spp(model, (4, 3, 64, 64)), nf.spp(model, torch.randn(4, 3, 64, 64))):
        for stage in range(1, 4):
            means = [p.avg_channel_squared_mean for p in signal.points if p.name.startswith(f"stages.{stage}.")]
            assert max(means) - min(means) < 0.05 * max(means) + 1e-6


def test_channel_means_of_a_deep_network_with_batchnorm() -> None:
    """BatchNorm-ReLU-Conv: they sum up over the blocks, and are numbers to the end."""
    model = nf.create_model("resnetv2_101", width=0.25)
    predicted = nf.predict_spp(model, (4, 3, 64, 64)).points
    measured = nf.spp(model, torch.randn(4, 3, 64, 64)).points
    for one, other in zip(predicted[1:], measured[1:], strict=True):
        assert one.avg_channel_squared_mean == pytest.approx(other.avg_channel_squared_mean, rel=0.3, abs=0.02)
