"""`spp` against captured activations, known block counts, and networks written to be awkward."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfree as nf
from normfree._torchvision import import_timm, import_torchvision


def torchvision_model(name: str, **options: Any) -> nn.Module:
    return import_torchvision().models.get_model(name, weights=None, **options)


def timm_model(name: str, **options: Any) -> nn.Module:
    return import_timm().create_model(name, **options)


def statistics(activation: Tensor, axis: int = 1) -> tuple[float, float]:
    channels = np.moveaxis(activation.detach().double().numpy(), axis, 0).reshape(activation.shape[axis], -1)
    return float((channels.mean(axis=1) ** 2).mean()), float(channels.var(axis=1).mean())


def captured(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The output of every module, copied before anything can overwrite it."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for path, module in model.named_modules():

        def keep(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            if isinstance(output, Tensor):
                outputs[path] = output.clone()

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return outputs


# model, pixels, pattern of the blocks' paths, path of the branch below a block, channel axis
CAPTURED: list[tuple[str, Callable[[], nn.Module], int, str, str, int]] = [
    ("resnet18", lambda: torchvision_model("resnet18"), 64, r"layer\d\.\d", "bn2", 1),
    ("resnet50", lambda: torchvision_model("resnet50"), 64, r"layer\d\.\d", "bn3", 1),
    ("regnet_y_400mf", lambda: torchvision_model("regnet_y_400mf"), 64, r"trunk_output\.block\d\.block\d-\d", "f", 1),
    ("convnext_tiny", lambda: torchvision_model("convnext_tiny"), 64, r"features\.[1357]\.\d", "block.6", 1),
    ("efficientnet_b0", lambda: torchvision_model("efficientnet_b0"), 64, r"features\.\d\.\d", "block", 1),
    ("mobilenet_v3_large", lambda: torchvision_model("mobilenet_v3_large"), 64, r"features\.\d+", "block", 1),
    ("timm resnetv2_50", lambda: timm_model("resnetv2_50"), 64, r"stages\.\d\.blocks\.\d", "conv3", 1),
    ("timm vit", lambda: timm_model("vit_tiny_patch16_224", img_size=64), 64, r"blocks\.\d+", "mlp", 2),
    ("timm mixer", lambda: timm_model("mixer_s32_224", img_size=64), 64, r"blocks\.\d+", "mlp_channels", 2),
    ("swin_t", lambda: torchvision_model("swin_t"), 64, r"features\.[1357]\.\d", "mlp", 3),
]


@pytest.mark.parametrize(
    ("make", "pixels", "blocks", "branch", "axis"), [c[1:] for c in CAPTURED], ids=[c[0] for c in CAPTURED]
)
def test_statistics_equal_numpy_on_captured_activations(
    make: Callable[[], nn.Module], pixels: int, blocks: str, branch: str, axis: int
) -> None:
    model, inputs = make().eval(), torch.randn(2, 3, pixels, pixels)
    for parameter in model.parameters():  # fresh layer scales of 1e-6 and zero gains would hide the branches
        if parameter.ndim == 1 or parameter.abs().max() < 1e-5:
            nn.init.normal_(parameter, 1.0, 0.1)
    outputs = captured(model, inputs)
    signal = nf.spp(model, inputs, norm_statistics="running")
    compared = 0
    for point in signal.points[1:]:
        if not re.fullmatch(blocks, point.name):
            continue
        squared_mean, variance = statistics(outputs[point.name], axis)
        assert point.shape == tuple(outputs[point.name].shape)
        assert point.avg_channel_squared_mean == pytest.approx(squared_mean, rel=1e-5)
        assert point.avg_channel_variance == pytest.approx(variance, rel=1e-5)
        residual = outputs[f"{point.name}.{branch}"]
        if "convnext" in type(model).__name__.lower():  # the layer scale behind the last module
            residual = residual * dict(model.named_parameters())[f"{point.name}.layer_scale"]
        assert point.residual_avg_channel_variance == pytest.approx(statistics(residual, axis)[1], rel=1e-5)
        compared += 1
    assert compared >= 8


def test_batchnorm_in_training_mode_equals_numpy() -> None:
    model, inputs = torchvision_model("resnet18"), torch.randn(2, 3, 64, 64)
    signal = nf.spp(model, inputs)
    outputs = captured(copy.deepcopy(model).train(), inputs)
    for point in signal.points[1:]:
        assert point.avg_channel_variance == pytest.approx(statistics(outputs[point.name])[1], rel=1e-5)
    stem = captured(copy.deepcopy(model).train(), inputs)["maxpool"]
    assert signal.points[0].kind == "stem"
    assert signal.points[0].avg_channel_variance == pytest.approx(statistics(stem)[1], rel=1e-5)


COUNTS: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    # model, residual merges, of which transitions
    ("torchvision resnet18", lambda: torchvision_model("resnet18"), 8, 3),
    ("torchvision resnet50", lambda: torchvision_model("resnet50"), 16, 4),
    ("torchvision resnext50", lambda: torchvision_model("resnext50_32x4d"), 16, 4),
    ("torchvision regnet_y", lambda: torchvision_model("regnet_y_400mf"), 16, 4),
    ("torchvision convnext_tiny", lambda: torchvision_model("convnext_tiny"), 18, 0),
    ("torchvision efficientnet_b0", lambda: torchvision_model("efficientnet_b0"), 9, 0),
    ("torchvision mobilenet_v3", lambda: torchvision_model("mobilenet_v3_large"), 10, 0),
    ("torchvision swin_t", lambda: torchvision_model("swin_t"), 24, 0),
    ("timm seresnet50", lambda: timm_model("seresnet50"), 16, 4),
    ("timm vit_tiny", lambda: timm_model("vit_tiny_patch16_224", img_size=64), 24, 0),
    ("timm swin_tiny", lambda: timm_model("swin_tiny_patch4_window7_224", img_size=56), 24, 0),
    ("timm mixer", lambda: timm_model("mixer_s32_224", img_size=64), 16, 0),
    ("timm nf_resnet26", lambda: timm_model("nf_resnet26"), 8, 4),
    ("timm poolformer", lambda: timm_model("poolformer_s12"), 24, 0),
    ("adders that can be quantised", lambda: import_torchvision().models.quantization.resnet18(quantize=False), 8, 3),
    (
        "transformer encoder, normalised behind",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 3, enable_nested_tensor=False),
        6,
        0,
    ),
    (
        "transformer encoder, normalised in front",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, batch_first=True), 3, enable_nested_tensor=False
        ),
        6,
        0,
    ),
]


@pytest.mark.parametrize(("make", "merges", "transitions"), [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
def test_number_of_residual_merges(make: Callable[[], nn.Module], merges: int, transitions: int) -> None:
    model = make()
    pixels = 56 if "Swin" in type(model).__name__ and hasattr(model, "layers") else 64
    inputs = torch.randn(5, 2, 16) if isinstance(model, nn.TransformerEncoder) else torch.randn(2, 3, pixels, pixels)
    signal = nf.spp(model, inputs, norm_statistics="running")
    kinds = [point.kind for point in signal.points]
    assert kinds[0] == "stem"
    assert len(kinds) - 1 == merges
    assert kinds.count("transition") == transitions
    assert len({point.name for point in signal.points[1:]}) == merges


def test_stages_follow_the_shapes() -> None:
    signal = nf.spp(torchvision_model("resnet50"), torch.randn(2, 3, 64, 64))
    assert [point.stage for point in signal.points] == [0] + [1] * 3 + [2] * 4 + [3] * 6 + [4] * 3
    assert signal.stage_starts == [1, 4, 8, 14]
    swin = nf.spp(timm_model("swin_tiny_patch4_window7_224", img_size=56), torch.randn(1, 3, 56, 56))
    assert [point.stage for point in swin.points] == [0] + [1] * 4 + [2] * 4 + [3] * 12 + [4] * 4


# ------------------------------------------------------------------ networks written to be awkward


class Residual(nn.Module):
    """x + f(x), added in the way that is asked for."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], channels: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.deep = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.add(x, self.deep(x))


def _inplace(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


ADDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "y += x": _inplace,
    "torch.add": torch.add,
    "x.add(y)": lambda x, y: x.add(y),
    "y.add_(x)": lambda x, y: y.add_(x),
    "sum": lambda x, y: sum([x, y]),
    "out=": lambda x, y: torch.add(x, y, out=torch.empty_like(x)),
    "FloatFunctional": torch.ao.nn.quantized.FloatFunctional().add,
    "torch.ops": torch.ops.aten.add.Tensor,
}


@pytest.mark.parametrize("add", ADDERS.values(), ids=ADDERS.keys())
def test_every_way_to_add(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, inputs = Residual(add), torch.randn(2, 3, 8, 8)
    stem, branch, point = _stem_branch_point(model, inputs)
    with torch.no_grad():
        x = model.stem(inputs)
        y = model.deep(x)
    assert (stem.kind, point.kind) == ("stem", "block")
    assert stem.avg_channel_variance == pytest.approx(statistics(x)[1], rel=1e-5)
    assert branch == pytest.approx(statistics(y)[1], rel=1e-5)
    assert point.avg_channel_variance == pytest.approx(statistics(x + y)[1], rel=1e-5)


def _stem_branch_point(model: nn.Module, inputs: Tensor) -> tuple[nf.SignalPoint, float | None, nf.SignalPoint]:
    signal = nf.spp(model, inputs)
    assert len(signal.points) == 2
    return signal.points[0], signal.points[1].residual_avg_channel_variance, signal.points[1]


class TwoBranches(nn.Module):
    """Two convolutional branches of different depth without an identity: the shallow one is the skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(3, 8, 1, stride=2)
        self.deep = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shallow(x) + self.deep(x))


@pytest.mark.parametrize("swap", [False, True])
def test_the_branch_is_the_operand_with_more_computation_behind_it(swap: bool) -> None:
    model, inputs = TwoBranches(), torch.randn(4, 3, 9, 9)
    if swap:
        model.forward = lambda x: model.deep(x) + model.shallow(x)  # type: ignore[method-assign]
    stem, branch, point = _stem_branch_point(model, inputs)
    assert point.kind == "transition"
    assert branch == pytest.approx(statistics(model.train().deep(inputs))[1], rel=1e-5)
    assert stem.avg_channel_variance == pytest.approx(statistics(inputs)[1], rel=1e-5)


class NotResidual(nn.Module):
    """Additions that are no residual merges: bias, position embedding, scalars, masks, gates, tanh-GELU by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 6, 6))
        self.position = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.bias + 1.0
        x = x + self.position.expand(x.shape[0], -1, -1, -1)
        x = x + torch.zeros_like(x)
        x = x + x.new_ones(x.shape)
        x = 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.0447 * x**3)))
        x = x * torch.sigmoid(self.gate(x))
        x = x + self.gate(x)  # broadcast
        return self.second(x)


def test_additions_that_are_no_merges() -> None:
    signal = nf.spp(NotResidual(), torch.randn(2, 3, 6, 6))
    assert {point.kind for point in signal.points} == {"layer"}
    assert [point.name for point in signal.points] == ["first", "gate.1", "gate.1#2", "second"]


class ScaledResidual(nn.Module):
    """x + alpha · gain · f(x), as other libraries write it."""

    def __init__(self, gain: float, inplace: bool):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        self.gain, self.inplace = nn.Parameter(torch.tensor(gain)), inplace

    def forward(self, x: Tensor) -> Tensor:
        branch = self.f(x)
        if self.inplace:
            branch.mul_(self.gain)
            return branch * 0.2 + x
        return torch.add(x, (self.gain * branch) / 2.5, alpha=0.5)


@pytest.mark.parametrize("gain", [0.0, 0.7, -1.3])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_branch_is_measured_before_its_scalars(gain: float, inplace: bool) -> None:
    model, inputs = ScaledResidual(gain, inplace), torch.randn(2, 3, 8, 8)
    _, branch, point = _stem_branch_point(model, inputs)
    with torch.no_grad():
        assert branch == pytest.approx(statistics(model.f(inputs))[1], rel=1e-4)
        assert point.avg_channel_variance == pytest.approx(statistics(model(inputs))[1], rel=1e-5)


class ScaledTwice(ScaledResidual):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.f(x) * self.gain
        branch *= 0.2
        branch += 0.0
        return x + branch


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_scaling_in_place_keeps_the_scale_before(gain: float) -> None:
    model, inputs = ScaledTwice(gain, True), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = statistics(model.f(inputs))[1]
    assert _stem_branch_point(model, inputs)[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_seresnet26", "skipinit_resnet26"])
@pytest.mark.parametrize("skip_gain", [0.0, 0.5, 1.0])
def test_scalars_in_the_weights_do_not_hide_the_branch(name: str, skip_gain: float) -> None:
    model = nf.create_model(name, 10, width=0.25, skip_gain=skip_gain)
    inputs = torch.randn(2, 3, 64, 64)
    block = model.stages[0][0]
    with torch.no_grad():
        activated = block.activation(model.stem(inputs))
        block.skip_gain.fill_(1.0)
        expected = statistics(block.branch(activated) / block.alpha)[1]
        block.skip_gain.fill_(skip_gain)
    assert nf.spp(model, inputs).points[1].residual_avg_channel_variance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["nf_seresnet26", "nf_regnet_b0"])
def test_the_doubling_of_a_gate_belongs_to_the_branch(name: str) -> None:
    theirs, inputs = timm_model(name).eval(), torch.randn(2, 3, 64, 64)
    for parameter in theirs.parameters():
        if parameter.ndim <= 1 or parameter.shape[1:].numel() == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    ours = nf.from_timm(theirs.state_dict())
    for a, b in zip(nf.spp(ours, inputs).points, nf.spp(theirs, inputs).points, strict=True):
        assert a.avg_channel_variance == pytest.approx(b.avg_channel_variance, rel=1e-4)
        if a.residual_avg_channel_variance is not None:
            assert a.residual_avg_channel_variance == pytest.approx(b.residual_avg_channel_variance, rel=1e-4)


class Functional(nn.Module):
    """No submodules at all, and a loop over weights."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 3, 3) / 6) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + nn.functional.conv2d(x.relu(), weight, padding=1)
        return x


def test_a_network_without_submodules() -> None:
    signal = nf.spp(Functional(), torch.randn(2, 4, 8, 8))
    assert [point.kind for point in signal.points] == ["stem", "block", "block", "block"]
    assert len({point.name for point in signal.points}) == 4


class Parallel(nn.Module):
    """x + f(x) + g(x): two branches on one skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.g = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)


def test_two_branches_on_one_skip_path() -> None:
    model, inputs = Parallel(), torch.randn(64, 8)
    signal = nf.spp(model, inputs)
    residuals = [point.residual_avg_channel_variance for point in signal.points[1:]]
    with torch.no_grad():
        assert residuals == pytest.approx([statistics(model.f(inputs))[1], statistics(model.g(inputs))[1]], rel=1e-5)
    assert [point.name for point in signal.points[1:]] == ["f", "g"]


class AttentionLogits(nn.Module):
    """q·k + q·relative, to all of the scores or in place to a part: an addition that goes into a softmax."""

    def __init__(self, first: int | None = None) -> None:
        super().__init__()
        self.first = first
        self.q, self.k, self.relative = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        scores = q @ self.k(x).transpose(1, 2)
        if self.first is None:
            scores = scores + self.relative(q)
        else:
            scores[:, self.first :] += self.relative(q)[:, self.first :]
        return x + scores.softmax(dim=-1) @ x


@pytest.mark.parametrize("first", [None, 1])
def test_attention_logits_are_no_merge(first: int | None) -> None:
    signal = nf.spp(AttentionLogits(first), torch.randn(2, 5, 8))
    assert [point.shape for point in signal.points] == [(2, 5, 8), (2, 5, 8)]


class TwoSoftmaxes(AttentionLogits):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ x.transpose(1, 2) + self.relative(x)
        return x + scores.softmax(dim=-1) @ x + scores.log_softmax(dim=-1) @ x


def test_attention_logits_that_are_used_twice() -> None:
    signal = nf.spp(TwoSoftmaxes(), torch.randn(2, 5, 8))
    assert [point.shape for point in signal.points] == [(2, 5, 8)] * 3


def test_layers_where_there_are_no_merges() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    inputs = torch.randn(2, 3, 8, 8)
    signal = nf.spp(model, inputs)
    outputs = captured(model, inputs)
    assert [point.name for point in signal.points] == ["0", "2", "4"]
    for point in signal.points:
        assert point.avg_channel_variance == pytest.approx(statistics(outputs[point.name])[1], rel=1e-5)
        assert point.residual_avg_channel_variance is None


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="neither an addition"):
        nf.spp(nn.ReLU(), torch.randn(2, 3))


# ------------------------------------------------------------------ layouts, dtypes, inputs


def test_channels_last_memory_and_bfloat16() -> None:
    model, inputs = nf.create_model("nf_resnet26", 10, width=0.25), torch.randn(4, 3, 64, 64)
    plain = nf.spp(model, inputs)
    last = nf.spp(model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last))
    half = nf.spp(model.bfloat16(), inputs)
    for a, b, c in zip(plain.points, last.points, half.points, strict=True):
        assert b.avg_channel_variance == pytest.approx(a.avg_channel_variance, rel=1e-4)
        assert c.avg_channel_variance == pytest.approx(a.avg_channel_variance, rel=0.03)


def test_the_channel_axis_can_be_given() -> None:
    model, inputs = Residual(torch.add), torch.randn(2, 3, 8, 8)
    found, given = nf.spp(model, inputs), nf.spp(model, inputs, channel_axis=1)
    other = nf.spp(model, inputs, channel_axis=-1)
    assert found == given
    with torch.no_grad():
        assert other.points[0].avg_channel_variance == pytest.approx(statistics(model.stem(inputs), 3)[1], rel=1e-5)
    with pytest.raises(ValueError, match="channel_axis: 9"):
        nf.spp(model, inputs, channel_axis=9)


def test_a_stream_of_batches_gives_the_statistics_of_all_together() -> None:
    model, inputs = nf.create_model("nf_resnet26", 10, width=0.25), torch.randn(7, 3, 64, 64)
    whole = nf.spp(model, inputs)
    stream = nf.spp(model, (batch for batch in inputs.split([3, 1, 3])))
    assert stream.examples == whole.examples == 7
    for a, b in zip(whole.points, stream.points, strict=True):
        for statistic in ("avg_channel_squared_mean", "avg_channel_variance", "residual_avg_channel_variance"):
            if getattr(a, statistic) is not None:
                assert getattr(b, statistic) == pytest.approx(getattr(a, statistic), rel=1e-5)


def test_data_loaders_mappings_and_own_calls() -> None:
    model, inputs = Residual(torch.add), torch.randn(4, 3, 8, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, torch.arange(4)), batch_size=2)
    random_state = torch.get_rng_state()
    expected = nf.spp(model, [inputs[:2], inputs[2:]])
    assert nf.spp(model, loader) == expected
    assert nf.spp(model, {"x": inputs}).points == nf.spp(model, inputs).points
    own = nf.spp(model, [{"pixels": inputs}], forward=lambda m, batch: m(batch["pixels"]))
    assert own.points == nf.spp(model, inputs).points
    assert nf.spp(model, loader, max_batches=1).examples == 2
    assert torch.equal(torch.get_rng_state(), random_state)


def test_bad_inputs_are_named() -> None:
    model = Residual(torch.add)
    with pytest.raises(ValueError, match="no batch"):
        nf.spp(model, [])
    with pytest.raises(TypeError, match="inputs: expected a tensor"):
        nf.spp(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm_statistics"):
        nf.spp(model, torch.randn(1, 3, 8, 8), norm_statistics="none")  # type: ignore[arg-type]


class Varying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = x + self.f(x)
        return x


def test_networks_that_change_between_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="must be the same"):
        nf.spp(Varying(), [torch.randn(2, 4), torch.randn(3, 4)])


# ------------------------------------------------------------------ the model is left as it was


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken on purpose")


def _fingerprint(model: nn.Module) -> list[Any]:
    def hooks(module: nn.Module) -> list[int]:
        return [
            len(getattr(module, name))
            for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
        ]

    return [(module.training, hooks(module), [id(b) for b in module.buffers()]) for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, backward: bool) -> None:
    tail = Failing() if fails else nn.Dropout(0.5)
    model = nn.Sequential(torchvision_model("resnet18"), tail)
    model[0].layer1.eval()  # a mixture of modes
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint, random_state = _fingerprint(model), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose") as caught:
            nf.spp(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), backward=backward)
        assert caught.value.__notes__ == ["spp: raised in module '1'"]
    else:
        nf.spp(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), backward=backward)
    assert _fingerprint(model) == fingerprint
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_dropout_and_stochastic_depth_are_off() -> None:
    model = nf.create_model("nf_resnet26", 10, width=0.25, drop_rate=0.5, stochastic_depth_rate=0.5).train()
    inputs = torch.randn(2, 3, 64, 64)
    assert nf.spp(model, inputs) == nf.spp(model, inputs)


def test_under_no_grad_inference_mode_and_compiled() -> None:
    model, inputs = nf.create_model("nf_resnet26", 10, width=0.25), torch.randn(2, 3, 64, 64)
    expected = nf.spp(model, inputs)
    with torch.no_grad():
        assert nf.spp(model, inputs) == expected
    with torch.inference_mode():
        assert nf.spp(model, inputs).points == expected.points
    assert nf.spp(torch.compile(model), inputs).points == expected.points


# ------------------------------------------------------------------ NaN, infinity, gradients


class Poison(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, 0, 0] = self.value
        return x


@pytest.mark.parametrize(("value", "counts"), [(float("nan"), (1, 0)), (float("inf"), (0, 1))])
def test_the_first_non_finite_point_is_reported(value: float, counts: tuple[int, int]) -> None:
    model = nf.create_model("nf_resnet26", 10, width=0.25, alpha=1.0, weights="he")
    model.stages[1][0].conv2.register_forward_hook(lambda *a: Poison(value)(a[-1]))
    signal = nf.spp(model, torch.randn(2, 3, 64, 64))
    point = signal.first_non_finite
    assert point is not None
    assert point.name == "stages.1.0"
    assert (point.nan_count, point.inf_count) == counts
    assert signal.points[2].is_finite
    assert "stages.1.0 is the first point" in str(signal)


def test_gradients_equal_autograd() -> None:
    model, inputs = nf.create_model("nf_resnet26", 10, width=0.25).eval(), torch.randn(2, 3, 64, 64)
    signal = nf.spp(model, inputs, backward=True, loss=lambda output: output.square().sum())
    activation = model.stem(inputs)
    activations = [activation]
    for stage in model.stages:
        for block in stage:
            activation = block(activation)
            activations.append(activation)
    loss = model.forward_head(activation).square().sum()
    gradients = torch.autograd.grad(loss, activations)
    for point, gradient in zip(signal.points, gradients, strict=True):
        squared_mean, variance = statistics(gradient)
        assert point.gradient_avg_channel_variance == pytest.approx(variance, rel=1e-4)
        assert point.gradient_avg_channel_squared_mean == pytest.approx(squared_mean, rel=1e-4)


def test_gradients_of_frozen_and_in_place_networks() -> None:
    model = torchvision_model("resnet18").requires_grad_(False)
    signal = nf.spp(model, torch.randn(2, 3, 64, 64), backward=True)
    assert all(point.gradient_avg_channel_variance > 0 for point in signal.points)
    assert nf.spp(model, torch.randn(2, 3, 64, 64)).points[0].gradient_avg_channel_variance is None


# ------------------------------------------------------------------ the curves of the original

STEM_AND_BLOCKS_224 = [
    *(0.359, 1.059, 1.098, 1.141, 1.063, 1.103, 1.142, 1.182, 1.066, 1.105, 1.142, 1.182, 1.220, 1.259),
    *(1.057, 1.093, 1.128),
]


@pytest.fixture(scope="module")
def curves() -> Iterator[dict[int, list[nf.SignalPropagation]]]:
    """The mean over seeds of what the original has: its padding and its constants."""
    measured: dict[int, list[nf.SignalPropagation]] = {224: [], 64: []}
    for pixels, batch_size in ((224, 4), (64, 4)):
        for seed in range(8):
            torch.manual_seed(seed)
            model = nf.create_model("nf_resnet50", padding="same", gain_source="published")
            measured[pixels].append(nf.spp(model, torch.randn(batch_size, 3, pixels, pixels)))
    return measured


def _mean(signals: list[nf.SignalPropagation], statistic: str) -> np.ndarray:
    rows = [[np.nan if v is None else v for v in signal.values(statistic)] for signal in signals]
    return np.mean(rows, axis=0)


def test_nf_resnet50_follows_the_original_at_224(curves: dict[int, list[nf.SignalPropagation]]) -> None:
    variance = _mean(curves[224], "avg_channel_variance")
    assert variance == pytest.approx(STEM_AND_BLOCKS_224, rel=0.05)
    residual = _mean(curves[224], "residual_avg_channel_variance")
    assert residual[[1, -1]] == pytest.approx([1.01, 0.875], rel=0.05)


def test_nf_resnet50_follows_the_original_at_64(curves: dict[int, list[nf.SignalPropagation]]) -> None:
    variance = _mean(curves[64], "avg_channel_variance")
    assert variance[[0, 1, 2, 3, 4]] == pytest.approx([0.366, 1.039, 1.077, 1.118, 1.033], rel=0.05)
    assert variance[[8, 14, 15, 16]] == pytest.approx([0.985, 0.838, 0.855, 0.873], rel=0.05)
    residual = _mean(curves[64], "residual_avg_channel_variance")
    assert residual[[1, -1]] == pytest.approx([0.96, 0.446], rel=0.05)
