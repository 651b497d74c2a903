"""Conversations of several turns as samples: a row for every answer of the assistant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Value

from .columns import id_column
from .formats import detect_format
from .mapping import in_batches, rows_of

# Which row of the data a sample comes from: the group column of folds, so that no conversation helps to score itself.
CONVERSATION = "conversation"
# Which answer of it the sample is, from 1.
TURN = "assistant_turn"


def holds_conversations(dataset: Dataset, name: str) -> bool:
    """Whether the rows are lists of messages."""
    kind = detect_format(dataset.column_names, name)
    first = dataset.with_format(None)[0].get("prompt") if len(dataset) else None
    return kind == "conversational" or (kind == "prompt-completion" and isinstance(first, list))


def every_turn(dataset: Dataset, *, name: str = "forget") -> Dataset:
    """A row for every answer of the assistant, with what was said before as its context.

    An answer without text (a mere call of a tool) is none. What stands behind the last answer is left out.

    Args:
        dataset: with `messages`, or with `prompt` and `completion` as lists of messages.
        name: what to call the dataset in errors.

    Returns:
        The rows in their order, each as often as it has answers, with the columns `conversation` (its `sample_id` or
        `id`, or its place), `assistant_turn` (from 1) and, where the rows have ids, `ID#1`, `ID#2`, ... for theirs.

    Raises:
        ValueError: for data that is no conversations, one without an answer, or a column that is there already.
    """
    kind = detect_format(dataset.column_names, name)
    if not holds_conversations(dataset, name):
        raise ValueError(f"turns 'all' is for conversations, but the {name} dataset is {kind}")
    for column in (CONVERSATION, TURN):
        if column in dataset.column_names:
            raise ValueError(f"{name} dataset: its column {column!r} is in the way of the turns'; rename it")
    named_by = id_column(dataset.column_names)
    features = {**dataset.features, CONVERSATION: Value("string"), TURN: Value("int64")}
    if named_by is not None:
        features[named_by] = Value("string")

    def answers_of(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        made: dict[str, list] = {column: [] for column in features}
        for index, row in zip(indices, rows_of(batch), strict=True):
            conversation = str(index if named_by is None else row[named_by])
            answers = list(_answers(row, kind))
            if not answers:
                where = f"{name} sample {index}" if named_by is None else f"{name} sample {conversation!r}"
                raise ValueError(f"{where}: there is no answer of the assistant in it")
            for turn, answer in enumerate(answers, start=1):
                named = {} if named_by is None else {named_by: f"{conversation}#{turn}"}
                sample = {**row, **answer, **named, CONVERSATION: conversation, TURN: turn}
                for column, value in sample.items():
                    made[column].append(value)
        return made

    return in_batches(dataset, answers_of, remove=dataset.column_names, features=features, what=f"{name} conversations")


def _answers(row: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """The columns of each answer of a conversation; malformed messages are left to whoever prepares the row."""
    if kind == "conversational":
        messages = row["messages"] or []
        yield from ({"messages": messages[: end + 1]} for end in _ends(messages))
        return
    prompt, completion = row["prompt"] or [], row["completion"]
    yield from ({"prompt": prompt[:end], "completion": [prompt[end]]} for end in _ends(prompt))
    if completion:
        yield {"completion": completion}


def _ends(messages: list[Any]) -> Iterator[int]:
    """Where answers stand."""
    for place, message in enumerate(messages):
        said = message.get("content") if isinstance(message, dict) and message.get("role") == "assistant" else None
        if isinstance(said, str) and said.strip():
            yield place
