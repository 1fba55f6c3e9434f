from collections.abc import Callable

from .first_figures import figure1, figure2
from .report import Claim, Report
from .settings import Settings

FIGURES: dict[str, Callable[[Settings], Report]] = {"figure1": figure1, "figure2": figure2}
"""The paper's figures, by name: seconds to minutes, no data needed. Studies that train are in training_studies."""

__all__ = ["FIGURES", "Claim", "Report", "Settings"]
