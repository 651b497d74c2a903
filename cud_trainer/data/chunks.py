"""Long plain texts as samples: every row of a `text` dataset is cut into chunks that keep its tokens."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from .columns import IGNORE_INDEX, check_unique, id_column
from .formats import detect_format, text_tokens
from .ids import content_id
from .mapping import in_batches
from .tokenizers import check_tokenizer

# Which row a chunk comes from: the group column of folds, so that no document helps to score itself.
DOCUMENT = "document"
SMALLEST = 8
# Documents, which may be long, that are Python's at a time.
DOCUMENTS = 100


def chunk_lengths(n: int, size: int) -> list[int]:
    """As few lengths of at most `size` as add up to `n`, equal to within 1, the longer ones first."""
    count = -(-n // size)
    return [n // count + (number < n % count) for number in range(count)]


def chunk_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, size: int, *, name: str = "forget") -> Dataset:
    """Cut every text into chunks of at most `size` tokens.

    A row's tokens are those that `prepare_dataset` gives it, eos at the end. Its chunks are as few as fit, equal in
    length to within one token: there are no short tails to merge or to drop. Where the tokenizer begins a text with a
    bos token, every chunk begins with one, which is one of the row's own tokens in the first chunk only. The labelled
    tokens (`labels != -100`) of a row's chunks, joined, are the row's tokens.

    Args:
        dataset: with a column `text`, one document a row.
        size: tokens of a chunk at most, the bos token counted; 8 at least.
        name: what to call the dataset in errors.

    Returns:
        Tokenised `Dataset` in the rows' order: `sample_id` (`ID#0`, `ID#1`, ... with the row's `sample_id` or `id`, or
        a hash of its content), `input_ids`, `labels`, `document` (the row's id), and the other columns of the rows.

    Raises:
        ValueError: for a size below 8, data that is not plain text, an empty text, a row without an id or with one that
            is there twice, or a column `document` that is there already.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST:
        raise ValueError(f"chunk_tokens must be an integer of at least {SMALLEST}, got {size!r}")
    check_tokenizer(tokenizer)
    kind = detect_format(dataset.column_names, name)
    if kind != "text":
        raise ValueError(f"chunk_tokens is for plain text (a column 'text'), but the {name} dataset is {kind}")
    if DOCUMENT in dataset.column_names:
        raise ValueError(f"{name} dataset: its column {DOCUMENT!r} is in the way of the chunks'; rename it")
    named_by = id_column(dataset.column_names)
    others = [
        column for column in dataset.column_names if column not in ("text", "sample_id", "id", "input_ids", "labels")
    ]
    features = {column: Value("string") for column in ("sample_id", DOCUMENT)}
    features |= {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    features |= {column: dataset.features[column] for column in others}
    documents: list[str] = []

    def chunks_of(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        made: dict[str, list] = {column: [] for column in features}
        own = batch[named_by] if named_by else [None] * len(indices)
        names = [
            f"{name} sample {index if named_by is None else repr(one)}" for index, one in zip(indices, own, strict=True)
        ]
        if named_by is not None and None in own:
            raise ValueError(f"{name} sample {indices[own.index(None)]} has no {named_by}")
        for row, tokens in enumerate(text_tokens(batch["text"], tokenizer, names)):
            document = content_id(tokens) if named_by is None else str(own[row])
            documents.append(document)
            start = tokens[:1] if tokens[0] == tokenizer.bos_token_id and len(tokens) > 1 else []
            begin = len(start)
            for number, length in enumerate(chunk_lengths(len(tokens) - len(start), size - len(start))):
                piece = tokens[begin : begin + length]
                begin += length
                made["sample_id"].append(f"{document}#{number}")
                made["input_ids"].append(start + piece)
                made["labels"].append((start if number == 0 else [IGNORE_INDEX] * len(start)) + piece)
                made[DOCUMENT].append(document)
                for column in others:
                    made[column].append(batch[column][row])
        return made

    read = dataset.select_columns([column for column in ("text", named_by, *others) if column])
    chunks = in_batches(
        read, chunks_of, remove=read.column_names, features=features, what=f"{name} documents", rows=DOCUMENTS
    )
    check_unique(documents, name)
    return chunks
