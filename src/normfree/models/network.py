"""What every residual family shares: the stem, the order of its parts, the head, and the plan of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..padding import MaxPool2dSame
from .data import DataConfig

Padding = Literal["symmetric", "same"]
Shortcut = Literal["strided", "avgpool"]
Stem = Literal["imagenet", "small"]
AttentionPosition = Literal["end", "middle"]
Convolution = Callable[..., nn.Module]


@dataclass(frozen=True)
class BlockPlan:
    """One block's place in the network: what a family needs to know to build it."""

    index: int
    total: int
    in_channels: int
    out_channels: int
    stride: int
    first_in_stage: bool

    @property
    def is_transition(self) -> bool:
        """Whether the shape changes, so that the shortcut needs a projection."""
        return self.stride > 1 or self.in_channels != self.out_channels

    def stochastic_depth_rate(self, rate: float) -> float:
        """The rate of this block: growing linearly with its index (Brock et al. 2021, appendix)."""
        return rate * self.index / self.total


def plan_stages(
    in_channels: int, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int]
) -> list[list[BlockPlan]]:
    """The blocks of every stage, in order."""
    stages: list[list[BlockPlan]] = []
    total, index = sum(depths), 0
    for width, depth, stride in zip(widths, depths, strides, strict=True):
        stage = []
        for position in range(depth):
            stage.append(BlockPlan(index, total, in_channels, width, stride if position == 0 else 1, position == 0))
            in_channels, index = width, index + 1
        stages.append(stage)
    return stages


def expected_stds(plans: Sequence[BlockPlan], alpha: float) -> Iterator[float]:
    """β of every block: the standard deviation that its input has by design.

    The variance is 1 at the first block, grows by α² with every block, and is 1 + α² after a stage's first block,
    whose shortcut reads the normalised signal (Brock et al. 2021, section 3).
    """
    variance = 1.0
    for plan in plans:
        yield variance**0.5
        variance = (1.0 if plan.first_in_stage else variance) + alpha**2


def scaled_channels(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded down, at least 1.

    Raises:
        ValueError: ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width: expected a positive multiplier, got {width}")
    return max(1, int(channels * width + 1e-6))  # 48 · (0.5 / 0.75) · 0.75 is 24, not 23.999…


def conv_padding(kernel_size: int, padding: Padding) -> int | str:
    """The ``padding`` argument of a convolution that keeps the size at stride 1."""
    return "same" if padding == "same" else (kernel_size - 1) // 2


def avg_pool_before(conv: nn.Module, stride: int) -> nn.Module:
    """A shortcut that averages over stride × stride windows before it projects, counting real pixels only."""
    if stride == 1:
        return conv
    return nn.Sequential(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False), conv)


def shortcut_projection(conv: Convolution, plan: BlockPlan, style: Shortcut, **options: Any) -> nn.Module | None:
    """The 1×1 convolution on the skip path of a transition block; None for any other block."""
    if not plan.is_transition:
        return None
    if style == "avgpool":
        return avg_pool_before(conv(plan.in_channels, plan.out_channels, 1, **options), plan.stride)
    return conv(plan.in_channels, plan.out_channels, 1, stride=plan.stride, **options)


def build_stem(
    conv: Convolution,
    in_channels: int,
    width: int,
    stem: Stem,
    padding: Padding,
    after_conv: Sequence[tuple[str, nn.Module]] = (),
) -> nn.Sequential:
    """``imagenet``: 7×7/2 convolution and 3×3/2 max-pool; ``small``: 3×3/1 convolution, for small images.

    ``after_conv`` are named layers between the convolution and the pool.
    """
    kernel_size, stride = (3, 1) if stem == "small" else (7, 2)
    layers = nn.Sequential()
    layers.add_module(
        "conv", conv(in_channels, width, kernel_size, stride=stride, padding=conv_padding(kernel_size, padding))
    )
    for name, layer in after_conv:
        layers.add_module(name, layer)
    if stem == "imagenet":
        layers.add_module("pool", MaxPool2dSame(3, 2) if padding == "same" else nn.MaxPool2d(3, 2, padding=1))
    return layers


class Head(nn.Module):
    """Pooled classifier: (N, C, H, W) to (N, num_classes), or to the features (N, C) if ``num_classes`` is 0.

    Args:
        before_pool: what the last activation map goes through: activation, normalisation or both. It must not
            overwrite its input, which may be the caller's.
        pooled_scale: factor on the pooled features: γ of the activation in a normaliser-free network.
        drop_rate: dropout on the pooled features.
        weight_std: standard deviation of the classifier's initial weights.
        scalar_bias: a learnable scalar added to the pooled features (FixUp).
    """

    def __init__(
        self,
        before_pool: nn.Module,
        num_features: int,
        num_classes: int,
        drop_rate: float = 0.0,
        pooled_scale: float = 1.0,
        weight_std: float = 0.01,
        scalar_bias: nn.Module | None = None,
    ):
        super().__init__()
        self.before_pool = before_pool
        self.pooled_scale = pooled_scale
        self.dropout = nn.Dropout(drop_rate)
        self.scalar_bias = scalar_bias
        self.weight_std = weight_std
        self.classifier: nn.Module = self.new_classifier(num_features, num_classes)

    def new_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, got {num_classes}")
        if num_classes == 0:
            return nn.Identity()
        linear = nn.Linear(num_features, num_classes)
        nn.init.normal_(linear.weight, std=self.weight_std)
        nn.init.zeros_(linear.bias)
        return linear

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.before_pool(x).mean(dim=(2, 3))
        if self.pooled_scale != 1.0:
            features = features * self.pooled_scale
        features = self.dropout(features)
        if self.scalar_bias is not None:
            features = self.scalar_bias(features)
        return features if pre_logits else self.classifier(features)


@dataclass
class ModelInfo:
    """How a model was made: ``create_model(name, **options)`` makes it again."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    batchnorm_twin: str | None = None
    data: DataConfig = field(default_factory=DataConfig)


class ResidualNetwork(nn.Module):
    """Stem, stages of residual blocks, in some families a last 1×1 convolution, head.

    (N, in_channels, H, W) to (N, num_classes). ``stages[i][j]`` is block j of stage i. The methods are those that
    timm's models have.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[Sequence[nn.Module]],
        head: Head,
        num_features: int,
        final_conv: nn.Module | None = None,
    ):
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.final_conv = final_conv
        self.head = head
        self.num_features = num_features
        self.info = ModelInfo()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last activation map, (N, num_features, H', W')."""
        if x.ndim != 4:
            raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(x.shape)}")
        x = self.stages(self.stem(x))
        return x if self.final_conv is None else self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes), or pooled features (N, C) if ``pre_logits``."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @property
    def residual_blocks(self) -> list[Any]:
        """Every block, in order of execution."""
        return [block for stage in self.stages.children() for block in stage.children()]

    @property
    def num_classes(self) -> int:
        return getattr(self.head.classifier, "out_features", 0)

    def get_classifier(self) -> nn.Module:
        return self.head.classifier

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Where feature maps can be tapped, as timm describes it: channels, reduction of the size, module path."""
        reduction: int = 1
        taps: list[dict[str, Any]] = []
        for name, layer in self.stem.named_children():
            stride: Any = getattr(layer, "stride", 1)
            reduction *= stride if isinstance(stride, int) else stride[0]
            if isinstance(layer, nn.Conv2d) and reduction <= 2:  # the last one of these counts
                taps = [{"num_chs": layer.out_channels, "reduction": reduction, "module": f"stem.{name}"}]
        for name, stage in self.stages.named_children():
            reduction *= stage[0].conv1.stride[0]  # type: ignore[index, union-attr]
            channels = stage[-1].conv2.out_channels  # type: ignore[index, union-attr]
            taps.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{name}"})
        if self.final_conv is not None:
            taps[-1] = {"num_chs": self.num_features, "reduction": reduction, "module": "final_conv"}
        return taps

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for other classes; 0 leaves the pooled features as the output.

        Raises:
            ValueError: negative ``num_classes``, or a ``global_pool`` other than the average.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool: expected None or 'avg', got {global_pool!r}")
        reference = next(self.parameters())
        classifier = self.head.new_classifier(self.num_features, num_classes)
        self.head.classifier = classifier.to(reference.device, reference.dtype)
        if self.info.options:
            self.info.options["num_classes"] = num_classes
