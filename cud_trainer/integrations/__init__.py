"""Difficulty for trainers that people already have."""

from .trainers import with_difficulty

__all__ = ["with_difficulty"]
