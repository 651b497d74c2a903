"""Forget and retain samples: from the formats users have to token ids with an answer mask.

Every later stage works on a *prepared* dataset: a `datasets.Dataset` with the columns `sample_id` (str), `input_ids`
and `labels` (-100 outside the answer), plus the user's group columns if any. Row `i` of a prepared dataset is row `i`
of the input: nothing is shuffled, truncated or dropped, a sample that cannot be used is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat import Tokens
from .columns import (
    ALTERNATIVES,
    CONTENT,
    COUNTED,
    COUNTERFACTUAL,
    IGNORE_INDEX,
    PREPARED,
    SECRET,
    check_unique,
    id_column,
)
from .encode import Span
from .formats import (
    FORMATS,
    TEMPLATE_COLUMNS,
    Row,
    check_one_document,
    check_tokens,
    counterfactuals,
    detect_format,
    each_tokenised,
    first_at_fault,
    standardised,
)
from .ids import content_id
from .mapping import in_batches, rows_of
from .samples import Samples
from .template import TemplateContext
from .tokenizers import check_tokenizer
from .turns import TURN

logger = logging.get_logger(__name__)

# Columns that some samples may have and others not, which is an error.
OPTIONAL = (COUNTERFACTUAL, *ALTERNATIVES, COUNTED, SECRET)
MADE = (*PREPARED, *OPTIONAL, CONTENT)


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    name: str = "forget",
    keep_columns: Sequence[str] = (),
    counterfactual_column: str | None = None,
    secret_column: str | None = None,
    template: TemplateContext | None = None,
) -> Dataset:
    """Tokenise `dataset` and mark the answer tokens.

    Formats (first match wins): `input_ids` + `labels`; `prompt` + `completion`, strings or lists of messages;
    `messages` (the last message, which must be the assistant's, is the answer, the ones before are its context);
    `question` + `answer` (TOFU; goes through the chat template when the tokenizer has one, else
    `"Question: ...\\nAnswer: ..."`); `text` (every token is answer). Strings get an eos token at the end, as in TRL.

    Everything is kept in memory: no text or token is left in a cache of `datasets`.

    Args:
        dataset: map-style dataset.
        tokenizer: with eos and pad tokens.
        max_length: the longest sequence in tokens, `None` for no limit.
        name: what to call the dataset in errors.
        keep_columns: further columns to carry along (for example an author or topic column); none that is called like
            one of the prepared ones.
        template: what the chat template sees beside the messages; by default nothing but today's date. The columns
            `tools` and `chat_template_kwargs` reach it too, as in TRL.
        counterfactual_column: another answer (a string, or a list of which the one nearest in length is taken; TOFU:
            `"perturbed_answer"`). It becomes `counterfactual_input_ids`, as long as `input_ids`: what is longer is cut,
            what is shorter ends with the answer's own last tokens. Tokenised data may bring that column along.
        secret_column: a span of each answer, or a list of spans, that must not be known; empty where there is none.
            It becomes `secret`: as `labels`, but -100 for all other tokens. Tokenised data may bring that along.

    Returns:
        `Dataset` with `sample_id` (column `sample_id` or `id` if present, else a hash of the content, whatever date a
        chat template writes), `input_ids`, `labels` and `keep_columns`, in the input's order. Of conversations also
        `counted`: as `labels`, but -100 for what the chat template adds around the answer (an empty think block, the
        end of the turn). Labels are trained on, as in TRL; figures are made of what counts.

    Raises:
        ValueError: for a missing, empty or iterable dataset, unknown columns, an empty answer, an answer that does not
            fit into `max_length` or that the chat template does not write as it is, a secret that does not occur in its
            answer, or duplicate ids. The message names the sample, the first at fault.
    """
    check_tokenizer(tokenizer)
    return _prepare(dataset, tokenizer, max_length, name, keep_columns, counterfactual_column, template, secret_column)


def _prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = 1024,
    name: str = "forget",
    keep_columns: Sequence[str] = (),
    counterfactual_column: str | None = None,
    template: TemplateContext | None = None,
    secret_column: str | None = None,
) -> Dataset:
    """`prepare_dataset` with a tokenizer that is known to be good."""
    _check_dataset(dataset, name)
    dataset = standardised(dataset, name)
    _check_columns(dataset, name, keep_columns, counterfactual_column, secret_column)
    kind = detect_format(dataset.column_names, name)
    if kind == "tokenised":
        check_one_document(dataset, name)
    named_by = id_column(dataset.column_names)
    brought = (*OPTIONAL, CONTENT) if kind == "tokenised" else TEMPLATE_COLUMNS
    read = {*FORMATS[kind], named_by, counterfactual_column, secret_column, *brought} & {*dataset.column_names}
    made = [*MADE]
    columns = [column for column in dataset.column_names if column in read or column in keep_columns]
    features = {column: dataset.features[column] for column in keep_columns}
    features |= {column: List(Value("int64")) for column in made}
    # the types that `datasets` chooses
    features |= {"sample_id": Value("string"), "input_ids": List(Value("int32")), CONTENT: Value("string")}
    preparation = _Preparation(
        kind,
        tokenizer,
        max_length,
        name,
        named_by,
        counterfactual_column,
        template or TemplateContext(),
        Features(features),
        tuple(keep_columns),
        secret_column,
    )
    prepared = in_batches(
        dataset.select_columns(columns),
        preparation,
        remove=[column for column in columns if column not in keep_columns],
        features=preparation.features,
        what=f"{name} samples",
    )
    ids = prepared["sample_id"][:]  # read at once, not row by row
    check_unique(ids, name)
    if TURN not in dataset.column_names:  # there, every earlier answer is a sample of its own
        preparation.warn(len(ids))
    for column in (*OPTIONAL, CONTENT):
        missing = pc.is_null(prepared.data.column(column)).to_numpy()
        if missing.any() and not missing.all():
            raise ValueError(f"{name} sample {ids[int(missing.argmax())]!r} has no {column}, others have")
        if missing.all():
            made.remove(column)
    return prepared.select_columns([*made, *keep_columns])


def prepare_samples(
    dataset: Dataset | Samples, tokenizer: PreTrainedTokenizerBase, *, tokenizer_checked: bool = False, **options: Any
) -> Samples:
    """`prepare_dataset` with what goes with it later, as `Samples`; those that are some already are returned.

    Args:
        tokenizer_checked: whether `check_tokenizer` has seen this tokenizer already.
        options: of `prepare_dataset`.
    """
    if isinstance(dataset, Samples):
        return dataset
    if not tokenizer_checked:
        check_tokenizer(tokenizer)
    template = options.pop("template", None) or TemplateContext()
    prepared = _prepare(dataset, tokenizer, template=template, **options)
    recorded = None
    if COUNTED in prepared.column_names and "input_ids" not in dataset.column_names:  # it went through the template
        recorded = template.identity(tokenizer, dated=CONTENT in prepared.column_names)
    return Samples(prepared, int(tokenizer.pad_token_id), recorded)  # type: ignore[arg-type]


def _check_dataset(dataset: Any, name: str) -> None:
    if dataset is None:
        raise ValueError(f"{name} dataset is missing")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "column_names"):
        raise ValueError(f"{name} dataset must be a map-style `datasets.Dataset`, not {type(dataset).__name__}")
    if isinstance(dataset.column_names, dict):
        raise ValueError(f"{name} dataset is a DatasetDict: choose a split, one of {list(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError(f"{name} dataset is empty")


def _check_columns(dataset: Dataset, name: str, keep_columns: Sequence[str], *asked_for: str | None) -> None:
    wanted = [*keep_columns, *filter(None, asked_for)]
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} dataset has no column {missing[0]!r}; it has {sorted(dataset.column_names)}")
    taken = [column for column in keep_columns if column in MADE]
    if taken:
        raise ValueError(f"{name} dataset: column {taken[0]!r} cannot be kept beside the prepared one of that name")


@dataclass(frozen=True)
class _Preparation:
    """What is done to the rows of a dataset, some at a time."""

    kind: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    name: str
    named_by: str | None
    counterfactual_column: str | None
    template: TemplateContext
    features: Features
    kept: tuple[str, ...]
    secret_column: str | None = None
    earlier: dict[int, int] = field(default_factory=dict)

    def warn(self, size: int) -> None:
        """Say what is in the samples and yet not looked at."""
        if self.earlier:
            logger.warning(
                f"{self.name} dataset: {len(self.earlier)} of {size} conversations have earlier answers of the "
                f"assistant ({sum(self.earlier.values())} in all): these are context, neither trained on nor measured, "
                "and stay as they are; with turns 'all' (every_turn) each is a sample"
            )

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> pa.Table:
        columns = first_at_fault(self._prepare, rows_of(batch), indices)
        kept = Features({name: self.features[name] for name in self.kept})
        columns |= kept.encode_batch({name: batch[name] for name in self.kept})
        return pa.Table.from_pydict(columns, schema=self.features.arrow_schema)  # a third of the time of lists

    def _prepare(self, rows: list[Row], indices: list[int]) -> dict[str, list]:
        names = [self._name(row, index) for row, index in zip(rows, indices, strict=True)]
        given = self.kind == "tokenised"
        tokenised: list[Tokens] = []
        hashes: list[str] = []
        made = each_tokenised(rows, self.kind, self.tokenizer, names, self.template, self.secret_column)
        for number, (row, index, tokens) in enumerate(zip(rows, indices, made, strict=True)):
            hashes.append(_content(tokens))
            tokenised.append(tokens)
            if self.named_by is None:
                names[number] = f"{self.name} sample {hashes[-1]} (row {index})"
            self._check_answer(tokens, row["labels"] if given else None, names[number])
            if tokens.earlier:
                self.earlier[index] = tokens.earlier
        input_ids = pa.array([tokens.ids for tokens in tokenised], self.features.arrow_schema.field("input_ids").type)
        columns: dict[str, Any] = {
            "sample_id": hashes if self.named_by is None else [str(row[self.named_by]) for row in rows],
            "input_ids": input_ids,
            "labels": [row["labels"] for row in rows] if given else _marked(input_ids, [t.trained for t in tokenised]),
            **{column: [None] * len(rows) for column in OPTIONAL},
            # of all rows of a batch or of none
            CONTENT: hashes if any(tokens.undated is not None for tokens in tokenised) else [None] * len(rows),
        }
        for column, each in (
            (COUNTED, [tokens.counted for tokens in tokenised]),
            (SECRET, [tokens.secret for tokens in tokenised]),
        ):
            spans = [own for own in each if own is not None]  # of all rows or of none
            if spans:
                columns[column] = _marked(input_ids, spans)
        if self.counterfactual_column is not None:
            columns[COUNTERFACTUAL] = counterfactuals(
                rows, self.kind, self.counterfactual_column, self.tokenizer, tokenised, names, self.template
            )
        if given:
            for number, (row, where) in enumerate(zip(rows, names, strict=True)):
                for column, values in self._brought(row, where).items():
                    columns[column][number] = values
        return columns

    def _name(self, row: Row, index: int) -> str:
        if self.named_by is None:
            return f"{self.name} sample {index}"
        if row[self.named_by] is None or not str(row[self.named_by]).strip():
            raise ValueError(f"{self.name} sample {index} has no {self.named_by}")
        return f"{self.name} sample {row[self.named_by]!r}"

    def _check_answer(self, tokens: Tokens, labels: list[int] | None, where: str) -> None:
        # the first token of a sequence cannot be predicted
        if labels is None:
            spans = tokens.trained if tokens.counted is None else tokens.counted
            predicted = any(end > max(start, 1) for start, end in spans)
        else:
            predicted = len(labels[1:]) > labels[1:].count(IGNORE_INDEX)
        if not predicted:
            raise ValueError(f"{where}: it has no answer token that can be predicted")
        if tokens.secret and all(end < 2 for _, end in tokens.secret):
            raise ValueError(f"{where}: its secret is the first token of the text, which nothing predicts")
        if self.max_length is not None and len(tokens.ids) > self.max_length:
            raise ValueError(
                f"{where}: its answer ends at token {len(tokens.ids)}, beyond max_length={self.max_length}; "
                "raise max_length or shorten the sample (answers are never cut silently)"
            )

    def _brought(self, row: Row, where: str) -> dict[str, Any]:
        """The other answers that a tokenised row brings along."""
        brought = {}
        if self.counterfactual_column is None and row.get(COUNTERFACTUAL) is not None:
            check_tokens(row[COUNTERFACTUAL], COUNTERFACTUAL, self.tokenizer, where)
            if len(row[COUNTERFACTUAL]) != len(row["input_ids"]):
                raise ValueError(f"{where}: {COUNTERFACTUAL} and input_ids differ in length")
            brought[COUNTERFACTUAL] = row[COUNTERFACTUAL]
        if all(row.get(column) is not None for column in ALTERNATIVES):
            for column, also in zip(ALTERNATIVES, ((), (IGNORE_INDEX,)), strict=True):
                check_tokens(row[column], column, self.tokenizer, where, *also)
            brought |= {column: row[column] for column in ALTERNATIVES}
        for column in (COUNTED, SECRET):
            if row.get(column) is None:
                continue
            if not isinstance(row[column], list):
                if column == SECRET and self.secret_column is None:
                    continue  # a column of the user's that nobody asks for
                raise ValueError(f"{where}: its {column} are no token labels, as they must be beside input_ids")
            check_tokens(row[column], column, self.tokenizer, where, IGNORE_INDEX)
            if len(row[column]) != len(row["input_ids"]):
                raise ValueError(f"{where}: {column} and input_ids differ in length")
            brought[column] = row[column]
        if isinstance(row.get(CONTENT), str):  # of samples that were prepared before
            brought[CONTENT] = row[CONTENT]
        return brought


def _marked(input_ids: pa.ListArray, spans: Sequence[Sequence[Span]]) -> pa.ListArray:
    """A column of labels: of each row the tokens in its spans (from, to), -100 for all others."""
    values, firsts = input_ids.values.to_numpy(), input_ids.offsets.to_pylist()
    bounds = [bound + first for first, row in zip(firsts[:-1], spans, strict=True) for span in row for bound in span]
    begun, ended = (
        np.bincount(np.array(side, dtype=np.int64), minlength=len(values) + 1) for side in (bounds[::2], bounds[1::2])
    )
    labels = np.where((begun - ended).cumsum()[:-1] > 0, values, IGNORE_INDEX)
    return pa.ListArray.from_arrays(input_ids.offsets, pa.array(labels, pa.int64()))


def _content(tokens: Tokens) -> str:
    """`content_id` on no day in particular."""
    prompt, ids = tokens.undated or (tokens.prompt, tokens.ids)
    return content_id(ids, 0 if tokens.opens else prompt)


def sample_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> list[str]:
    """The id of each row: the one by which difficulty scores, schedules and reports know it.

    Args:
        dataset: in any format of `prepare_dataset`.
        tokenizer: for rows without a column `sample_id` or `id`, whose ids are hashes of their tokens.
        options: further ones of `prepare_dataset` (a template, ...), the same as when it was scored.

    Raises:
        ValueError: when there is neither a column of ids nor a tokenizer, or two rows have the same id.
    """
    column = id_column(dataset.column_names)
    if column is not None:
        names = [str(name) for name in dataset[column]]
        check_unique(names, "the")
        return names
    if tokenizer is None:
        raise ValueError(
            "the samples have no column sample_id or id: their ids are hashes of their tokens, so that a tokenizer is "
            f"needed; there are the columns {sorted(dataset.column_names)}"
        )
    return list(prepare_dataset(dataset, tokenizer, **{"max_length": None, **options})["sample_id"])
