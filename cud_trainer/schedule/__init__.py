"""From difficulty to what is trained when, and how strongly: a `Schedule` is data made by pure functions."""

from . import dynamic, orders, weights  # noqa: F401  (they register themselves)
from .dynamic import DynamicWeights, RunState
from .orders import OnePass
from .plan import Schedule, make_schedule
from .registry import SCHEDULES, ScheduleRule, parse, register_schedule
from .weights import scaled_to_mean_one

__all__ = [
    "SCHEDULES",
    "DynamicWeights",
    "ScheduleRule",
    "RunState",
    "Schedule",
    "OnePass",
    "make_schedule",
    "parse",
    "register_schedule",
    "scaled_to_mean_one",
]
