"""The endpoint by which schedules are compared: what is kept of knowledge that no loss sees, once the worst quarter is
forgotten. Pure functions of arrays; `T` snapshots, the first before training, `N` forget samples, `M` held-out ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .statistics import t_interval

LEVEL = 0.10  # of the worst quarter
KEPT = 0.90
ROUNDING = 1e-6  # closer than that to a threshold is on it, whatever the machine


def worst_quarter(left: np.ndarray) -> np.ndarray:
    """Mean of the highest quarter of each row, picked by the values themselves; `[...]` from `[..., N]`."""
    left = np.asarray(left, dtype=float)
    size = max(1, round(left.shape[-1] / 4))
    return np.sort(left, axis=-1)[..., -size:].mean(-1)


@dataclass(frozen=True)
class Endpoint:
    """H@0.1 of one run. A run that never gets there has none (`None`): that is neither 0 nor a run that was not made.

    Attributes:
        snapshot: number of the first one at which the worst quarter is at most the level; `None` if there is none.
        kept: share of held-out probability kept there, 1 = all; `None` likewise.
        left: mean forget probability there; `None` likewise.
        worst_at_kept: lowest worst quarter of the snapshots at which at least 90% of the held-out probability is kept.
        lowest: lowest worst quarter of all.
        left_at_kept: mean forget probability where `worst_at_kept` is.
        at_kept: number of that snapshot.
    """

    snapshot: int | None
    kept: float | None
    left: float | None
    worst_at_kept: float
    lowest: float
    left_at_kept: float | None = None
    at_kept: int | None = None


def forgotten_level(never_seen: np.ndarray | None) -> float:
    """The worst quarter at which a run counts as having forgotten: 0.10, or that of a model that never saw the samples
    (`[N]` answer probabilities, or `None`) where it is higher."""
    return LEVEL if never_seen is None else max(LEVEL, float(worst_quarter(never_seen)))


def endpoint(forget: np.ndarray, held_out: np.ndarray, never_seen: np.ndarray | None = None) -> Endpoint:
    """H@0.1 of one run.

    Args:
        forget: answer probability of each forget sample, `[T, N]` in [0, 1].
        held_out: answer probability of each held-out sample, `[T, M]` or its mean, `[T]`.
        never_seen: answer probability of the forget samples under a model that never saw them, `[N]`: where its worst
            quarter is above 0.10, that is the level.

    Raises:
        ValueError: when the two differ in the number of snapshots, or nothing was known of the held-out samples.
    """
    forget, held_out = np.asarray(forget, dtype=float), np.asarray(held_out, dtype=float)
    mean = held_out if held_out.ndim == 1 else held_out.mean(1)
    if len(forget) != len(mean):
        raise ValueError(f"forget has {len(forget)} snapshots, held_out {len(mean)}")
    if not mean[0] > 0:
        raise ValueError("nothing is known of the held-out samples before the run")
    level = forgotten_level(never_seen)
    kept, worst = mean / mean[0], worst_quarter(forget)
    reached = np.flatnonzero(worst <= level + ROUNDING)
    enough = np.flatnonzero(kept >= KEPT - ROUNDING)  # the first snapshot always is
    lowest = int(enough[np.argmin(worst[enough])])
    first = int(reached[0]) if reached.size else None
    return Endpoint(
        first,
        None if first is None else float(kept[first]),
        None if first is None else float(forget[first].mean()),
        float(worst[lowest]),
        float(worst.min()),
        float(forget[lowest].mean()),
        lowest,
    )


def best(found: dict[float, Endpoint]) -> float:
    """The setting whose run keeps most at the endpoint; where none reaches it, the one that comes nearest to it."""
    reached = {setting: e.kept for setting, e in found.items() if e.kept is not None}
    if reached:
        return max(reached, key=lambda setting: reached[setting])
    return min(found, key=lambda setting: found[setting].lowest)


@dataclass(frozen=True)
class Contrast:
    """One arm against another, paired by seed.

    Attributes:
        differences: of H, by seed.
        seeds: those in which both reached the endpoint.
        missing: the others.
        mean, low, high: of the log ratio of H with its 95% t interval over seeds; `None` with fewer than two seeds.
    """

    differences: list[float]
    seeds: list[int]
    missing: list[int]
    mean: float | None
    low: float | None
    high: float | None


def contrast(ours: dict[int, float | None], other: dict[int, float | None]) -> Contrast:
    """Compare two arms by seed; H of a run that never reached the endpoint is `None`."""
    shared = sorted(set(ours) & set(other))
    pairs = {seed: (ours[seed], other[seed]) for seed in shared}
    both = {seed: (a, b) for seed, (a, b) in pairs.items() if a is not None and b is not None}
    found = t_interval(np.array([np.log(max(a, 1e-6) / max(b, 1e-6)) for a, b in both.values()]))
    interval = (found.value, found.low, found.high) if len(both) > 1 else (None, None, None)
    return Contrast(
        [a - b for a, b in both.values()], list(both), [seed for seed in shared if seed not in both], *interval
    )
