from .calibrate import CalibrationReport, calibrate, calibrated
from .norms import without_norms

__all__ = ["CalibrationReport", "calibrate", "calibrated", "without_norms"]
