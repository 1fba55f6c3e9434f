from .calibrate import CalibrationReport, calibrate, calibrated
from .center import center
from .fold import fold
from .norms import without_norms

__all__ = ["CalibrationReport", "calibrate", "calibrated", "center", "fold", "without_norms"]
