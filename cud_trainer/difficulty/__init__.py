"""How hard each forget sample will be to unlearn, before unlearning. Every metric: higher = harder."""

from . import circuit_metrics, metrics  # noqa: F401  (they register themselves)
from .buckets import Buckets
from .context import DifficultyContext
from .cud import AnchorBank, CUDSettings, cud_scores
from .folds import make_folds
from .registry import METRICS, Metric, register_metric
from .scores import DifficultyScores

__all__ = [
    "METRICS",
    "AnchorBank",
    "Buckets",
    "CUDSettings",
    "DifficultyContext",
    "DifficultyScores",
    "Metric",
    "cud_scores",
    "make_folds",
    "register_metric",
]
