"""normfree: build, diagnose and train deep networks that need no activation normalisation."""

from ._version import __version__
from .activation import activation_names
from .agc import AdaptiveGradientClipping, adaptive_gradient_clip_
from .cost import ModelCost, model_cost
from .gain import gain
from .layers import (
    EfficientChannelAttention,
    ScaledConv2d,
    SqueezeExcite,
    StochasticDepth,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
    WSLinear,
)
from .models import DataConfig, batchnorm_twin, create_model, data_config, list_models
from .recompute import recompute_standardization
from .sharing import SharedStandardization, shared_standardization
from .signal import (
    Diagnosis,
    Finding,
    PredictionError,
    SignalPoint,
    SignalPropagation,
    diagnose,
    plot_signals,
    predict_spp,
    register_rule,
    spp,
    without_weights,
)
from .standardize import standardize_weight
from .surgery import CalibrationReport, calibrate, calibrated, center, fold, without_norms
from .weights import (
    CheckpointError,
    from_pretrained,
    from_timm,
    load_haiku,
    load_timm,
    load_weights,
    push_to_hub,
    save_pretrained,
    save_weights,
)

__all__ = [
    "AdaptiveGradientClipping",
    "CalibrationReport",
    "CheckpointError",
    "DataConfig",
    "Diagnosis",
    "EfficientChannelAttention",
    "Finding",
    "ModelCost",
    "PredictionError",
    "ScaledConv2d",
    "SharedStandardization",
    "SignalPoint",
    "SignalPropagation",
    "SqueezeExcite",
    "StochasticDepth",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose1d",
    "WSConvTranspose2d",
    "WSConvTranspose3d",
    "WSLinear",
    "__version__",
    "activation_names",
    "adaptive_gradient_clip_",
    "batchnorm_twin",
    "calibrate",
    "calibrated",
    "center",
    "create_model",
    "data_config",
    "diagnose",
    "fold",
    "from_pretrained",
    "from_timm",
    "gain",
    "list_models",
    "load_haiku",
    "load_timm",
    "load_weights",
    "model_cost",
    "plot_signals",
    "predict_spp",
    "push_to_hub",
    "recompute_standardization",
    "register_rule",
    "save_pretrained",
    "save_weights",
    "shared_standardization",
    "spp",
    "standardize_weight",
    "without_norms",
    "without_weights",
]
