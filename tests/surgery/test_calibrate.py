"""Calibrated networks have the variances that they were designed for."""

import pytest
import torch
from torch import nn

import normfree as nf

torch.set_num_threads(1)


def worst_block_input(model, x, alpha=0.2):
    """Largest relative distance of a block's input from the design: 1, growing by α² s², reset at transitions."""
    design, worst = 1.0, 0.0
    signal = nf.spp(model, x)
    for point in signal.points:
        if point.kind != "stem":
            design = (1.0 if point.kind == "transition" else design) + alpha**2
        worst = max(worst, abs(point.avg_channel_variance / design - 1.0))
    return worst, signal


@pytest.mark.parametrize(("name", "size"), [("nf_resnet50", 32), ("nf_resnet50", 64), ("nf_regnet_b0", 96)])
def test_data(name, size):
    x = torch.randn(16, 3, size, size)
    model = nf.create_model(name)
    before, _ = worst_block_input(model, x)
    calibrated, report = nf.calibrated(model, x)
    worst, signal = worst_block_input(calibrated, x)
    assert worst < 0.05 < before
    assert all(abs(point.residual_avg_channel_variance - 1.0) < 0.05 for point in signal.points[1:])
    assert report.method == "data"
    assert "layers scaled" in str(report)
    assert report.to_dict()["factors"]


@pytest.mark.parametrize(("name", "size"), [("nf_resnet26", 32), ("nf_regnet_b0", 96)])
def test_theory(name, size):
    model = nf.calibrate(nf.create_model(name), input_shape=(3, size, size))
    worst, _ = worst_block_input(model, torch.randn(64, 3, size, size))
    assert worst < 0.1


def test_the_option_of_create_model():
    model = nf.create_model("nf_resnet26", num_classes=5, calibrated_for=(32, 32))
    assert model.info.options["calibrated_for"] == (32, 32)
    assert worst_block_input(model, torch.randn(64, 3, 32, 32))[0] < 0.1
    with pytest.raises(ValueError, match="calibrated_for"):
        nf.create_model("nf_resnet26", calibrated_for=(32,))
    with pytest.raises(ValueError, match=r"calibrated_for: resnetv2_26 has BatchNorm \(stages\.0\.0"):
        nf.create_model("resnetv2_26", calibrated_for=(32, 32))


def test_streamed_batches_agree_with_one():
    batches = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    model = nf.create_model("nf_resnet26")
    streamed = nf.calibrate(model, batches)
    from_iterator = nf.calibrate(model, iter(batches))
    worst, _ = worst_block_input(streamed, torch.cat(batches))
    assert worst < 0.05
    assert torch.equal(streamed.stem.conv.gain, from_iterator.stem.conv.gain)


def test_a_skip_gain_of_zero_stays_and_its_branch_is_set():
    model = nf.create_model("nf_resnet26", skip_gain=0.0)
    x = torch.randn(16, 3, 32, 32)
    for calibrated in (nf.calibrate(model, x), nf.calibrate(model, input_shape=(16, 3, 32, 32))):
        block = calibrated.stages[0][0]
        assert float(block.skip_gain) == 0.0
        signal = nf.spp(calibrated, x)
        assert signal.points[1].residual_avg_channel_variance == pytest.approx(1.0, rel=0.1)


def test_the_original_is_left_as_it_was_and_users_models_are_welcome():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nf.WSConv2d(3, 32, 3, padding=1, activation=None)
            self.two = nf.WSConv2d(32, 32, 3, padding=1, learnable_gain=False)
            self.three = nf.ScaledConv2d(32, 32, 3, padding=1)

        def forward(self, x):
            return self.three(torch.relu(self.two(torch.relu(self.one(x)))))

    model = Own()
    x = torch.randn(8, 3, 4, 4)
    output = model(x)
    for calibrated in (nf.calibrate(model, x), nf.calibrate(model, input_shape=(3, 4, 4))):
        for point in nf.spp(calibrated, torch.randn(256, 3, 4, 4)).points:
            assert point.avg_channel_variance == pytest.approx(1.0, rel=0.25)
    assert torch.equal(model(x), output)


def test_bad_input():
    model = nf.create_model("nf_resnet26")
    with pytest.raises(ValueError, match="method"):
        nf.calibrate(model, torch.randn(2, 3, 32, 32), method="guess")
    with pytest.raises(ValueError, match="inputs"):
        nf.calibrate(model, method="data")
    with pytest.raises(ValueError, match="input_shape"):
        nf.calibrate(model)
    with pytest.raises(ValueError, match="convert it first"):
        nf.calibrate(nn.Conv2d(3, 3, 1), torch.randn(2, 3, 8, 8))
