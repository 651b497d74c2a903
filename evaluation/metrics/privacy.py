"""Membership inference: can the forget set still be told from text that the model never saw?

Scores are as in open-unlearning: lower = more like a member. Only the statistics of one teacher-forced pass are needed,
but for the gradient norm, which is measured apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from .. import statistics as stats

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradient_norm")
# What an attack needs that is not always there.
NEEDS = {"reference": "reference_model", "gradient_norm": "gradient_norm"}
EPSILON = 1e-10


def attack_scores(
    values: Mapping[str, np.ndarray], texts: Sequence[str], reference: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Score of every attack, `[N]` each; lower = taken for a member of the training data.

    - `loss`: mean negative log-likelihood of the answer (Yeom et al. 2018);
    - `zlib`: the same over the answer's compressed size in bytes (Carlini et al. 2021);
    - `min_k`, `min_k_plus_plus`: minus the statistics of `evaluation.metrics.memorization.teacher_forced`;
    - `reference`: loss less that under a model that never saw the samples, if there is one;
    - `gradient_norm`: see `evaluation.metrics.gradients.gradient_norms`, if it was measured.

    Args:
        values: of `teacher_forced`, and `gradient_norm`.
        texts: true answers.
        reference: the same as `values`, of the reference model.
    """
    loss = -values["mean_logps"]
    scores = {
        "loss": loss,
        "zlib": loss / np.array([len(zlib.compress(text.encode())) for text in texts]),
        "min_k": -values["min_k"],
        "min_k_plus_plus": -values["min_k_plus_plus"],
    }
    if reference is not None:
        scores["reference"] = loss + reference["mean_logps"]
    if "gradient_norm" in values:
        scores["gradient_norm"] = values["gradient_norm"]
    return scores


def attack_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a forget sample scores lower than a holdout sample, in [0, 1]; 0.5 = not to be told apart."""
    ordered = np.sort(others)
    below, upto = (np.searchsorted(ordered, members, side) for side in ("left", "right"))  # a tie counts half
    return float(1 - (below + upto).sum() / (2 * len(members) * len(others)))


def attack_interval(members: np.ndarray, others: np.ndarray, *, seed: int = 0, n_boot: int = 1000) -> stats.Interval:
    """`attack_auc` with its 95% bootstrap interval, members and others drawn apart; NaN where a score is not finite."""
    members, others = np.sort(members), np.sort(others)
    if reason := stats.why_undefined(members) or stats.why_undefined(others):
        return stats.undefined(reason)
    generator = np.random.default_rng(seed)
    draws = [
        attack_auc(generator.choice(members, len(members)), generator.choice(others, len(others)))
        for _ in range(n_boot)
    ]
    low, high = np.percentile(draws, stats.LEVELS)
    return stats.Interval(attack_auc(members, others), float(low), float(high))


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """`100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref)` (Shi et al. 2024, MUSE, arXiv 2407.06460).

    0: as if never trained on. Negative: still told as a member (under-unlearned); positive: suspiciously unlike one
    (over-unlearned).

    Args:
        reference_auc: of a model that never saw the forget set; 0.5 where there is none, as in open-unlearning.
    """
    return 100 * ((1 - auc) - (1 - reference_auc)) / ((1 - reference_auc) + EPSILON)
