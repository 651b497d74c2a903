"""Forget and retain samples: from files and the formats users have to token ids with an answer mask, and batches."""

from .batches import (
    BATCH_BYTES as BATCH_BYTES,
)
from .batches import (
    pad_batch,
)
from .batches import (
    plan_batches as plan_batches,
)
from .chunks import (
    DOCUMENT as DOCUMENT,
)
from .chunks import (
    chunk_texts,
)
from .columns import (
    ALTERNATIVES as ALTERNATIVES,
)
from .columns import (
    COUNTED as COUNTED,
)
from .columns import (
    COUNTERFACTUAL as COUNTERFACTUAL,
)
from .columns import (
    IGNORE_INDEX as IGNORE_INDEX,
)
from .columns import (
    PREPARED as PREPARED,
)
from .columns import (
    check_unique as check_unique,
)
from .columns import (
    id_column as id_column,
)
from .columns import (
    rows_by_id as rows_by_id,
)
from .formats import (
    ANSWERS as ANSWERS,
)
from .formats import (
    FORMATS as FORMATS,
)
from .formats import (
    detect_format as detect_format,
)
from .formats import (
    first_at_fault as first_at_fault,
)
from .formats import (
    question_and_answer as question_and_answer,
)
from .formats import (
    standardised as standardised,
)
from .formats import (
    tokenise_answers as tokenise_answers,
)
from .ids import (
    content_id as content_id,
)
from .pairs import (
    PairedCollator,
)
from .prepare import (
    prepare_dataset,
    prepare_samples,
    sample_ids,
)
from .samples import (
    Samples,
    check_disjoint,
    dataset_fingerprint,
)
from .samples import (
    evenly_spaced as evenly_spaced,
)
from .sources import (
    load_samples,
)
from .template import TemplateContext
from .tokenizers import (
    check_tokenizer,
)
from .tokenizers import (
    check_vocabulary as check_vocabulary,
)
from .tokenizers import (
    ready_tokenizer as ready_tokenizer,
)
from .turns import (
    every_turn,
)

# The rest is for the package's own stages.
__all__ = [
    "PairedCollator",
    "Samples",
    "TemplateContext",
    "check_disjoint",
    "check_tokenizer",
    "chunk_texts",
    "dataset_fingerprint",
    "every_turn",
    "load_samples",
    "pad_batch",
    "prepare_dataset",
    "prepare_samples",
    "sample_ids",
]
