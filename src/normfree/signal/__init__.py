from .measure import spp
from .plot import plot_signals
from .propagation import SignalPoint, SignalPropagation

__all__ = ["SignalPoint", "SignalPropagation", "plot_signals", "spp"]
