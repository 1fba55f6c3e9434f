import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree as nf
from normfree.models.registry import model_entry

DEPTHS = (26, 50, 101, 152, 200, 288, 600)
RESNETS = [
    *(f"nf_{kind}resnet{depth}" for kind in ("", "se") for depth in DEPTHS),
    *(f"{kind}resnetv2_{depth}{order}" for kind in ("", "se") for order in ("", "_relu_bn") for depth in DEPTHS),
    *(f"{family}{depth}" for family in ("resnetv1_", "skipinit_resnet", "fixup_resnet") for depth in DEPTHS),
]
FAMILIES = ["nf_resnet26", "nf_seresnet26", "resnetv2_26", "seresnetv2_26", "resnetv2_26_relu_bn", "resnetv1_26",
            "skipinit_resnet26", "fixup_resnet26"]  # fmt: skip


def small(name, **options):
    torch.manual_seed(0)
    return nf.create_model(name, **{"num_classes": 5, "width": 0.125, **options})


def test_every_resnet_is_listed():
    assert set(RESNETS) <= set(nf.list_models())
    assert len(nf.list_models()) == len(set(nf.list_models()))


@pytest.mark.parametrize(
    ("pattern", "depths_of"),
    [
        ("nf_resnet*", ["nf_resnet{}"]),
        ("nf_s?resnet[0-9]*", ["nf_seresnet{}"]),
        ("resnetv2_*_relu_bn", ["resnetv2_{}_relu_bn"]),
        ("resnetv1_[0-9]*", ["resnetv1_{}"]),
        ("fixup*", ["fixup_resnet{}"]),
    ],
)
def test_patterns(pattern, depths_of):
    assert nf.list_models(pattern) == [name.format(depth) for name in depths_of for depth in DEPTHS]


def test_a_pattern_that_matches_nothing():
    assert nf.list_models("vgg*") == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nf_resnet5", "did you mean nf_resnet50"),
        ("nf-resnet50", "did you mean nf_resnet50"),
        ("NF_ResNet50", "did you mean nf_resnet50"),
        ("resnet_v2_50", "resnetv2_50"),
        ("wibble", r"list_models\(\) lists what there is"),
        (None, "there is no model None"),
    ],
)
def test_unknown_models(name, hint):
    with pytest.raises(ValueError, match=rf"^name: there is no model .*{hint}|^name: {hint}"):
        nf.create_model(name)
    with pytest.raises(ValueError, match=r"^name: there is no model"):
        nf.batchnorm_twin(name)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("wdth", 1.0, "wdth: nf_resnet26 has no such option; did you mean width?"),
        ("zzz", 1.0, "zzz: nf_resnet26 has no such option; it has activation, alpha"),
        ("depth", 50, "depth: nf_resnet26 has no such option"),
        ("order", "bn_relu", "order: nf_resnet26 has no such option"),
        ("width", 0, "width: expected a positive number, got 0"),
        ("width", -1.0, "width: expected a positive number"),
        ("width", float("nan"), "width: expected a positive number"),
        ("width", float("inf"), "width: expected a positive number"),
        ("width", "1", "width: expected a positive number, got '1'"),
        ("width", True, "width: expected a positive number, got True"),
        ("num_classes", -1, "num_classes: expected a whole number of 0 or more"),
        ("num_classes", 2.5, "num_classes: expected a whole number of 0 or more"),
        ("num_classes", "10", "num_classes: expected a whole number of 0 or more"),
        ("num_classes", None, "num_classes: expected a whole number of 0 or more"),
        ("in_channels", 0, "in_channels: expected a whole number of 1 or more"),
        ("in_channels", 1.5, "in_channels: expected a whole number of 1 or more"),
        ("alpha", -0.2, "alpha: expected a number of 0 or more"),
        ("alpha", float("nan"), "alpha: expected a number of 0 or more"),
        ("skip_gain", float("inf"), "skip_gain: expected a finite number"),
        ("drop_rate", 1.5, "drop_rate: expected a probability"),
        ("drop_rate", -0.1, "drop_rate: expected a probability"),
        ("stochastic_depth_rate", 1.05, "stochastic_depth_rate: expected a probability"),
        ("stochastic_depth_rate", -0.1, "stochastic_depth_rate: expected a probability"),
        ("se_ratio", -0.5, "se_ratio: expected a number of 0 or more"),
        ("padding", "valid", "padding: expected one of 'symmetric', 'same', got 'valid'"),
        ("padding", ["same"], "padding: expected one of 'symmetric', 'same'"),
        ("shortcut", "conv", "shortcut: expected one of 'strided', 'avgpool', got 'conv'"),
        ("stem", "cifar", "stem: expected one of 'imagenet', 'small', got 'cifar'"),
        ("gain_source", "sampled", "gain_source: expected one of 'exact', 'published', got 'sampled'"),
        ("weights", "xavier", "weights: expected one of 'standardized', 'he', got 'xavier'"),
        ("activation", "rleu", "activation: there is none called 'rleu'; did you mean relu"),
        ("activation", nn.Softmax(1), "activation: Softmax(dim=1) mixes elements"),
    ],
)
def test_bad_options_are_refused_by_name(option, value, message):
    with pytest.raises(ValueError, match=rf"^{option}: ") as raised:
        nf.create_model("nf_resnet26", **{option: value})
    assert message in str(raised.value)


def test_options_of_other_families():
    with pytest.raises(ValueError, match=r"order: expected one of 'bn_relu', 'relu_bn', got 'conv'"):
        nf.create_model("resnetv2_26", order="conv")
    for name in ("skipinit_resnet26", "fixup_resnet26", "resnetv1_26", "resnetv2_26"):
        with pytest.raises(ValueError, match=r"^alpha: .* has no such option"):
            nf.create_model(name, alpha=0.2)
    with pytest.raises(TypeError, match=r"^activation: expected a name"):
        nf.create_model("nf_resnet26", activation=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_info_makes_the_model_again(name):
    model = small(name, drop_rate=0.1)
    assert model.info.name == name
    assert set(model.info.options) == {*model_entry(name).defaults(), "num_classes"}
    assert model.info.options["drop_rate"] == 0.1
    again = nf.create_model(model.info.name, **model.info.options)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", [name for name in RESNETS if not name.startswith(("resnetv", "seresnetv"))])
def test_twins_exist_and_have_the_same_topology(name):
    twin = nf.batchnorm_twin(name)
    assert twin in nf.list_models()
    assert nf.batchnorm_twin(twin) is None
    if name.endswith(("26", "50")):
        shapes = [
            [tuple(m.weight.shape) for m in small(which).modules() if isinstance(m, nn.Conv2d)]
            for which in (name, twin)
        ]
        assert sorted(shapes[0]) == sorted(shapes[1])


COMMON = [
    {"activation": "silu"},
    {"drop_rate": 0.5},
    {"stochastic_depth_rate": 0.9},
    {"padding": "same"},
    {"shortcut": "avgpool"},
    {"stem": "small"},
    {"width": 0.25},
]


def initialised(name, **options):
    model = small(name, **options).double()
    torch.manual_seed(1)
    with torch.no_grad():  # the zeros of some families would hide their branches and classifiers
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", COMMON, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_common_options_have_an_effect(name, options):
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    plain, other = initialised(name), initialised(name, **options)
    torch.manual_seed(2)
    before = plain(x)
    torch.manual_seed(2)
    after = other(x)
    assert before.shape == after.shape == (4, 5)
    assert (before - after).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf_resnet26", {"alpha": 0.4}),
        ("nf_resnet26", {"skip_gain": 0.5}),
        ("nf_resnet26", {"gain_source": "published"}),
        ("nf_resnet26", {"weights": "he"}),
        ("nf_resnet26", {"se_ratio": 0.5}),
        ("nf_seresnet26", {"se_ratio": 0.0}),
        ("resnetv2_26", {"order": "relu_bn"}),
        ("resnetv2_26", {"se_ratio": 0.5}),
        ("skipinit_resnet26", {"skip_gain": 0.5}),
    ],
    ids=str,
)
def test_options_of_one_family_have_an_effect(name, options):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain, other = initialised(name), initialised(name, **options)
    assert (plain(x) - other(x)).abs().max() > 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_in_channels_and_no_classifier(name):
    model = small(name, in_channels=1, num_classes=0)
    features = model(torch.randn(2, 1, 40, 40))
    assert features.shape == (2, model.num_features) == (2, 256)
    assert model.num_classes == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_features_head_and_classifier(name):
    model = initialised(name).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = model.forward_features(x)
    assert maps.shape == (2, 256, 2, 2)
    kept = maps.clone()
    torch.testing.assert_close(model.forward_head(maps), model(x))
    assert torch.equal(maps, kept), "the head must leave its argument alone"
    pooled = model.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert model(x).dtype == torch.float64
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("shortcut", ["strided", "avgpool"])
@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv1_26", "resnetv2_26", "fixup_resnet26"])
def test_sizes_halve_rounding_up(name, shortcut, padding):
    model = small(name, shortcut=shortcut, padding=padding, width=0.0625).eval()
    for size in (1, 2, 33, 47, 64):
        x = torch.randn(1, 3, size, size + 3)
        expected = [-(-size // 4), -(-(size + 3) // 4)]
        x = model.stem(x)
        assert list(x.shape[2:]) == expected
        for index, stage in enumerate(model.stages):
            x = stage(x)
            expected = expected if index == 0 else [-(-length // 2) for length in expected]
            assert list(x.shape[2:]) == expected


def test_small_stem_keeps_the_size():
    model = small("nf_resnet26", stem="small")
    assert model.stem(torch.randn(1, 3, 32, 31)).shape == (1, 8, 32, 31)
    assert model.forward_features(torch.randn(1, 3, 32, 31)).shape == (1, 256, 4, 4)


def test_input_of_the_wrong_rank():
    with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\), got shape \(3, 32, 32\)"):
        small("nf_resnet26")(torch.randn(3, 32, 32))


@pytest.mark.parametrize("width", [0.01, 0.1, 0.3, 1.1])
@pytest.mark.filterwarnings("ignore:.*fan-in of 1")
def test_any_positive_width(width):
    with torch.device("meta"):
        model = nf.create_model("nf_resnet26", width=width)
    assert model(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 1000)
    assert model.num_features == int(2048 * width)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_pickles_meta_and_state(name):
    model = initialised(name).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert other.info == model.info
    with torch.device("meta"):
        empty = small(name)
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty.eval()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_compiles_as_one_graph(name):
    model = initialised(name, stochastic_depth_rate=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(4)
    output = compiled(x)
    torch.manual_seed(4)
    torch.testing.assert_close(output, model(x))


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Sequential(nn.ReLU(inplace=True))])
@pytest.mark.parametrize("name", ["nf_resnet26", "skipinit_resnet26", "resnetv2_26_relu_bn"])
def test_an_overwriting_activation_does_not_reach_the_skip_path(name, activation):
    model, other = initialised(name), initialised(name, activation=activation)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("activation", ["leaky_relu(0.2)", nn.GELU(), F.silu, nn.Mish, None])
def test_kinds_of_activation(activation):
    model = small("nf_resnet26", activation=activation)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_autocast():
    model = small("nf_seresnet26")
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.05)
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
