"""Parameter trees of the original implementation, which is written in Haiku."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import SqueezeExcite, WSConv2d
from ..models.network import ResidualNetwork
from .matching import CheckpointError, Classifier, Slot, assign, become, match, reconfigured, require_created
from .reading import read_arrays

_BLOCK_NAMES = {
    "NF_ResNet": "nf_res_block",
    "NF_RegNet": "nf_block",
    "NFNet": "nf_block",
    "SkipInit_ResNet": "nf_res_block",
    "FixUp_ResNet": "res_block",
}
"""Root of a tree, and the name of its blocks."""
_ROOT_OF_MODEL = {
    r"nf_(se)?resnet\d+": "NF_ResNet",
    r"nf_regnet_b\d": "NF_RegNet",
    r"nfnet_[fl]\d": "NFNet",
    r"skipinit_resnet\d+": "SkipInit_ResNet",
    r"fixup_resnet\d+": "FixUp_ResNet",
}
_FIXUP_SCALARS = ("bias1a", "bias1b", "bias2a", "bias2b", "bias3a", "bias3b")


def load_haiku(
    model: nn.Module,
    tree: Mapping[Any, Any] | str | Path,
    *,
    classifier: Classifier = "load",
    reconfigure: bool = True,
) -> ResidualNetwork:
    """Loads parameters of the original implementation into a model of the same family, depth and width.

    The original counts the widths of ResNets in units of 64 channels, so that its width 1 is ``width=0.25`` here.

    Args:
        model: an NF-ResNet (with or without squeeze-and-excitation), NF-RegNet, NFNet, SkipInit ResNet or FixUp
            ResNet made by :func:`normfree.create_model`.
        tree: ``{module path: {parameter: array}}``, nested further or flattened, or an ``.npz`` file of a flattened
            tree, module path and parameter joined by ``/``, ``//`` or ``:``.
        classifier: ``"keep"`` leaves the model's own classifier alone, for other classes.
        reconfigure: give the model what the original computes with and what is not in the tree: the published γ,
            SAME padding, eps as a lower bound and the family's kind of shortcut. The activation stays the model's.

    Returns:
        ``model``.

    Raises:
        CheckpointError: the tree does not fit (which array, what came, what was expected), has NaN in it, or the
            file cannot be read. The model is as it was.
        FileNotFoundError: no such file.
        TypeError: not a model of ``create_model``.
    """
    model = require_created(model)
    root = _root_of(model)
    arrays = _flatten(read_arrays(Path(tree)) if isinstance(tree, (str, Path)) else tree)
    tensors = _below_root(arrays, root)
    target = reconfigured(model, _original_options(root)) if reconfigure else model
    slots = list(_slots(target, _BLOCK_NAMES[root]))
    if model.num_classes == 0:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("linear/")}
    values = match(slots, tensors, classifier, hint=_depth_hint(model, tensors, _BLOCK_NAMES[root]))
    assign(slots, values)
    become(model, target)
    return model


def _root_of(model: ResidualNetwork) -> str:
    for pattern, root in _ROOT_OF_MODEL.items():
        if re.fullmatch(pattern, model.info.name):
            return root
    raise CheckpointError(
        f"model: the original implementation has no {model.info.name}; it has {', '.join(_BLOCK_NAMES)}"
    )


def _original_options(root: str) -> dict[str, Any]:
    pooled = root in ("NF_RegNet", "NFNet")
    return {
        "gain_source": "published",
        "gamma_placement": "activation",
        "eps_mode": "floor",
        "padding": "same",
        "shortcut": "avgpool" if pooled else "strided",
    }


def _depth_hint(model: ResidualNetwork, tensors: Mapping[str, Tensor], block_name: str) -> str:
    came = len({name.split("/")[0] for name in tensors if name.startswith(block_name)})
    expected = len(model.residual_blocks)
    return "" if came == expected else f"\nThe tree has {came} blocks, the model has {expected}."


def _flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Leaves by path: parts joined by one slash, without Haiku's ``~``."""
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"tree: expected a mapping of module paths to arrays, got {type(tree).__name__}")
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = "/".join(key) if isinstance(key, tuple) else str(key)
        below = _flatten(value) if isinstance(value, Mapping) else {"": value}
        for rest, leaf in below.items():
            parts = [part for part in re.split("[/:]", f"{path}/{rest}") if part not in ("", "~")]
            leaves["/".join(parts)] = leaf
    return leaves


def _below_root(arrays: Mapping[str, Any], root: str) -> dict[str, Tensor]:
    """Tensors by the path below the network's own name, which is checked."""
    tensors = {}
    for path, array in arrays.items():
        parts = path.split("/")
        found = next((place for place, part in enumerate(parts) if part in _BLOCK_NAMES), 0)
        if parts[found] in _BLOCK_NAMES and parts[found] != root:
            raise CheckpointError(f"tree: {path} is of {parts[found]}, the model is the original's {root}")
        tensors["/".join(parts[found + 1 :])] = _tensor(path, array)
    return tensors


def _tensor(path: str, array: Any) -> Tensor:
    if torch.is_tensor(array):
        return array.detach()
    values = np.asarray(array)
    if values.dtype.name == "bfloat16":
        values = values.astype(np.float32)
    if values.dtype.kind != "f":
        raise CheckpointError(f"tree: {path}: expected an array of floating-point numbers, got dtype {values.dtype}")
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("=")))


def _slots(model: ResidualNetwork, block_name: str) -> Iterator[Slot]:
    for name, layer in model.stem.named_children():
        if isinstance(layer, nn.Conv2d):
            path = "initial_conv" if name == "conv" else f"stem_{name}"
            yield from _conv_slots(path, layer)
    for index, block in enumerate(model.residual_blocks):
        yield from _block_slots(block_name if index == 0 else f"{block_name}_{index}", block)
    if model.final_conv is not None:
        yield from _conv_slots("final_conv", model.final_conv)
    scalar_biases: dict[str, Any] = {"bias1": getattr(model.stem, "bias1", None), "bias2": model.head.scalar_bias}
    for name, owner in scalar_biases.items():
        if owner is not None:
            yield Slot(name, owner.bias)
    if isinstance(model.head.classifier, nn.Linear):
        yield from _linear_slots("linear", model.head.classifier, is_classifier=True)


def _block_slots(path: str, block: Any) -> Iterator[Slot]:
    for name in ("conv0", "conv1", "conv1b", "conv2", "conv_shortcut"):
        for layer in _modules(getattr(block, name, None)):
            if isinstance(layer, nn.Conv2d):
                yield from _conv_slots(f"{path}/{name}", layer)
    for layer in _modules(getattr(block, "channel_attention", None)):
        if isinstance(layer, SqueezeExcite):
            yield from _linear_slots(f"{path}/squeeze_excite/linear", layer.reduce)
            yield from _linear_slots(f"{path}/squeeze_excite/linear_1", layer.expand)
    for name in ("skip_gain", "scale"):
        if hasattr(block, name):
            yield Slot(f"{path}/{name}", getattr(block, name))
    for name in _FIXUP_SCALARS:
        if hasattr(block, name):
            yield Slot(f"{path}/{name}", getattr(block, name).bias)


def _modules(module: nn.Module | None) -> Iterator[nn.Module]:
    return iter(()) if module is None else module.modules()


def _conv_slots(path: str, conv: nn.Module) -> Iterator[Slot]:
    yield Slot(f"{path}/w", conv.weight, _hwio_to_oihw)  # type: ignore[arg-type]
    if isinstance(conv, WSConv2d) and conv.gain is not None:
        yield Slot(f"{path}/gain", conv.gain)
    if conv.bias is not None:
        yield Slot(f"{path}/{'bias' if isinstance(conv, WSConv2d) else 'b'}", conv.bias)  # type: ignore[arg-type]


def _linear_slots(path: str, linear: nn.Linear, is_classifier: bool = False) -> Iterator[Slot]:
    yield Slot(f"{path}/w", linear.weight, _transposed, is_classifier)
    yield Slot(f"{path}/b", linear.bias, is_classifier=is_classifier)


def _hwio_to_oihw(tensor: Tensor) -> Tensor:
    return tensor.permute(3, 2, 0, 1)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 0)
