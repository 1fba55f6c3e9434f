from collections.abc import Callable

from .first_figures import figure1, figure2
from .report import Claim, Report

EXPERIMENTS: dict[str, Callable[[bool, int, Callable[[str], None]], Report]] = {"figure1": figure1, "figure2": figure2}
"""By name; each takes whether to be quick, a seed, and where to say what it is doing."""

__all__ = ["EXPERIMENTS", "Claim", "Report"]
