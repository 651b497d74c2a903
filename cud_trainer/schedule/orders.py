"""Orders: which forget samples a pass serves, one after the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.ranks import bucket_numbers
from .registry import register_schedule, within


@dataclass(frozen=True)
class OnePass:
    """One pass of a run.

    Attributes:
        number: of the pass, from 0.
        passes: how many there are.
        size: forget samples, N.
        seed: of the run.
    """

    number: int
    passes: int
    size: int
    seed: int

    @cached_property
    def shuffled(self) -> np.ndarray:
        """All samples in random order, int `[N]`: the same for every schedule, so that ties are broken alike."""
        return np.random.default_rng([self.seed, 0, self.number]).permutation(self.size)

    def generator(self) -> np.random.Generator:
        """For further random draws of this pass."""
        return np.random.default_rng([self.seed, 3, self.number])

    def fill(self, rows: np.ndarray) -> np.ndarray:
        """`N` draws out of `rows`: all of them in random order, before any comes again."""
        generator = self.generator()
        rounds = [generator.permutation(rows) for _ in range(-(-self.size // len(rows)))]
        return np.concatenate(rounds)[: self.size]


def sorted_rows(difficulty: np.ndarray, turn: OnePass) -> np.ndarray:
    """Rows from the easiest to the hardest sample, ties in random order."""
    return turn.shuffled[np.argsort(difficulty[turn.shuffled], kind="stable")]


def bucket_rows(difficulty: np.ndarray, turn: OnePass, buckets: int) -> list[np.ndarray]:
    """Rows of each difficulty bucket, the easiest first; equal difficulties share one (see `bucket_numbers`)."""
    order, number = sorted_rows(difficulty, turn), bucket_numbers(difficulty, min(int(buckets), turn.size))
    return [order[number[order] == bucket] for bucket in range(number.max() + 1)]


def competence(progress: np.ndarray, start: float, until: float) -> np.ndarray:
    """Share of the samples that is in reach: `min(1, sqrt(t (1 - c0²) / T + c0²))` (Platanios et al. 2019, eq. 7)."""
    return np.minimum(1.0, np.sqrt(progress / until * (1 - start**2) + start**2))


@register_schedule("uniform", metric=None)
def uniform(difficulty: np.ndarray | None, turn: OnePass) -> np.ndarray:
    """Random order."""
    return turn.shuffled


@register_schedule("easy_to_hard")
def easy_to_hard(difficulty: np.ndarray, turn: OnePass) -> np.ndarray:
    """Every pass from the easiest to the hardest sample, ties in random order."""
    return sorted_rows(difficulty, turn)


@register_schedule("hard_to_easy")
def hard_to_easy(difficulty: np.ndarray, turn: OnePass) -> np.ndarray:
    """Every pass from the hardest to the easiest sample, ties in random order."""
    return sorted_rows(-difficulty, turn)


@register_schedule("interleaved", check=within(2, np.inf, "buckets"))
def interleaved(difficulty: np.ndarray, turn: OnePass, *, buckets: int = 4) -> np.ndarray:
    """One sample of every difficulty bucket in turn, in random order within a bucket: every batch holds all levels."""
    generator = turn.generator()
    parts = [generator.permutation(part) for part in bucket_rows(difficulty, turn, buckets)]
    return np.array([part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)])


@register_schedule("easy_first_sampling", check=within(0, np.inf, "strength"))
def easy_first_sampling(difficulty: np.ndarray, turn: OnePass, *, strength: float = 4.0) -> np.ndarray:
    """Drawn without replacement, easy samples with higher probability: `p ∝ exp(-strength * rank)`, rank in [0, 1].

    Weighted sampling by difficulty (MRD, arXiv 2504.06658, section 5), once each a pass. By the Gumbel trick
    (Yellott 1977) that is an order by perturbed ranks.
    """
    noise = turn.generator().gumbel(size=turn.size)
    return np.argsort(strength * rank(difficulty) - noise, kind="stable")


def _check_competence(owner: str, **options: Any) -> None:
    within(0, 1, "start", "until", open_low=True)(owner, **options)


@register_schedule("competence", check=_check_competence)
def competence_growth(difficulty: np.ndarray, turn: OnePass, *, start: float = 0.25, until: float = 0.5) -> np.ndarray:
    """Draws from the easiest samples only, a share of them that grows (Platanios et al. 2019, arXiv 1903.09848).

    `N` draws a pass, with replacement, each uniform over the share `min(1, sqrt(t (1 - c0²) / T + c0²))`.

    Args:
        start: c0, the share in reach at the beginning.
        until: T, the part of the run after which all samples are in reach.
    """
    order = sorted_rows(difficulty, turn)
    progress = (turn.number + np.arange(turn.size) / turn.size) / turn.passes
    reach = np.ceil(competence(progress, start, until) * turn.size).astype(int)
    return order[(turn.generator().random(turn.size) * reach).astype(int)]


@register_schedule("baby_steps", check=within(1, np.inf, "buckets"))
def baby_steps(difficulty: np.ndarray, turn: OnePass, *, buckets: int = 4) -> np.ndarray:
    """The easiest bucket first, then one more at every stage (Spitkovsky et al. 2010); `N` draws a pass.

    Stages are as long as each other; the last one has all samples.
    """
    parts = bucket_rows(difficulty, turn, buckets)
    stage = (
        turn.number * len(parts) // turn.passes if turn.passes >= len(parts) else turn.number + len(parts) - turn.passes
    )
    return turn.fill(np.concatenate(parts[: stage + 1]))


@register_schedule("two_stage", check=within(0, 1, "easy_share", "first", open_low=True))
def two_stage(difficulty: np.ndarray, turn: OnePass, *, easy_share: float = 0.5, first: float = 0.5) -> np.ndarray:
    """First the easier samples alone, then the harder ones alone; `N` draws a pass.

    Two stages by prior difficulty (Unlocking the Potential of Difficulty Prior, 2025).

    Args:
        easy_share: of the samples, in the first stage.
        first: of the passes, for it.
    """
    order = sorted_rows(difficulty, turn)
    cut = min(max(1, round(easy_share * turn.size)), max(1, turn.size - 1))
    changes = np.flatnonzero(np.diff(difficulty[order])) + 1  # equal difficulties are in the same stage
    cut = int(changes[np.argmin(np.abs(changes - cut))]) if len(changes) else cut
    early = turn.number < max(1, round(first * turn.passes)) or turn.size == 1
    return turn.fill(order[:cut] if early else order[cut:])


@register_schedule("budget", check=within(0, 1, "strength"))
def budget(difficulty: np.ndarray, turn: OnePass, *, strength: float = 0.75) -> np.ndarray:
    """More passes for hard samples: `(1 + strength (2 rank - 1)) * passes` each, rank in [0, 1]; random order.

    The whole run is as long as with any schedule; a single pass can be shorter or longer.
    """
    share = 1 + strength * (2 * rank(difficulty) - 1)
    # Fractions of a pass are paid out when they add up to one; where in the cycle a sample starts is random.
    phase = np.random.default_rng([turn.seed, 4]).random(turn.size)
    times = np.floor((turn.number + 1) * share + phase) - np.floor(turn.number * share + phase)
    rows = np.repeat(np.arange(turn.size), times.astype(int))
    if not len(rows):
        rows = np.array([int(np.argmax(share))])  # a pass of nothing is no pass
    return turn.generator().permutation(rows)


@register_schedule("random_share", metric=None, check=within(0, 1, "share", open_low=True))
def random_share(difficulty: np.ndarray | None, turn: OnePass, *, share: float = 0.05) -> np.ndarray:
    """A random share of the forget set and nothing else, the same in every pass; `N` draws a pass, in random order.

    The baseline that any choice of samples has to beat: on MUSE and WMDP a random 5% did as well as all (Pal et al.
    2025, arXiv 2504.10185).
    """
    chosen = np.random.default_rng([turn.seed, 6]).permutation(turn.size)
    return turn.fill(chosen[: max(1, round(share * turn.size))])


def rank(difficulty: np.ndarray) -> np.ndarray:
    """Rank in [0, 1], mean 0.5; ties share their mean rank."""
    from scipy.stats import rankdata

    if len(difficulty) == 1:
        return np.array([0.5])
    return (rankdata(difficulty) - 1) / (len(difficulty) - 1)
