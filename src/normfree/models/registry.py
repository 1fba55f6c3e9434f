"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .data import DataConfig

if TYPE_CHECKING:
    from .network import ResidualNetwork

_FAMILIES = ("nf_resnet", "nf_regnet", "nfnet", "resnetv2", "resnetv1", "bn_regnet", "skipinit_resnet", "fixup_resnet")


@dataclass(frozen=True)
class ModelEntry:
    """One name of the registry: how to build it, what it is, its BatchNorm counterpart, and its images."""

    build: Callable[..., ResidualNetwork]
    description: str
    batchnorm_twin: str | None = None
    data: DataConfig = field(default_factory=DataConfig)

    def defaults(self) -> dict[str, Any]:
        """Every option with its default."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class _Range:
    """What a numeric option takes."""

    accepts: Callable[[Any], bool]
    description: str
    whole: bool = False


_PROBABILITY = _Range(lambda value: 0.0 <= value < 1.0, "a probability in [0, 1)")
_NOT_NEGATIVE = _Range(lambda value: 0.0 <= value < math.inf, "a number of 0 or more")
_RANGES = {
    "num_classes": _Range(lambda value: value >= 0, "a whole number of 0 or more", whole=True),
    "in_channels": _Range(lambda value: value >= 1, "a whole number of 1 or more", whole=True),
    "width": _Range(lambda value: 0.0 < value < math.inf, "a positive number"),
    "stem_width": _Range(lambda value: value >= 8, "a whole number of 8 or more", whole=True),
    "alpha": _NOT_NEGATIVE,
    "se_ratio": _NOT_NEGATIVE,
    "skip_gain": _Range(math.isfinite, "a finite number"),
    "drop_rate": _PROBABILITY,
    "stochastic_depth_rate": _PROBABILITY,
}


@lru_cache(maxsize=1)
def _entries() -> dict[str, ModelEntry]:
    entries: dict[str, ModelEntry] = {}
    for family in _FAMILIES:
        entries.update(importlib.import_module(f"{__package__}.{family}").MODELS)
    return entries


def model_entry(name: str) -> ModelEntry:
    """The registry's entry for a name.

    Raises:
        ValueError: no model has this name; the message lists near ones.
    """
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(str(name).lower(), entries, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list_models() lists what there is."
        raise ValueError(f"name: there is no model {name!r}; {hint}")
    return entries[name]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as ``"nf_*"``, by family and depth."""
    return [name for name in _entries() if fnmatch.fnmatchcase(name, pattern)]


def batchnorm_twin(name: str) -> str | None:
    """The name of the BatchNorm network with the same topology as a normaliser-free one; None for BatchNorm ones."""
    return model_entry(name).batchnorm_twin


def data_config(name: str) -> DataConfig:
    """How the images of a model are prepared, without building the model; ``model.info.data`` of one that is built."""
    return model_entry(name).data


def create_model(
    name: str, num_classes: int = 1000, *, calibrated_for: tuple[int, int] | None = None, **options: Any
) -> ResidualNetwork:
    """A new model, initialised as published.

    Args:
        name: one of :func:`list_models`.
        num_classes: outputs of the classifier; 0 leaves the pooled features as the output.
        calibrated_for: (height, width) of the images that the network is for: gains then make up for what zero padding
            and pooling take from the signal at that size, by theory (:func:`normfree.calibrate`). Not for networks
            with BatchNorm, which divides gains out.
        options: what the family takes, of

            * ``in_channels`` (3), ``width`` (1.0: multiplies every channel count of the table),
            * ``activation`` (name, module or callable), ``drop_rate`` (dropout on the pooled features),
              ``stochastic_depth_rate`` (0.0: of the last block; growing linearly from 0 at the first),
            * ``padding`` (``"symmetric"``, or ``"same"`` as TensorFlow pads), ``shortcut`` (``"strided"`` 1×1, or
              ``"avgpool"`` before a 1×1), ``stem`` (``"imagenet"``, or ``"small"``: 3×3 without stride or pooling),
            * normaliser-free: ``alpha`` (0.2), ``skip_gain`` (start value), ``gain_source`` (``"exact"``, or
              ``"published"`` for checkpoints trained elsewhere), ``weights`` (``"standardized"`` or ``"he"``),
              ``gamma_placement`` (``"activation"``: γ behind every activation, or ``"weight"``: in every convolution)
              and ``eps_mode`` (``"floor"`` or ``"added"``), both of which imported checkpoints set,
            * ``se_ratio`` (0: no squeeze-and-excitation), ``eca`` (False: efficient channel attention instead),
              ``order`` of ResNetV2 (``"bn_relu"`` or ``"relu_bn"``),
            * RegNets: ``channel_multiple`` (1: exact widths, or 8: rounded as timm's); NFNets: ``stem_width`` (128).

    Returns:
        The model, in training mode; ``model.info`` says how to make it again.

    Raises:
        ValueError: unknown name or option, or a value that an option does not take.
    """
    entry = model_entry(name)
    defaults = entry.defaults()
    for option in options:
        if option not in defaults:
            near = difflib.get_close_matches(option, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(defaults))}."
            raise ValueError(f"{option}: {name} has no such option; {hint}")
    for option, value in {"num_classes": num_classes, **options}.items():
        _check_range(option, value)
        _check_choice(entry.build, option, value)
    model = entry.build(num_classes=num_classes, **options)
    model.info.name = name
    model.info.options = {**defaults, "num_classes": num_classes, **options}
    model.info.batchnorm_twin = entry.batchnorm_twin
    model.info.data = entry.data
    return model if calibrated_for is None else _calibrated(model, calibrated_for)


def _calibrated(model: ResidualNetwork, size: tuple[int, int]) -> ResidualNetwork:
    # the one call upwards: surgery stands on models, and a model made to measure is still made here
    from ..surgery.calibrate import calibrate

    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"calibrated_for: expected (height, width) of positive whole numbers, got {size!r}")
    from torch.nn.modules.batchnorm import _BatchNorm

    norm = next((path for path, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if norm is not None:
        raise ValueError(
            f"calibrated_for: {model.info.name} has BatchNorm ({norm}), which divides out any gain in front of it; "
            "leave it out, or take a normaliser-free network"
        )
    channels = int(model.info.options.get("in_channels", 3))
    try:
        calibrated = calibrate(model, input_shape=(channels, *size), method="theory")
    except ValueError as error:
        raise ValueError(f"calibrated_for: {error}") from error
    calibrated.info.options["calibrated_for"] = tuple(size)
    return calibrated


def _check_range(option: str, value: Any) -> None:
    accepted = _RANGES.get(option)
    if accepted is None:
        return
    kinds = (int,) if accepted.whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not accepted.accepts(value):
        raise ValueError(f"{option}: expected {accepted.description}, got {value!r}")


def _check_choice(build: Callable[..., Any], option: str, value: Any) -> None:
    function = build.func if isinstance(build, partial) else build
    hint = get_type_hints(function)[option]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"{option}: expected one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{option}: expected True or False, got {value!r}")
    if hint in (int, float) and not is_number:
        raise ValueError(f"{option}: expected a number, got {value!r}")
