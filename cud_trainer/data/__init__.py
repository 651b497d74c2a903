"""Forget and retain samples: from files and the formats users have to token ids with an answer mask, and batches."""

from .batches import BATCH_BYTES, pad_batch, plan_batches
from .chunks import DOCUMENT, chunk_texts
from .columns import (
    ALTERNATIVES,
    COUNTED,
    COUNTERFACTUAL,
    IGNORE_INDEX,
    PREPARED,
    check_unique,
    content_id,
    id_column,
    rows_by_id,
)
from .formats import (
    ANSWERS,
    FORMATS,
    detect_format,
    question_and_answer,
    text_tokens,
    tokenise_answer,
)
from .pairs import PairedCollator
from .prepare import prepare_dataset, prepare_samples
from .samples import Samples, check_disjoint, dataset_fingerprint, evenly_spaced
from .sources import load_samples
from .template import TemplateContext
from .tokenizers import check_tokenizer, check_vocabulary, ready_tokenizer

__all__ = [
    "ALTERNATIVES",
    "ANSWERS",
    "BATCH_BYTES",
    "COUNTED",
    "COUNTERFACTUAL",
    "DOCUMENT",
    "FORMATS",
    "IGNORE_INDEX",
    "PREPARED",
    "PairedCollator",
    "Samples",
    "TemplateContext",
    "check_disjoint",
    "check_tokenizer",
    "check_unique",
    "check_vocabulary",
    "chunk_texts",
    "content_id",
    "dataset_fingerprint",
    "detect_format",
    "evenly_spaced",
    "id_column",
    "load_samples",
    "pad_batch",
    "plan_batches",
    "prepare_dataset",
    "prepare_samples",
    "question_and_answer",
    "ready_tokenizer",
    "rows_by_id",
    "text_tokens",
    "tokenise_answer",
]
