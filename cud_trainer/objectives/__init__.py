"""Unlearning objectives: forget losses and retain losses as per-sample functions, and what a step computes."""

from . import distributions, losses, representations  # noqa: F401  (they register themselves)
from .gradients import STEPS, GradientStep, register_step
from .reference import Reference
from .registry import OBJECTIVES, QUANTITIES, Objective, register_objective
from .retain import RETAIN_LOSSES
from .step import LossTerms, UnlearningLoss

__all__ = [
    "OBJECTIVES",
    "STEPS",
    "GradientStep",
    "register_step",
    "QUANTITIES",
    "RETAIN_LOSSES",
    "LossTerms",
    "Objective",
    "Reference",
    "UnlearningLoss",
    "register_objective",
]
