"""Our models inside timm: the registry, feature extraction, classifiers, data configuration, a training step."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import normfree as nf
from normfree._torchvision import import_timm

NAMES = ("nf_resnet26", "nf_regnet_b0", "test_nfnet", "bn_regnet_b0", "resnetv2_26_relu_bn", "fixup_resnet26")


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    import normfree.timm  # noqa: F401

    return import_timm()


def create(timm: ModuleType, name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    width = {} if name == "test_nfnet" else {"width": 0.25}
    return timm.create_model(f"normfree_{name}", **width, **options).eval()


def test_every_model_is_registered(timm: ModuleType) -> None:
    assert set(timm.list_models("normfree_*")) == {f"normfree_{name}" for name in nf.list_models()}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_network(name: str, timm: ModuleType) -> None:
    model = create(timm, name, num_classes=4, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
    assert model.info.name == name
    assert model.info.options["stochastic_depth_rate"] == 0.2
    assert (model.num_classes, model.head.dropout.p) == (4, 0.1)
    images = torch.randn(2, 1, 64, 64)
    features = model.forward_features(images)
    kept = features.clone()
    logits = model.forward_head(features)
    assert torch.equal(logits, model(images))
    assert torch.equal(features, kept)  # the head overwrites nothing
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_can_be_replaced(name: str, timm: ModuleType) -> None:
    model = create(timm, name, num_classes=4)
    assert model.get_classifier().out_features == 4
    model.reset_classifier(3)
    images = torch.randn(1, 3, 64, 64)
    assert (model(images).shape, model.num_classes) == ((1, 3), 3)
    model.reset_classifier(0, "avg")
    assert (model(images).shape, model.num_classes) == ((1, model.num_features), 0)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook"])
def test_features_only(name: str, feature_cls: str, timm: ModuleType) -> None:
    extractor = create(timm, name, features_only=True, feature_cls=feature_cls)
    model = create(timm, name)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = extractor(images)
    features = list(output.values()) if isinstance(output, dict) else output
    channels, reductions = extractor.feature_info.channels(), extractor.feature_info.reduction()
    shapes = [(count, 64 // reduction, 64 // reduction) for count, reduction in zip(channels, reductions, strict=True)]
    assert [tuple(feature.shape[1:]) for feature in features] == shapes
    assert reductions == sorted(set(reductions))
    with torch.no_grad():
        assert torch.equal(features[-1], model.forward_features(images))
    two = create(timm, name, features_only=True, out_indices=(1, 3), feature_cls=feature_cls)
    assert two.feature_info.channels() == [channels[1], channels[3]]


def test_the_data_configuration_reaches_timm(timm: ModuleType) -> None:
    model = create(timm, "nf_regnet_b0")
    resolved = timm.data.resolve_model_data_config(model)
    data = nf.data_config("nf_regnet_b0")
    assert resolved["input_size"] == (3, data.train_size, data.train_size)
    assert resolved["crop_pct"] == data.crop_fraction
    assert resolved["mean"] == data.mean


def test_a_checkpoint_path(timm: ModuleType, tmp_path) -> None:
    saved = create(timm, "nf_resnet26", num_classes=4)
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    loaded = timm.create_model("normfree_nf_resnet26", width=0.25, num_classes=4, checkpoint_path=tmp_path / "a.pth")
    assert torch.equal(loaded.stem.conv.weight, saved.stem.conv.weight)


def test_timms_optimiser_and_clipping_train_it(timm: ModuleType) -> None:
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    model = create(timm, "nf_resnet26", num_classes=4, drop_path_rate=0.1).train()
    optimiser = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4, momentum=0.9)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 0.1, mode="agc")
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_options_that_are_not_understood(timm: ModuleType) -> None:
    with pytest.raises(ValueError, match="output_stride"):
        timm.create_model("normfree_nf_resnet26", output_stride=8)
    with pytest.raises(ValueError, match="global_pool"):
        timm.create_model("normfree_nf_resnet26", global_pool="max")
