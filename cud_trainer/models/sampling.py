"""Tokens that are drawn: each by its own seed, whatever else is drawn beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How to draw instead of taking the most probable token.

    Attributes:
        temperature: of the distribution; positive.
        top_p: smallest share of the probability mass that is drawn from, in (0, 1].
        seed: whatever tells one series of draws from another. A draw depends on it, on its own number and on the
            prompt: not on the device, nor on how many are drawn, nor, but for rounding, on what shares its batch.
        draws: of each prompt, which is encoded once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: Any = 0
    draws: int = 1


def drawing(
    prompts: Sequence[Sequence[int]], sampling: Sampling | None, numbers: range, length: int
) -> LogitsProcessorList:
    """What makes `generate` draw, of each prompt the draws with these numbers, so many tokens at most."""
    if sampling is None:
        return LogitsProcessorList()
    cut = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    levels = np.concatenate([_levels(prompt, sampling.seed, numbers, length) for prompt in prompts])
    return LogitsProcessorList([_Temperature(sampling.temperature), *cut, _Draw(torch.from_numpy(levels))])


def seed_of(prompt: Sequence[int], seed: Any, number: int) -> int:
    """Of one draw, from 0 to 2**128 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{number}|{list(prompt)}".encode()).digest()[:16], "big")


def _levels(prompt: Sequence[int], seed: Any, numbers: range, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that decide on the tokens of these draws, float32 `[len(numbers), length]`."""
    made = []
    for number in numbers:
        made.append(np.random.default_rng(seed_of(prompt, seed, number)).random(length, dtype=np.float32))
    return np.stack(made)


class _Temperature(LogitsProcessor):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperature


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from its distribution: the first at which the sum of the probabilities so far
    exceeds a uniform number (inverse transform sampling).

    Args:
        levels: the uniform numbers, `[rows, steps]`; each step takes one, so that a row depends on no other.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.step = levels, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.levels = self.levels.to(scores.device, scores.dtype)  # once
        level = self.levels[:, self.step, None]
        self.step += 1
        sums = scores.softmax(-1).cumsum(-1)
        total = sums[:, -1:]
        below = torch.minimum(level * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(sums, below, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
