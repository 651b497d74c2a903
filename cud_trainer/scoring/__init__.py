"""Difficulty scores of a forget set, and the calibration run that shows which samples go first."""

from .calibration import Calibration, CalibrationSettings, adapter_identity, calibrate
from .score import check_metrics, score_difficulty

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "adapter_identity",
    "calibrate",
    "check_metrics",
    "score_difficulty",
]
