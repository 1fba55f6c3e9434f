"""The networks that are compared: ours, the conv-only twin, the BatchNorm twin, and timm's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normfree as nf
from normfree._torchvision import import_timm

MODELS = ("nf_resnet50", "nf_regnet_b1", "nf_seresnet50")
_TIMMS = {"nf_resnet50": "nf_resnet50", "nf_regnet_b1": "nf_regnet_b1", "nf_seresnet50": "nf_seresnet50"}


@dataclass(frozen=True)
class Setting:
    """How the contenders run."""

    batch: int = 16
    size: int = 224
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    width: float = 1.0

    def images(self, batch: int | None = None) -> Tensor:
        images = torch.randn(self.batch if batch is None else batch, 3, self.size, self.size, device=self.device)
        return images.to(memory_format=torch.channels_last) if self.channels_last else images

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def compiled(self, model: nn.Module) -> nn.Module:
        if not self.compile:
            return model
        mode = "reduce-overhead" if self.device == "cuda" else None
        return torch.compile(model, mode=mode)  # type: ignore[return-value]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


def conv_only_twin(model: nn.Module) -> nn.Module:
    """The same topology with plain convolutions holding the final weights, and no scalar anywhere."""
    twin = nf.fold(model)
    head = getattr(twin, "head", None)
    if head is not None and isinstance(head.classifier, nn.Linear):
        with torch.no_grad():
            head.classifier.weight.mul_(head.pooled_scale)
        head.pooled_scale = 1.0
    return twin


def contenders(name: str, setting: Setting, timm: bool = True) -> dict[str, nn.Module]:
    """Every contender for one of our models, on its device. timm's widths of RegNets differ by up to 7 pixels."""
    torch.manual_seed(0)
    ours = nf.create_model(name, width=setting.width)
    found = {"ours": ours, "conv-only": conv_only_twin(ours)}
    twin = nf.batchnorm_twin(name)
    if twin is not None:
        found["batchnorm"] = nf.create_model(twin, width=setting.width)
    if timm and name in _TIMMS and setting.width == 1.0:
        found["timm"] = import_timm().create_model(_TIMMS[name])
    return {key: setting.place(model) for key, model in found.items()}


def kept_and_recomputed(ours: nn.Module) -> dict[str, nn.Module]:
    """Our network keeping every standardized weight for the backward pass, and standardizing every one again there."""
    found = {}
    for name, enable in (("kept", False), ("recomputed", True)):
        found[name] = copy.deepcopy(ours)
        nf.recompute_standardization(found[name], enable)
    return found
