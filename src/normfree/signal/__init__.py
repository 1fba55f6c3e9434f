from .diagnose import diagnose
from .findings import Diagnosis, Finding
from .measure import spp
from .plot import plot_signals
from .predict import PredictionError, predict_spp
from .propagation import SignalPoint, SignalPropagation
from .theory import register_rule
from .theory.declared import without_weights

__all__ = [
    "Diagnosis",
    "Finding",
    "PredictionError",
    "SignalPoint",
    "SignalPropagation",
    "diagnose",
    "plot_signals",
    "predict_spp",
    "register_rule",
    "spp",
    "without_weights",
]
