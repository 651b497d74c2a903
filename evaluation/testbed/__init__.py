"""A small world for experiments: fictitious authors, a tokenizer, and a Llama that knows them by heart.

Unlearning needs a model that has memorised something. This package makes one in under a minute on two CPU cores, and
from nothing else: questions and answers about authors who do not exist (`fictitious_authors`), their split into forget,
retain and retain_eval (`build_testbed`), a byte-level tokenizer (`train_tokenizer`), a Llama with grouped-query
attention from scratch (`tiny_llama`), and training until every answer is known verbatim (`memorise`).

The text is a pure function of the seed on every machine and Python version.
"""

from __future__ import annotations

from .memorising import Memorised, memorise
from .model import EOS_TOKEN, PAD_TOKEN, tiny_llama, train_tokenizer
from .world import (
    FACTS_AVAILABLE,
    PHRASINGS_AVAILABLE,
    REPEATS,
    Testbed,
    build_testbed,
    fictitious_authors,
)

__all__ = [
    "EOS_TOKEN",
    "FACTS_AVAILABLE",
    "PAD_TOKEN",
    "PHRASINGS_AVAILABLE",
    "REPEATS",
    "Memorised",
    "Testbed",
    "build_testbed",
    "fictitious_authors",
    "memorise",
    "tiny_llama",
    "train_tokenizer",
]
