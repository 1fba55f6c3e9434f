from .calibrate import CalibrationReport, calibrate, calibrated
from .fold import fold
from .norms import without_norms

__all__ = ["CalibrationReport", "calibrate", "calibrated", "fold", "without_norms"]
