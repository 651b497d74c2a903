"""Difficulty for open-unlearning without a fork, see `trainers`."""
