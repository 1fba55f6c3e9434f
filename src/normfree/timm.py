"""Our models in timm's registry: ``import normfree.timm``, then ``timm.create_model("normfree_nf_resnet50")``.

Every name of :func:`normfree.list_models` is registered with ``normfree_`` in front of it. timm's own options are
understood (``in_chans``, ``drop_rate``, ``drop_path_rate``, ``features_only``, ``out_indices``, ``checkpoint_path``);
any other option goes to :func:`normfree.create_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ._torchvision import import_timm
from .models import create_model, list_models, model_entry
from .models.network import ResidualNetwork

import_timm()
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402

PREFIX = "normfree_"


def _build(
    name: str,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    global_pool: str = "avg",
    **options: Any,
) -> ResidualNetwork:
    if global_pool != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {global_pool!r}")
    return create_model(name, in_channels=in_chans, stochastic_depth_rate=drop_path_rate, **options)


def _entry_point(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **options: Any) -> Any:
        feature_options = {"flatten_sequential": True}
        return build_model_with_cfg(
            partial(_build, name), PREFIX + name, pretrained, feature_cfg=feature_options, **options
        )

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"{model_entry(name).description}."
    return create


def _configuration(name: str) -> dict[str, Any]:
    data = model_entry(name).data
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, data.train_size, data.train_size),
        "test_input_size": (3, data.test_size, data.test_size),
        "crop_pct": data.crop_fraction,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
        "first_conv": "stem.conv0" if "nfnet" in name else "stem.conv",
        "classifier": "head.classifier",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({PREFIX + name: _configuration(name) for name in list_models()})

for _name in list_models():
    register_model(_entry_point(_name))
