"""Checkpoints of timm's normaliser-free models: which model they are of, and how their tensors are named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import EfficientChannelAttention, SqueezeExcite, WSConv2d
from ..models import create_model, model_entry
from ..models.data import DataConfig
from ..models.network import ResidualNetwork
from ..models.nfnet import MODELS as NFNETS
from ..models.regnet_layout import VARIANTS as REGNETS
from ..models.resnet_layout import DEPTHS, STEM_WIDTH
from .matching import CheckpointError, Classifier, Slot, assign, become, match, reconfigured, require_created
from .reading import read_state_dict

StateDict = Mapping[str, Tensor]

_BLOCK_CONVS = {"conv1": "conv0", "conv2": "conv1", "conv2b": "conv1b", "conv3": "conv2"}
"""timm's name of a convolution in a block, and ours."""

_TRAINED_ON = {
    "nf_resnet50": DataConfig(256, 288, crop_fraction=0.94),
    "nf_regnet_b1": DataConfig(256, 288, crop_fraction=0.9),
}
_DM_CROP_FRACTIONS = (0.9, 0.91, 0.92, 0.94, 0.951, 0.954, 0.956)


def load_timm(
    model: nn.Module,
    source: StateDict | str | Path,
    *,
    classifier: Classifier = "load",
    reconfigure: bool = True,
) -> ResidualNetwork:
    """Loads weights of timm's ``nf_*``, ``nfnet_*``, ``eca_nfnet_*`` and ``dm_nfnet_*`` models into ours.

    The parameters have the same values as timm's. Where timm has no skip gain, ours is 1. In training, stochastic
    depth differs: timm rescales the branches that it keeps.

    Args:
        model: made by :func:`normfree.create_model`, with the architecture of the checkpoint; NF-RegNets with
            ``channel_multiple=8``. :func:`from_timm` makes it.
        source: a state dict, a ``.safetensors`` file, or a file of ``torch.save``.
        classifier: ``"keep"`` leaves the model's own classifier alone, for other classes.
        reconfigure: give the model what timm computes with and what is not in the checkpoint: the published γ, where
            it is applied, the rule for eps, α, the activation, the padding and the average-pooled shortcut.

    Returns:
        ``model``.

    Raises:
        CheckpointError: the checkpoint does not fit (which tensor, what came, what was expected), has NaN in it, or
            the file cannot be read. The model is as it was.
        FileNotFoundError: no such file.
        TypeError: not a model of ``create_model``.
    """
    model = require_created(model)
    tensors = read_state_dict(source)
    name, options = recognise_timm(tensors)
    target = reconfigured(model, _computation(name, tensors)) if reconfigure else model
    slots = list(_slots(target, tensors))
    if model.num_classes == 0:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.fc.")}
    values = match(slots, tensors, classifier, hint=f"\nIt looks like {name} with {_described(options)}.")
    assign(slots, values)
    if not _has_skip_gain(tensors):
        with torch.no_grad():
            for block in target.residual_blocks:
                block.skip_gain.fill_(1.0)
    become(model, target)
    return model


def from_timm(source: StateDict | str | Path, **options: Any) -> ResidualNetwork:
    """The model that a timm checkpoint is of, with its weights, ready for inference.

    Args:
        source: a state dict, a ``.safetensors`` file, or a file of ``torch.save``.
        options: of :func:`normfree.create_model`, which take precedence over what the checkpoint tells.
            ``num_classes`` other than the checkpoint's leaves the classifier as a new one.

    Returns:
        The model, in evaluation mode and with the precision of the checkpoint; ``model.info`` says its name, options
        and data configuration.

    Raises:
        CheckpointError: not a checkpoint of these families, or as :func:`load_timm`.
        FileNotFoundError: no such file.
        ValueError: an option that the model does not take.
    """
    tensors = read_state_dict(source)
    name, recognised = recognise_timm(tensors)
    chosen = {**recognised, **_computation(name, tensors), **options}
    model = create_model(name, **chosen).to(tensors["stages.0.0.conv1.gain"].dtype)
    model.info.data = _data_config(name, tensors)
    same_classes = chosen["num_classes"] == recognised["num_classes"]
    return load_timm(model, tensors, classifier="load" if same_classes else "keep", reconfigure=False).eval()


def recognise_timm(tensors: StateDict) -> tuple[str, dict[str, Any]]:
    """Our name of the model that a timm state dict is of, and the options that its shapes ask for.

    Raises:
        CheckpointError: not a state dict of timm's normaliser-free families.
    """
    depths = _depths(tensors)
    stem = next((tensors[key] for key in ("stem.conv.weight", "stem.conv1.weight") if key in tensors), None)
    gain = tensors.get("stages.0.0.conv1.gain")
    if stem is None or stem.ndim != 4 or gain is None or not gain.is_floating_point():
        first = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            "checkpoint: not one of timm's normaliser-free models, which have stem.conv.weight or stem.conv1.weight "
            f"and stages.0.0.conv1.gain; it starts with {first}"
        )
    has_classifier = any(name.startswith("head.fc.") for name in tensors)
    num_classes = _shape(tensors, "head.fc.weight", axes=2)[0] if has_classifier else 0
    options: dict[str, Any] = {"num_classes": num_classes, "in_channels": stem.shape[1]}
    if "stem.conv1.weight" in tensors:
        return _recognise_nfnet(tensors, depths, options)
    if stem.shape[-1] == 3:
        return _recognise_regnet(depths, options)
    return _recognise_resnet(tensors, stem, depths, options)


def _recognise_resnet(
    tensors: StateDict, stem: Tensor, depths: tuple[int, ...], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    depth = next((depth for depth, blocks in DEPTHS.items() if blocks == depths), None)
    if depth is None:
        raise CheckpointError(f"checkpoint: no NF-ResNet has {depths} blocks per stage")
    options["width"] = stem.shape[0] / STEM_WIDTH
    if "stages.0.0.attn_last.conv.weight" in tensors:
        return f"nf_ecaresnet{depth}", options
    squeeze = "stages.0.0.attn_last.fc1.weight"
    if squeeze not in tensors:
        return f"nf_resnet{depth}", options
    hidden, channels = _shape(tensors, squeeze)[:2]
    return f"nf_seresnet{depth}", {**options, "se_ratio": hidden / channels}


def _recognise_regnet(depths: tuple[int, ...], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = next((name for name, variant in REGNETS.items() if variant.depths == depths), None)
    if name is None:
        raise CheckpointError(f"checkpoint: no NF-RegNet has {depths} blocks per stage")
    return f"nf_regnet_{name}", {**options, "channel_multiple": 8}


def _recognise_nfnet(
    tensors: StateDict, depths: tuple[int, ...], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    eca = "stages.0.0.attn_last.conv.weight" in tensors
    mid, per_group = _shape(tensors, "stages.3.0.conv2.weight")[:2]
    last, width = _shape(tensors, "stages.3.0.conv3.weight")[0], _shape(tensors, "stages.0.0.conv3.weight")[0]
    options["stem_width"] = _shape(tensors, "stem.conv4.weight")[0]
    for name, entry in NFNETS.items():
        variant = entry.build.args[0]  # type: ignore[attr-defined]
        fits = variant.depths == depths and entry.defaults()["eca"] == eca
        if fits and mid == int(last * variant.bottleneck_ratio) and per_group == min(variant.group_size, mid):
            return name, {**options, "width": width / variant.widths[0]}
    raise CheckpointError(
        f"checkpoint: no NFNet has {depths} blocks per stage, {mid} channels in its last blocks in groups of "
        f"{per_group}, and {'efficient channel attention' if eca else 'squeeze-and-excitation'}"
    )


def _shape(tensors: StateDict, name: str, axes: int = 4) -> torch.Size:
    if name not in tensors:
        raise CheckpointError(f"checkpoint: {name}: missing")
    if tensors[name].ndim != axes:
        raise CheckpointError(f"checkpoint: {name}: expected {axes} axes, got shape {tuple(tensors[name].shape)}")
    return tensors[name].shape


def _depths(tensors: StateDict) -> tuple[int, ...]:
    """Blocks per stage."""
    places = (re.match(r"stages\.(\d+)\.(\d+)\.", name) for name in tensors)
    blocks = {(int(place[1]), int(place[2])) for place in places if place}
    per_stage = Counter(stage for stage, _ in blocks)
    return tuple(per_stage[stage] for stage in sorted(per_stage))


def _has_skip_gain(tensors: StateDict) -> bool:
    return "stages.0.0.skipinit_gain" in tensors


def _is_dm(name: str, tensors: StateDict) -> bool:
    """Whether it is one of timm's dm_* models, which compute as the original does."""
    return name.startswith("nfnet_f") and _has_skip_gain(tensors)


def _computation(name: str, tensors: StateDict) -> dict[str, Any]:
    """What timm computes with and what is not in the checkpoint."""
    from_original = _is_dm(name, tensors)
    activation = model_entry(name).defaults()["activation"]
    return {
        "activation": "gelu" if activation == "gelu_tanh" else activation,
        "alpha": 0.2,
        "gain_source": "published",
        "gamma_placement": "activation" if from_original else "weight",
        "eps_mode": "added",
        "padding": "same" if from_original else "symmetric",
        "shortcut": "avgpool",
    }


def _data_config(name: str, tensors: StateDict) -> DataConfig:
    data = _TRAINED_ON.get(name, model_entry(name).data)
    level = int(name[-1]) if _is_dm(name, tensors) else len(_DM_CROP_FRACTIONS)
    if level < len(_DM_CROP_FRACTIONS):
        data = replace(data, crop_fraction=_DM_CROP_FRACTIONS[level], crop_mode="squash")
    return data


def _described(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _slots(model: ResidualNetwork, tensors: StateDict) -> Iterator[Slot]:
    for name, layer in model.stem.named_children():
        if isinstance(layer, WSConv2d):
            yield from _conv_slots("stem.conv" if name == "conv" else f"stem.conv{int(name[4:]) + 1}", layer)
    for stage_index, stage in model.stages.named_children():
        for index, block in stage.named_children():
            yield from _block_slots(f"stages.{stage_index}.{index}", block, tensors)
    if isinstance(model.final_conv, WSConv2d):
        yield from _conv_slots("final_conv", model.final_conv)
    if isinstance(model.head.classifier, nn.Linear):
        yield Slot("head.fc.weight", model.head.classifier.weight, is_classifier=True)
        yield Slot("head.fc.bias", model.head.classifier.bias, is_classifier=True)


def _block_slots(path: str, block: Any, tensors: StateDict) -> Iterator[Slot]:
    for theirs, ours in _BLOCK_CONVS.items():
        layer = getattr(block, ours, None)
        if layer is not None:
            yield from _conv_slots(f"{path}.{theirs}", layer)
    if block.conv_shortcut is not None:
        for layer in block.conv_shortcut.modules():
            if isinstance(layer, WSConv2d):
                yield from _conv_slots(f"{path}.downsample.conv", layer)
    attention = block.channel_attention
    place = f"{path}.{'attn_last' if block.attention_position == 'end' else 'attn'}"
    if isinstance(attention, EfficientChannelAttention):
        yield Slot(f"{place}.conv.weight", attention.conv.weight)
    elif isinstance(attention, SqueezeExcite):
        for theirs, linear in (("fc1", attention.reduce), ("fc2", attention.expand)):
            yield Slot(f"{place}.{theirs}.weight", linear.weight, _without_taps)
            yield Slot(f"{place}.{theirs}.bias", linear.bias)
    if _has_skip_gain(tensors):
        yield Slot(f"{path}.skipinit_gain", block.skip_gain)


def _conv_slots(path: str, conv: WSConv2d) -> Iterator[Slot]:
    yield Slot(f"{path}.weight", conv.weight)
    if conv.gain is not None:
        yield Slot(f"{path}.gain", conv.gain, _without_taps_and_inputs)
    if conv.bias is not None:
        yield Slot(f"{path}.bias", conv.bias)


def _without_taps(tensor: Tensor) -> Tensor:
    return tensor.squeeze(-1).squeeze(-1)


def _without_taps_and_inputs(tensor: Tensor) -> Tensor:
    return tensor.flatten() if tensor.shape[1:].numel() == 1 else tensor
