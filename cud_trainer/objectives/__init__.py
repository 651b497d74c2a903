"""Unlearning objectives: forget losses and retain losses as per-sample functions, and what a step computes."""

from .losses import OBJECTIVES, Objective, register_objective
from .retain import RETAIN_LOSSES
from .step import LossTerms, Reference, UnlearningLoss

__all__ = [
    "OBJECTIVES",
    "RETAIN_LOSSES",
    "LossTerms",
    "Objective",
    "Reference",
    "UnlearningLoss",
    "register_objective",
]
