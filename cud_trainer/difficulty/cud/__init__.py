"""Circuit-guided Unlearning Difficulty: settings, formula, anchors, and the metric that puts them together."""

from .anchors import agreement, extremes
from .bank import AnchorBank
from .formula import PENALTIES, anchor_circuit, calibrated_scores, circuits_of, cud_scores, log_standardisation
from .metric import cud, cud_paper, cud_top_k
from .settings import ALL_FEATURES, FEATURES, VARIANTS, CUDSettings

__all__ = [
    "ALL_FEATURES",
    "FEATURES",
    "PENALTIES",
    "VARIANTS",
    "AnchorBank",
    "CUDSettings",
    "agreement",
    "anchor_circuit",
    "calibrated_scores",
    "circuits_of",
    "cud",
    "cud_paper",
    "cud_scores",
    "cud_top_k",
    "extremes",
    "log_standardisation",
]
