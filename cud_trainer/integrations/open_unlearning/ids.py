"""Ids of open-unlearning's forget samples: from their data to the ids that difficulty scores are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data import detect_format, id_column, prepare_dataset
from ...data.ids import as_written
from ...data.sources import load_samples
from ...difficulty import DifficultyScores
from ..trainers import own_draws


def forget_ids(
    dataset: Any,
    scores: DifficultyScores | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ids_from: str | Sequence[str] | None = None,
) -> list[str]:
    """Ids of the forget samples, in their order; never by position alone.

    The first of these whose ids all have scores:

    1. the column `sample_id` or `id` of their data;
    2. the hash of each sample's tokens: scores of what `--export` wrote;
    3. the ids that `cud score` gives to the rows of their data with this tokenizer.

    Args:
        dataset: their `ForgetRetainDataset`.
        scores: `None`: any ids will do.
        ids_from: `[path, configuration, split]` (the last two may be missing) of the data that was scored, where it is
            another copy of the forget set: it must have the same texts, row by row.

    Raises:
        ValueError: saying what was tried, if the scores are of other samples.
    """
    if dataset is None or not hasattr(dataset, "forget") or dataset.forget is None:
        raise ValueError("open-unlearning's trainers need their ForgetRetainDataset with a forget set (mode: unlearn)")
    if getattr(dataset, "anchor", "forget") != "forget":
        raise ValueError(f"an order of forget samples needs data.anchor=forget, got {dataset.anchor!r}")
    forget = dataset.forget
    if scores is None:
        return [str(row) for row in range(len(forget))]
    if ids_from:
        return _ids_of_copy(forget, tokenizer, [ids_from] if isinstance(ids_from, str) else list(ids_from))
    scored, tried = set(scores.ids), []
    ways: dict[str, Callable[[], list[str]]] = {
        "their column of ids": lambda: _ids_of_column(forget),
        "their tokens": lambda: _ids_of_rows(tokens_of(forget), tokenizer),
        "their rows": lambda: _ids_of_rows(_rows(forget), tokenizer),
    }
    for way, make in ways.items():
        try:
            ids = make()
        except ValueError as error:
            tried.append(f"{way}: {error}")
            continue
        named = as_written(scored, ids, scores.keys)
        if len(ids) == len(forget) and scored.issuperset(named):
            return ids
        tried.append(f"{way}: {sum(name in scored for name in named)} of {len(forget)} have scores")
    raise ValueError(
        f"the difficulty scores ({len(scores)} samples) are not those of this forget set ({len(forget)} samples) by "
        f"{'; by '.join(tried)}. Score what --export writes, or name the data that was scored in ids_from"
    )


def tokens_of(dataset: Any) -> Dataset:
    """`input_ids` and `labels` of their samples, as they are trained on; of pairs of answers the original.

    Raises:
        ValueError: for samples with several answers.
    """
    rows = []
    for position in range(len(dataset)):
        with own_draws(0, position):  # random alternate answers
            item = dataset[position]
        item = item.get("original", item)
        if "input_ids" not in item:
            raise ValueError(f"sample {position} is not one sequence of tokens")
        rows.append({name: [int(token) for token in item[name]] for name in ("input_ids", "labels")})
    return Dataset.from_list(rows)


def _rows(forget: Any) -> Dataset:
    """The rows that they loaded, with their own names for question and answer."""
    data = getattr(forget, "data", None)
    if not isinstance(data, Dataset) or len(data) != len(forget):
        raise ValueError("no rows of text, one for each sample")
    keys = {getattr(forget, f"{name}_key", name): name for name in ("question", "answer")}
    if all(key in data.column_names for key in keys):
        return Dataset.from_dict({name: data[key] for key, name in keys.items()})
    return data


def _ids_of_column(forget: Any) -> list[str]:
    columns = getattr(getattr(forget, "data", None), "column_names", None) or []
    column = id_column(columns)
    if column is None:
        raise ValueError("none")
    return [str(name) for name in forget.data[column]]


def _ids_of_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        raise ValueError("no tokenizer to compute them with")
    return list(prepare_dataset(rows, tokenizer, max_length=None)["sample_id"])


def _ids_of_copy(forget: Any, tokenizer: PreTrainedTokenizerBase | None, source: list[Any]) -> list[str]:
    """The ids of another copy of the forget set, whose texts must be the same."""
    path, config, split = [*source, None, None][:3]
    copy = load_samples(path, config, split or "train", None, "ids_from")
    if len(copy) != len(forget):
        raise ValueError(f"ids_from has {len(copy)} samples, the forget set {len(forget)}")
    if detect_format(copy.column_names, "ids_from") == "tokenised":
        columns, theirs = ["input_ids", "labels"], tokens_of(forget)
    else:
        theirs = _rows(forget)
        columns = [name for name in ("question", "answer", "prompt", "completion", "text") if name in copy.column_names]
        columns = [name for name in columns if name in theirs.column_names]
        if not columns:
            raise ValueError("ids_from cannot be compared with the forget set: they have no text column in common")
    for row, (a, b) in enumerate(zip(copy.select_columns(columns), theirs.select_columns(columns), strict=True)):
        if a != b:
            raise ValueError(f"ids_from has another sample than the forget set in row {row}")
    column = id_column(copy.column_names)
    return [str(name) for name in copy[column]] if column else _ids_of_rows(copy, tokenizer)
