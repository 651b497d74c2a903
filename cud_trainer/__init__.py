"""Difficulty-aware LLM unlearning for the Hugging Face stack."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import CUDConfig as CUDConfig
    from .data import sample_ids as sample_ids
    from .difficulty import DifficultyScores as DifficultyScores
    from .integrations import with_difficulty as with_difficulty
    from .schedule import Schedule as Schedule
    from .scoring import score_difficulty as score_difficulty
    from .trainer import CUDTrainer as CUDTrainer

# Loaded on first use: `cud --help` should not wait for torch.
_EXPORTS = {
    "CUDConfig": ".config",
    "CUDTrainer": ".trainer",
    "DifficultyScores": ".difficulty",
    "Schedule": ".schedule",
    "sample_ids": ".data",
    "score_difficulty": ".scoring",
    "with_difficulty": ".integrations",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
