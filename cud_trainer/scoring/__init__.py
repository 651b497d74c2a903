"""Difficulty scores of a forget set, and the calibration run that shows which samples go first."""

from .calibration import Calibration, CalibrationSettings, adapter_identity, calibrate
from .request import ScoringRequest, check_metrics
from .score import score_difficulty

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "ScoringRequest",
    "adapter_identity",
    "calibrate",
    "check_metrics",
    "score_difficulty",
]
