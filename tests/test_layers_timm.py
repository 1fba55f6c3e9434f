"""The layers that imported checkpoints need, against timm's own."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import normfree as nf
from normfree._torchvision import import_timm


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    import_timm()
    import timm.layers

    return timm.layers


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_eps_added_to_the_variance(eps: float, layers: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = layers.ScaledStdConv2d(6, 8, 3, stride=2, groups=2, gamma=nf.gain("relu", "published"), eps=eps).double()
    ours = nf.WSConv2d(6, 8, 3, 2, 1, groups=2, gain_source="published", eps=eps, eps_mode="added", dtype=torch.float64)
    with torch.no_grad():
        theirs.gain.uniform_(0.5, 1.5), theirs.bias.normal_()
        ours.weight.copy_(theirs.weight), ours.gain.copy_(theirs.gain.flatten()), ours.bias.copy_(theirs.bias)
        images = torch.randn(2, 6, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
        ours.eps_mode = "floor"
        assert not torch.allclose(ours(images), theirs(images), rtol=1e-7)


def test_eps_modes_differ_only_through_eps() -> None:
    weight = torch.randn(4, 5, 3, dtype=torch.float64)
    floor, added = (nf.standardize_weight(weight, eps=1e-300, eps_mode=mode) for mode in ("floor", "added"))
    torch.testing.assert_close(floor, added, rtol=1e-14, atol=1e-14)
    assert torch.isfinite(nf.standardize_weight(torch.ones(2, 3), eps_mode="added")).all()


@pytest.mark.parametrize("channels", [1, 8, 64, 256, 1536, 3072])
def test_efficient_channel_attention(channels: int, layers: ModuleType) -> None:
    theirs, ours = layers.EcaModule(channels).double(), nf.EfficientChannelAttention(channels).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), 2.0 * theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours(x, output_scale=0.3), 0.6 * theirs(x), rtol=1e-12, atol=1e-12)
    volume = torch.randn(2, channels, 2, 3, 4, dtype=torch.float64)
    assert ours(volume).shape == volume.shape
