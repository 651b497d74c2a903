"""Weights: how strongly each forget sample counts, mean 1 over the forget set. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from .orders import rank
from .registry import register_schedule

FORMS = ("linear", "power", "softmax")


def scaled_to_mean_one(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`clip(c * values, low, high)` with the factor `c` for which the mean is 1.

    Args:
        values: positive, `[N]`.
        low: smallest weight, at most 1.
        high: largest weight, at least 1.
    """
    return from_logs(np.log(values), low, high)


def from_logs(log_values: np.ndarray, low: float, high: float, scale: np.ndarray | None = None) -> np.ndarray:
    """`scaled_to_mean_one` of values given by their logarithms, which may be of any size.

    Args:
        scale: positive, `[N]`: it is the mean weighted by these that is 1.
    """
    share = None if scale is None else scale / scale.sum()
    # No weight can be larger while the mean is 1; `high` may be infinite.
    high = min(high, len(log_values) if share is None else 1 / share.min())
    # The mean grows with c, from `low` where the largest value is cut to `high` where the smallest is.
    small = np.log(max(low, 1e-12)) - log_values.max()
    large = np.log(high) - log_values.min()
    for _ in range(200):
        middle = (small + large) / 2
        weights = np.exp(np.clip(log_values + middle, -700, 700)).clip(low, high)
        if (weights.mean() if share is None else weights @ share) < 1:
            small = middle
        else:
            large = middle
    return np.exp(np.clip(log_values + large, -700, 700)).clip(low, high)


def _check_form(owner: str, **options: Any) -> None:
    if options["form"] not in FORMS:
        raise ValueError(f"{owner} needs a form out of {list(FORMS)}, got {options['form']!r}")
    if options["form"] == "linear" and not 0 <= options["strength"] <= 1:
        raise ValueError(f"{owner} needs strength in [0, 1], got {options['strength']!r}")
    if not 0 <= options["strength"] < np.inf:
        raise ValueError(f"{owner} needs a finite strength of at least 0, got {options['strength']!r}")


def _by_rank(ranks: np.ndarray, form: str, strength: float, low: float, high: float) -> np.ndarray:
    if form == "linear":
        return 1 + strength * (2 * ranks - 1)
    if form == "softmax":
        return from_logs(strength * (2 * ranks - 1), low, high)
    inner = (ranks * (len(ranks) - 1) + 0.5) / len(ranks)  # never 0
    return from_logs(strength * np.log(inner), low, high)


@register_schedule("upweight_hard", "weights", check=_check_form)
def upweight_hard(
    difficulty: np.ndarray, *, form: str = "linear", strength: float = 0.75, low: float = 0.0, high: float = 10.0
) -> np.ndarray:
    """Weight that grows with the rank r of difficulty, in [0, 1].

    Args:
        form: `"linear"`: `1 + strength (2 r - 1)`; `"softmax"`: `∝ exp(strength (2 r - 1))`; `"power"`:
            `∝ r^strength`.
        low: smallest weight of the last two.
        high: largest weight of the last two.
    """
    return _by_rank(rank(difficulty), form, strength, low, high)


@register_schedule("upweight_easy", "weights", check=_check_form)
def upweight_easy(
    difficulty: np.ndarray, *, form: str = "linear", strength: float = 0.75, low: float = 0.0, high: float = 10.0
) -> np.ndarray:
    """Weight that falls with the rank of difficulty: `upweight_hard` of the negative."""
    return _by_rank(rank(-difficulty), form, strength, low, high)


@register_schedule("inverse_mass", "weights", metric="circuit_mass")
def inverse_mass(difficulty: np.ndarray, *, low: float = 0.25, high: float = 6.0) -> np.ndarray:
    """Weight proportional to 1 / circuit mass, clipped to [low, high].

    `difficulty` is `circuit_mass`, that is -log(mass): the weight is proportional to its exponential.
    """
    return from_logs(difficulty, low, high)


@register_schedule("inverse_gradient", "weights", metric="grad_norm")
def inverse_gradient(difficulty: np.ndarray, *, low: float = 0.25, high: float = 6.0) -> np.ndarray:
    """Weight proportional to 1 / gradient norm, clipped to [low, high] (`grad_norm` is -log of the norm)."""
    return from_logs(difficulty, low, high)


@register_schedule("inverse_loss", "weights", metric="loss")
def inverse_loss(difficulty: np.ndarray, *, low: float = 0.25, high: float = 6.0) -> np.ndarray:
    """Weight proportional to 1 / loss, clipped to [low, high] (the metric `loss` is minus the loss)."""
    return from_logs(-np.log(np.maximum(-difficulty, 1e-300)), low, high)


@register_schedule("inverse_error", "weights", metric="loss")
def inverse_error(difficulty: np.ndarray, *, low: float = 0.25, high: float = 6.0) -> np.ndarray:
    """Weight proportional to 1 / (1 - p), p the answer probability before unlearning, clipped to [low, high]."""
    return from_logs(-np.log(np.maximum(-np.expm1(np.minimum(difficulty, 0.0)), 1e-300)), low, high)


def _check_temperature(owner: str, **options: Any) -> None:
    if not options["temperature"] > 0:
        raise ValueError(f"{owner} needs a temperature above 0, got {options['temperature']!r}")


@register_schedule(
    "risk", "weights", metric=("difficulty", "grad_alignment"), weighs_retain=True, check=_check_temperature
)
def risk(difficulty: np.ndarray, alignment: np.ndarray, *, temperature: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Forget weight proportional to `d (1 - r)`, mean 1; weight of its retain partner `1 + r`, in [1, 2].

    d is difficulty and r the risk to the retain set, by the cosine of the sample's gradient with the mean retain
    gradient (`grad_alignment`), each scaled to [0, 1] and gated, `sigmoid((x - 0.5) / temperature)` (DualCF,
    arXiv 2608.14229). What is hard and apart is pushed; what pulls the retain set along is held back, and paid for.

    Args:
        temperature: of the gates: towards 0 all or nothing, towards infinity 1/2 for all.
    """
    d, r = (1 / (1 + np.exp(-(_scaled(values) - 0.5) / temperature)) for values in (difficulty, alignment))
    weight = d * (1 - r)
    return weight / weight.mean(), 1 + r


def _scaled(values: np.ndarray) -> np.ndarray:
    """From 0 for the lowest to 1 for the highest; 0.5 where all are equal."""
    width = np.ptp(values)
    return (values - values.min()) / width if width > 0 else np.full(len(values), 0.5)


def _check_power(owner: str, **options: Any) -> None:
    if not 0 <= options["power"] < np.inf:
        raise ValueError(f"{owner} needs a finite power of at least 0, got {options['power']!r}")


@register_schedule("focal", "weights", metric="loss", check=_check_power)
def focal(difficulty: np.ndarray, *, power: float = 2.0, low: float = 0.1, high: float = 10.0) -> np.ndarray:
    """Weight proportional to `p^power`, p the answer probability before unlearning, clipped to [low, high].

    The focal loss (Lin et al. 2017) turned round: what is far from forgotten counts more.
    """
    return from_logs(power * difficulty, low, high)
