"""Difficulty scores of a forget set, and the calibration run that shows which samples go first."""

from .calibration import Calibration, CalibrationSettings, calibrate
from .calibration import adapter_identity as adapter_identity
from .request import ScoringRequest as ScoringRequest
from .request import check_circuits as check_circuits
from .request import check_metrics as check_metrics
from .score import SCORED as SCORED
from .score import score_difficulty

__all__ = ["Calibration", "CalibrationSettings", "calibrate", "score_difficulty"]
