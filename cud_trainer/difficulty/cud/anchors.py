"""Anchors: which samples are known to be easy and hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.ids import KEYED, given_key
from ...data.ranks import ends


def extremes(residual: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the lowest (easy) and the highest (hard) residual memorisation, `share` of the rows each.

    Equal ones are on the same side, so that a side can be larger (see `ends`).

    Raises:
        ValueError: with fewer than 2 rows or a constant residual, which tells nothing apart.
    """
    if len(residual) < 2:
        raise ValueError("anchors need at least 2 calibration samples")
    if np.ptp(residual) == 0:
        raise ValueError("calibration left every sample with the same residual memorisation: there are no anchors")
    count = min(max(1, round(share * len(residual))), len(residual) // 2)
    return ends(residual, count)


def agreement(residuals: Sequence[np.ndarray], share: float, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that `at_least` of several unlearning methods count among the easiest, or hardest, `share` (paper: 3 of 5).

    Raises:
        ValueError: when they agree on no easy or no hard sample.
    """
    counts = np.zeros((2, len(residuals[0])), dtype=int)
    for residual in residuals:
        for side, rows in zip(counts, extremes(residual, share), strict=True):
            side[rows] += 1
    easy, hard = (np.flatnonzero(side >= at_least) for side in counts)
    if not easy.size or not hard.size:
        raise ValueError(
            f"{at_least} of {len(residuals)} methods agree on {easy.size} easy and {hard.size} hard samples; anchors "
            "need both: lower agreement or raise anchor_share"
        )
    return easy, hard


def given_sides(anchors: dict[str, Any], ids: list[str]) -> np.ndarray:
    """-1 for easy, 1 for hard, 0 for other samples, from ids given by hand."""
    if set(anchors) != {"easy", "hard"}:
        raise ValueError(f"anchors must have exactly the keys 'easy' and 'hard', got {sorted(anchors)}")
    position = {sample_id: row for row, sample_id in enumerate(ids)}
    key = given_key()
    if key is not None:  # as they stand in files
        position |= {key.keyed(sample_id): row for row, sample_id in enumerate(ids)}
    rows = []
    for side in ("easy", "hard"):
        unknown = [str(sample_id) for sample_id in anchors[side] if str(sample_id) not in position]
        if unknown:
            hint = "; give the key of these ids as id_key" if KEYED.match(unknown[0]) and key is None else ""
            raise ValueError(f"{side} anchor {unknown[0]!r} is not a forget sample{hint}")
        rows.append(np.array([position[str(sample_id)] for sample_id in anchors[side]], dtype=int))
    if set(rows[0]) & set(rows[1]):
        both = ids[next(iter(set(rows[0]) & set(rows[1])))]
        raise ValueError(f"sample {both!r} is both an easy and a hard anchor")
    sides = np.zeros(len(ids), dtype=int)
    sides[rows[0]], sides[rows[1]] = -1, 1
    return sides
