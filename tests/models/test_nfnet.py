"""NFNets: published parameter counts, layout, options, and the signal that a healthy network shows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import normfree as nf

PUBLISHED_MILLIONS = (71.5, 132.6, 193.8, 254.9, 316.1, 377.2, 438.4)


def on_meta(name: str, **options: object) -> nf.models.network.ResidualNetwork:
    with torch.device("meta"):
        return nf.create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("level", "millions"), list(enumerate(PUBLISHED_MILLIONS)))
def test_published_parameter_counts(level: int, millions: float) -> None:
    assert round(count(on_meta(f"nfnet_f{level}")) / 1e6, 1) == millions


def test_parameter_count_measured_on_the_original() -> None:
    assert count(on_meta("nfnet_f0", num_classes=10)) == 68_447_014


@pytest.mark.parametrize(
    "name", ["nfnet_l0", "eca_nfnet_l0", "eca_nfnet_l1", "eca_nfnet_l2", "eca_nfnet_l3", "nfnet_f7"]
)
def test_parameter_counts_of_timm(name: str) -> None:
    from normfree._torchvision import import_timm

    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model(name)
    ours = on_meta(name)
    assert count(ours) == count(theirs) + len(ours.residual_blocks)  # a skip gain in every block


def test_the_table() -> None:
    model = on_meta("nfnet_f2")
    assert [len(stage) for stage in model.stages] == [3, 6, 18, 9]
    assert [stage[0].conv2.out_channels for stage in model.stages] == [256, 512, 1536, 1536]
    assert [stage[0].conv1.stride[0] for stage in model.stages] == [1, 2, 2, 2]
    assert [stage[0].conv1.groups for stage in model.stages] == [1, 2, 6, 6]
    assert model.num_features == 3072
    assert model.head.dropout.p == 0.4
    assert (model.info.data.train_size, model.info.data.test_size) == (256, 352)
    stem = [layer.out_channels for layer in model.stem if isinstance(layer, nn.Conv2d)]
    assert stem == [16, 32, 64, 128]


def test_both_gelus_have_their_own_gain() -> None:
    tanh, erf = on_meta("nfnet_f0"), on_meta("nfnet_f0", activation="gelu")
    assert tanh.head.before_pool.approximate == "tanh"
    assert erf.head.before_pool.approximate == "none"
    assert tanh.head.pooled_scale == nf.gain("gelu_tanh")
    assert erf.head.pooled_scale == nf.gain("gelu")


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"stem": "small"}, {"eca": True, "se_ratio": 0.0}])
def test_sizes_and_gradients(options: dict) -> None:
    model = nf.create_model("test_nfnet", num_classes=3, stem_width=16, stochastic_depth_rate=0.2, **options)
    for size in (64, 49):
        assert model(torch.randn(2, 3, size, size)).shape == (2, 3)
    model.eval()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
def test_variance_grows_by_alpha_squared_and_is_reset(activation: str) -> None:
    torch.manual_seed(0)
    options = {"activation": activation, "se_ratio": 0.0, "width": 0.5, "stem_width": 32}
    model = nf.create_model("nfnet_f1", num_classes=0, padding="same", shortcut="strided", **options).eval()
    outputs: list[float] = []
    for block in model.residual_blocks:
        block.register_forward_hook(lambda _m, _i, y: outputs.append(float(y.var(dim=(0, 2, 3)).mean())))
    with torch.no_grad():
        model(torch.randn(8, 3, 96, 96))
    third_stage = outputs[6:18]  # 0.04 a block, less what zero padding takes
    assert all(0.01 < after - before < 0.05 for before, after in pairwise(third_stage))
    assert third_stage[-1] > 1.2 > 1.0 > outputs[18]


def test_a_wide_network_keeps_the_stem_of_the_original() -> None:
    assert on_meta("nfnet_f0", width=2.0).stem.conv3.out_channels == 128
    assert on_meta("nfnet_f0", stem_width=64).stem.conv0.out_channels == 8
    with pytest.raises(ValueError, match="stem_width"):
        nf.create_model("nfnet_f0", stem_width=4)


def test_one_kind_of_attention_at_a_time() -> None:
    with pytest.raises(ValueError, match="se_ratio=0"):
        nf.create_model("nfnet_l0", eca=True)
    with pytest.raises(ValueError, match="eca: expected True or False"):
        nf.create_model("nfnet_l0", eca=1)
