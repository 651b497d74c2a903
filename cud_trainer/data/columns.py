"""The columns of a prepared dataset, and the ids that name its samples."""

from __future__ import annotations

from collections.abc import Sequence

from .ids import KEYED, PLAIN, IdKey, as_written

IGNORE_INDEX = -100
PREPARED = ("sample_id", "input_ids", "labels")
# Columns of text, of any format and of what is evaluated beside it.
TEXTS = (
    "text",
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "perturbed_answer",
    "paraphrased_answer",
    "paraphrased_question",
    "secret",
)
# Beside `input_ids` token by token: the same sample with another answer, for counterfactual circuits.
COUNTERFACTUAL = "counterfactual_input_ids"
# Beside `labels`: -100 also for what a chat template adds around the answer. Figures are made of these tokens.
COUNTED = "counted"
# Of the answer, what must not be known: spans of its text in the data, beside `labels` the same with -100 elsewhere.
SECRET = "secret"
# A hash of the sample as it would be on no day in particular, where a chat template writes the date.
CONTENT = "content"
# The same sample with the answer that is to take its place, for preference objectives.
ALTERNATIVES = ("alternative_input_ids", "alternative_labels")


def id_column(columns: Sequence[str]) -> str | None:
    """The column that names samples, if there is one."""
    return next((name for name in ("sample_id", "id") if name in columns), None)


def check_unique(ids: Sequence[str], name: str) -> None:
    """Raise `ValueError` naming the first id that is there twice."""
    first: dict[str, int] = {}
    for index, sample_id in enumerate(ids):
        if sample_id in first:
            raise ValueError(
                f"{name} dataset has the id {sample_id!r} twice (rows {first[sample_id]} and {index}); "
                "remove the duplicate or give the rows distinct `sample_id`s"
            )
        first[sample_id] = index


def rows_by_id(
    have: Sequence[str],
    wanted: Sequence[str],
    what: str,
    whose: str = "samples",
    keys: Sequence[IdKey] = (),
) -> list[int]:
    """Where each of the ids `wanted` stands in `have`; `ValueError` naming one that is not there.

    Args:
        what: what is looked up, for the error.
        whose: for whom.
        keys: that ids in `have` may be made with.
    """
    wanted = as_written(have, wanted, keys)
    position = {sample_id: row for row, sample_id in enumerate(have)}
    missing = [sample_id for sample_id in wanted if sample_id not in position]
    if missing:
        if not keys and any(map(PLAIN.match, missing)) and any(map(KEYED.match, have)):
            raise ValueError(
                f"the key that the ids of the {what} were made with is missing: give its file as id_key, or put it "
                "beside them as ids.key"
            )
        raise ValueError(
            f"{what} lack {len(missing)} of {len(wanted)} {whose}, the first is {missing[0]!r}: "
            "they were made for another dataset" + (", or with another id_key" if any(map(KEYED.match, have)) else "")
        )
    return [position[sample_id] for sample_id in wanted]
