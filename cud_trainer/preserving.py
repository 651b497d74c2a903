"""What keeps knowledge that neither set mentions: options that a run has where none are given."""

from __future__ import annotations

from typing import Any

from .objectives import OBJECTIVES
from .stack_options import sharded_by

DEFAULT_SCHEDULE = "odds+per_sample_stop"
# For a loss that is the mean log-probability: its gradient nearly vanishes where all is known, and a high retain weight
# held it there. NPO got further with the default one on TOFU.
UNLIKELIHOOD = "unlikelihood+per_sample_stop"
UNLIKELIHOOD_TARGET = 0.05  # its pull fades, so that what has left hovers higher
BY_UNLIKELIHOOD = ("graddiff",)
# Chosen on development models, confirmed on others (docs/results.md).
PRESERVING = {"retain_loss": "kl", "retain_weight": 256.0, "retain_weight_end": 8.0, "l2_sp": 0.03}
PLAIN = {"retain_loss": None, "retain_weight": 1.0, "retain_weight_end": None, "l2_sp": 0.0}
RETAIN_LOSSES = ("nll", "kl")
BY_DEFAULT = ("graddiff", "npo")  # objectives for which protocols committed before say so


def fill_preserving(config: Any) -> None:
    """Give `preserve`, what it stands for and `schedule` their values, in place: whatever was given stays.

    Args:
        config: a `CUDConfig`, of which `preserve`, `schedule` and the options in `PRESERVING` are `None` where they are
            not given.
            After that `preserve_filled` has the names of those that `preserve` has filled.

    Raises:
        ValueError: where `preserve` is asked for, and the objective has no retain loss of the right kind.
    """
    own = OBJECTIVES.find(config.objective).retain_loss if config.retain_loss is None else config.retain_loss
    if config.preserve and own not in RETAIN_LOSSES:
        raise ValueError(
            f"preserve goes with a retain loss 'nll' or 'kl', but that of objective {config.objective!r} is {own!r}"
        )
    if config.preserve is None:  # who names NLL has the published algorithm in mind
        can = own in RETAIN_LOSSES and config.retain_loss in (None, "kl") and sharded_by(config) is None
        config.preserve = can and config.objective in BY_DEFAULT
    values = dict(PRESERVING if config.preserve else PLAIN)
    if config.retain_weight is not None or config.retain_limit is not None:  # which says how the weight goes
        values["retain_weight"], values["retain_weight_end"] = PLAIN["retain_weight"], None
    config.preserve_filled = tuple(name for name in values if config.preserve and getattr(config, name) is None)
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.schedule is None:
        config.schedule = default_schedule(config.objective, preserve=config.preserve)
    if config.schedule == UNLIKELIHOOD:  # named or not
        given = config.schedule_args.get("per_sample_stop", {})
        config.schedule_args = {**config.schedule_args, "per_sample_stop": {"target": UNLIKELIHOOD_TARGET, **given}}


def default_schedule(objective: str, *, preserve: bool) -> str:
    """The schedule of a run that names none."""
    return UNLIKELIHOOD if preserve and objective in BY_UNLIKELIHOOD else DEFAULT_SCHEDULE
