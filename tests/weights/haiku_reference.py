"""The original networks in plain NumPy: random parameter trees, and the forward pass that reads them (NHWC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Tree = dict[str, dict[str, Array]]

RELU_GAMMA, SILU_GAMMA, GELU_GAMMA = 1.7139588594436646, 1.7881293296813965, 1.7015043497085571
ALPHA = 0.2


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def windows(x: Array, size: int, stride: int, fill: float) -> Array:
    """Every SAME-padded window: (N, H', W', C, size, size)."""
    pads = [(0, 0)]
    for length in x.shape[1:3]:
        total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def conv(x: Array, w: Array, stride: int = 1) -> Array:
    groups = x.shape[-1] // w.shape[2]
    seen = windows(x, w.shape[0], stride, 0.0)
    outputs = []
    for part, kernel in zip(np.split(seen, groups, axis=3), np.split(w, groups, axis=3), strict=True):
        columns = part.reshape(*part.shape[:3], -1)
        outputs.append(columns @ kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1]))
    return np.concatenate(outputs, axis=-1)


def ws_conv(x: Array, p: dict[str, Array], stride: int = 1) -> Array:
    w = p["w"]
    variance = w.var(axis=(0, 1, 2)) * np.prod(w.shape[:3])
    standardized = (w - w.mean(axis=(0, 1, 2))) / np.sqrt(np.maximum(variance, 1e-4)) * p["gain"]
    return conv(x, standardized, stride) + p["bias"]


def max_pool(x: Array) -> Array:
    return windows(x, 3, 2, -np.inf).max(axis=(4, 5))


def average_pool(x: Array) -> Array:
    """2×2, stride 2, over the pixels that exist."""
    with np.errstate(invalid="ignore"):
        return np.nanmean(windows(x, 2, 2, np.nan), axis=(4, 5))


def squeeze_excite(x: Array, tree: Tree, path: str) -> Array:
    first, second = tree[f"{path}/~/squeeze_excite/~/linear"], tree[f"{path}/~/squeeze_excite/~/linear_1"]
    hidden = relu(x.mean(axis=(1, 2)) @ first["w"] + first["b"])
    return 1.0 / (1.0 + np.exp(-(hidden @ second["w"] + second["b"])))[:, None, None]


def block_paths(root: str, block: str, depths: Sequence[int]) -> list[tuple[str, int, bool]]:
    """Path, number of the stage, and whether it is the stage's first block."""
    paths = []
    for stage, depth in enumerate(depths):
        for position in range(depth):
            suffix = f"_{len(paths)}" if paths else ""
            paths.append((f"{root}/~/{block}{suffix}", stage, position == 0))
    return paths


def nf_forward(
    x: Array, tree: Tree, root: str, depths: Sequence[int], strides: Sequence[int], activation: Callable[[Array], Array]
) -> Array:
    """NF-ResNet, NF-RegNet and NFNet; ``activation`` includes γ."""
    block = "nf_res_block" if root == "NF_ResNet" else "nf_block"
    if root == "NFNet":
        for index, stride in enumerate((2, 1, 1, 2)):
            x = ws_conv(activation(x) if index else x, tree[f"NFNet/~/stem_conv{index}"], stride)
    else:
        x = ws_conv(x, tree[f"{root}/~/initial_conv"], 2)
    if root == "NF_ResNet":
        x = max_pool(x)
    variance = 1.0
    for path, stage, first in block_paths(root, block, depths):
        stride = strides[stage] if first else 1
        out = activation(x) / math.sqrt(variance)
        shortcut = x
        if f"{path}/~/conv_shortcut" in tree:
            pooled = average_pool(out) if stride > 1 and root != "NF_ResNet" else out
            shortcut = ws_conv(pooled, tree[f"{path}/~/conv_shortcut"], stride if root == "NF_ResNet" else 1)
        out = ws_conv(out, tree[f"{path}/~/conv0"])
        out = ws_conv(activation(out), tree[f"{path}/~/conv1"], stride)
        if f"{path}/~/conv1b" in tree:
            out = ws_conv(activation(out), tree[f"{path}/~/conv1b"])
        if root == "NF_RegNet":
            out = 2.0 * squeeze_excite(out, tree, path) * out
        out = ws_conv(activation(out), tree[f"{path}/~/conv2"])
        if root != "NF_RegNet" and f"{path}/~/squeeze_excite/~/linear" in tree:
            out = 2.0 * squeeze_excite(out, tree, path) * out
        x = out * tree[path]["skip_gain"] * ALPHA + shortcut
        variance = (1.0 if first else variance) + ALPHA**2
    if f"{root}/~/final_conv" in tree:
        x = ws_conv(x, tree[f"{root}/~/final_conv"])
    return classify(activation(x).mean(axis=(1, 2)), tree, root)


def skipinit_forward(x: Array, tree: Tree, depths: Sequence[int]) -> Array:
    root = "SkipInit_ResNet"
    x = max_pool(conv(x, tree[f"{root}/~/initial_conv"]["w"], 2))
    for path, stage, first in block_paths(root, "nf_res_block", depths):
        stride = 2 if first and stage else 1
        out, shortcut = relu(x), x
        if f"{path}/~/conv_shortcut" in tree:
            shortcut = biased_conv(out, tree[f"{path}/~/conv_shortcut"], stride)
        out = biased_conv(out, tree[f"{path}/~/conv0"])
        out = biased_conv(relu(out), tree[f"{path}/~/conv1"], stride)
        out = biased_conv(relu(out), tree[f"{path}/~/conv2"])
        x = out * tree[path]["skip_gain"] + shortcut
    return classify(relu(x).mean(axis=(1, 2)), tree, root)


def biased_conv(x: Array, p: dict[str, Array], stride: int = 1) -> Array:
    return conv(x, p["w"], stride) + p["b"]


def fixup_forward(x: Array, tree: Tree, depths: Sequence[int]) -> Array:
    root = "FixUp_ResNet"
    x = max_pool(relu(conv(x, tree[f"{root}/~/initial_conv"]["w"], 2) + tree[root]["bias1"]))
    for path, stage, first in block_paths(root, "res_block", depths):
        p, stride = tree[path], 2 if first and stage else 1
        shortcut = out = x + p["bias1a"]
        if f"{path}/~/conv_shortcut" in tree:
            shortcut = conv(out, tree[f"{path}/~/conv_shortcut"]["w"], stride)
        out = relu(conv(out, tree[f"{path}/~/conv0"]["w"]) + p["bias1b"])
        out = relu(conv(out + p["bias2a"], tree[f"{path}/~/conv1"]["w"], stride) + p["bias2b"])
        out = conv(out + p["bias3a"], tree[f"{path}/~/conv2"]["w"]) * p["scale"] + p["bias3b"]
        x = relu(out + shortcut)
    return classify(x.mean(axis=(1, 2)) + tree[root]["bias2"], tree, root)


def classify(pooled: Array, tree: Tree, root: str) -> Array:
    return pooled @ tree[f"{root}/~/linear"]["w"] + tree[f"{root}/~/linear"]["b"]


class RandomTree:
    """Builds a tree of one of the families with random numbers where training could leave them."""

    def __init__(self, root: str, seed: int = 0, conv_bias: str | None = "bias", gains: bool = True):
        self.root, self.tree, self.random = root, {}, np.random.default_rng(seed)
        self.conv_bias, self.gains = conv_bias, gains

    def conv(self, path: str, size: int, inputs: int, outputs: int, groups: int = 1, bias: bool = True) -> None:
        fan_in = size * size * inputs // groups
        w = self.random.normal(0.0, fan_in**-0.5, (size, size, inputs // groups, outputs))
        entry = {"w": w}
        if self.gains:
            entry["gain"] = self.random.uniform(0.5, 1.5, outputs)
        if self.conv_bias and bias:
            entry[self.conv_bias] = self.random.normal(0.0, 0.1, outputs)
        self.tree[path] = entry

    def linear(self, path: str, inputs: int, outputs: int) -> None:
        w = self.random.normal(0.0, inputs**-0.5, (inputs, outputs))
        self.tree[path] = {"w": w, "b": self.random.normal(0.0, 0.1, outputs)}

    def scalars(self, path: str, *names: str) -> None:
        self.tree[path] = {name: self.random.uniform(0.2, 1.0, ()) for name in names}

    def squeeze_excite(self, path: str, channels: int, ratio: float) -> None:
        hidden = max(1, int(channels * ratio))
        self.linear(f"{path}/~/squeeze_excite/~/linear", channels, hidden)
        self.linear(f"{path}/~/squeeze_excite/~/linear_1", hidden, channels)


BLOCK_SCALARS = ("bias1a", "bias1b", "bias2a", "bias2b", "bias3a", "bias3b", "scale")


def resnet_tree(root: str, depths: Sequence[int], width: float, classes: int, se_ratio: float = 0.0) -> Tree:
    """``width`` counts units of 64 channels in the first stage, as the original does."""
    kinds = {"NF_ResNet": ("bias", True), "SkipInit_ResNet": ("b", False), "FixUp_ResNet": (None, False)}
    make = RandomTree(root, 0, *kinds[root])
    inputs = int(16 * width)
    make.conv(f"{root}/~/initial_conv", 7, 3, inputs, bias=root == "NF_ResNet")
    if root == "FixUp_ResNet":
        make.scalars(root, "bias1", "bias2")
    for path, stage, first in block_paths(root, "res_block" if root == "FixUp_ResNet" else "nf_res_block", depths):
        outputs = int((64, 128, 256, 512)[stage] * width)
        mid = int(outputs * 0.25)
        make.scalars(path, *(BLOCK_SCALARS if root == "FixUp_ResNet" else ("skip_gain",)))
        if first:
            make.conv(f"{path}/~/conv_shortcut", 1, inputs, outputs)
        make.conv(f"{path}/~/conv0", 1, inputs, mid)
        make.conv(f"{path}/~/conv1", 3, mid, mid)
        make.conv(f"{path}/~/conv2", 1, mid, outputs)
        if se_ratio:
            make.squeeze_excite(path, outputs, se_ratio)
        inputs = outputs
    make.linear(f"{root}/~/linear", inputs, classes)
    return make.tree


def regnet_tree(widths: Sequence[int], depths: Sequence[int], width: float, classes: int) -> Tree:
    root, make = "NF_RegNet", RandomTree("NF_RegNet")
    inputs = int(widths[0] * width)
    make.conv(f"{root}/~/initial_conv", 3, 3, inputs)
    for index, (path, stage, first) in enumerate(block_paths(root, "nf_block", depths)):
        outputs = int(widths[stage] * width)
        groups = int(inputs * (2.25 if index else 1)) // 8
        make.scalars(path, "skip_gain")
        if first:
            make.conv(f"{path}/~/conv_shortcut", 1, inputs, outputs)
        make.conv(f"{path}/~/conv0", 1, inputs, 8 * groups)
        make.conv(f"{path}/~/conv1", 3, 8 * groups, 8 * groups, groups)
        make.squeeze_excite(path, 8 * groups, 0.5)
        make.conv(f"{path}/~/conv2", 1, 8 * groups, outputs)
        inputs = outputs
    make.conv(f"{root}/~/final_conv", 1, inputs, 1280 * inputs // 440)
    make.linear(f"{root}/~/linear", 1280 * inputs // 440, classes)
    return make.tree


def nfnet_tree(widths: Sequence[int], depths: Sequence[int], classes: int) -> Tree:
    root, make = "NFNet", RandomTree("NFNet")
    inputs = 3
    for index, outputs in enumerate((16, 32, 64, 128)):
        make.conv(f"{root}/~/stem_conv{index}", 3, inputs, outputs)
        inputs = outputs
    for path, stage, first in block_paths(root, "nf_block", depths):
        outputs = widths[stage]
        groups = outputs // 2 // 128
        mid = groups * 128 if groups else outputs // 2
        make.scalars(path, "skip_gain")
        if first:
            make.conv(f"{path}/~/conv_shortcut", 1, inputs, outputs)
        make.conv(f"{path}/~/conv0", 1, inputs, mid)
        make.conv(f"{path}/~/conv1", 3, mid, mid, max(groups, 1))
        make.conv(f"{path}/~/conv1b", 3, mid, mid, max(groups, 1))
        make.conv(f"{path}/~/conv2", 1, mid, outputs)
        make.squeeze_excite(path, outputs, 0.5)
        inputs = outputs
    make.conv(f"{root}/~/final_conv", 1, inputs, 2 * inputs)
    make.linear(f"{root}/~/linear", 2 * inputs, classes)
    return make.tree
