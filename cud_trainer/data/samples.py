"""`Samples`: what every later stage works on, prepared and checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .batches import BATCH_BYTES, pad_batch, plan_batches
from .columns import ALTERNATIVES, CONTENT, COUNTED, COUNTERFACTUAL, IGNORE_INDEX, PREPARED, SECRET

# Rows that are read at a time.
CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Samples:
    """Prepared samples, and the batches made of them. Whoever gets one need not check or prepare anything again.

    `prepare_samples` makes it. `len`, iteration, `samples[row]` and `samples[column]` are those of `dataset`.

    Attributes:
        dataset: what `prepare_dataset` returns: `sample_id`, `input_ids`, `labels` (-100 outside the answer), columns
            of counterfactual and alternative answers where there are some, and the columns that were kept.
        pad_token_id: the token that fills shorter samples of a batch.
        template: what the chat template saw beside the messages, see `TemplateContext.identity`; `None` without one.
    """

    dataset: Dataset
    pad_token_id: int
    template: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)

    def __getitem__(self, key: int | str) -> Any:
        return self.dataset[key]

    @cached_property
    def ids(self) -> list[str]:
        """The `sample_id` of every sample."""
        return self.dataset["sample_id"][:]  # read at once, not row by row

    @cached_property
    def fingerprint(self) -> str:
        """See `dataset_fingerprint`."""
        return dataset_fingerprint(self.dataset)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [int(length) for part in _lists(self.dataset, "input_ids") for length in np.diff(part[1])]

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        """Answer tokens of every sample that can be predicted, int `[N]`: the first token of a sequence cannot."""
        counts = []
        for labels, ends in _lists(self.dataset, "labels"):
            answer = labels != IGNORE_INDEX
            answer[ends[:-1][np.diff(ends) > 0]] = False
            counts.append(np.diff(np.concatenate([[0], answer.cumsum()])[ends]))
        return np.concatenate(counts)

    @property
    def has_counterfactuals(self) -> bool:
        """Whether every sample has another answer, aligned with its own, for counterfactual circuits."""
        return COUNTERFACTUAL in self.dataset.column_names

    @cached_property
    def alternatives(self) -> Samples | None:
        """The samples with the answer that is to take the place of their own; `None` when there is none."""
        if ALTERNATIVES[0] not in self.dataset.column_names:
            return None
        names = dict(zip(ALTERNATIVES, ("input_ids", "labels"), strict=True))
        columns = self.dataset.select_columns(["sample_id", *ALTERNATIVES])
        return Samples(columns.rename_columns(names), self.pad_token_id)

    @cached_property
    def measured(self) -> Samples:
        """The samples with labels on the tokens that figures are made of: the one place that says which these are.

        They are the message's own. What a chat template adds around it is trained on, but does not count; nor does the
        first token of a sequence, which nothing predicts. The eos token behind an answer that is plain text counts.
        """
        if COUNTED not in self.dataset.column_names:
            return self
        columns = self.dataset.remove_columns("labels").rename_column(COUNTED, "labels")
        return replace(self, dataset=columns)

    @cached_property
    def secret(self) -> tuple[np.ndarray, Samples] | None:
        """The samples that have a secret: which rows they are, int `[S]`, and they with labels on its tokens alone.

        `None` where none is marked (`secret_column` of `prepare_dataset`).
        """
        if SECRET not in self.dataset.column_names:
            return None
        others = [column for column in ("labels", COUNTED) if column in self.dataset.column_names]
        columns = self.dataset.remove_columns(others).rename_column(SECRET, "labels")
        rows = np.flatnonzero([any(label != IGNORE_INDEX for label in labels) for labels in columns["labels"]])
        return rows, replace(self, dataset=columns.select(rows))

    def select(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """Some of the samples, in the order of `rows`."""
        return replace(self, dataset=self.dataset.select(rows))

    @cached_property
    def _tensors(self) -> Dataset:
        """The columns that a batch is made of."""
        names = ("input_ids", "labels", COUNTERFACTUAL, COUNTED)
        return self.dataset.select_columns([name for name in names if name in self.dataset.column_names])

    def pad(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The padded batch of some rows, see `pad_batch`."""
        part = self._tensors[list(rows)]
        return pad_batch(
            [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)], self.pad_token_id
        )

    def plan(
        self, *, bytes_per_token: float = 0.0, batch_size: int | None = None, batch_bytes: int = BATCH_BYTES
    ) -> list[list[int]]:
        """Rows of each batch, see `plan_batches`."""
        return plan_batches(
            self.lengths, bytes_per_token=bytes_per_token, batch_size=batch_size, batch_bytes=batch_bytes
        )

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", desc: str | None = None
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield `(row indices, padded batch)` over all samples, those of similar length together.

        Args:
            desc: label of a progress bar; `None` shows none.
        """
        with tqdm(total=len(self), desc=desc, disable=desc is None, unit="sample", leave=False) as bar:
            for rows in self.plan(batch_size=batch_size):
                yield rows, {key: value.to(device) for key, value in self.pad(rows).items()}
                bar.update(len(rows))


Rows = TypeVar("Rows", Dataset, Samples)


def evenly_spaced(samples: Rows, count: int) -> Rows:
    """At most `count` samples, from the first to the last."""
    rows = np.linspace(0, len(samples) - 1, min(len(samples), count))
    return samples.select(rows.round().astype(int))


def dataset_fingerprint(prepared: Dataset) -> str:
    """Hash of ids, tokens and answer masks (`sha256:` and 16 hex digits): same samples in the same order, same
    fingerprint. Files hold it as they hold ids, see `cud_trainer.data.ids`.

    Where a chat template writes the date, of ids and tokens as they would be on no day in particular.
    """
    digest = hashlib.sha256()
    if CONTENT in prepared.column_names:
        for table in prepared.select_columns(["sample_id", CONTENT]).with_format("arrow").iter(CHUNK):
            lines = pc.binary_join_element_wise(table["sample_id"], "|", table[CONTENT], "\n", "")
            digest.update("".join(lines.to_pylist()).encode())
        return f"sha256:{digest.hexdigest()[:16]}"
    for table in prepared.select_columns(list(PREPARED)).with_format("arrow").iter(CHUNK):
        ids, tokens, labels = (table[name].combine_chunks() for name in PREPARED)
        # one line a sample, as Python would write it: id|[5, 6, 7]|[-100, 6, 7]
        parts = (ids, "|[", _joined(tokens), "]|[", _joined(labels), "]\n")
        lines = pc.binary_join_element_wise(*parts, "")
        digest.update("".join(lines.to_pylist()).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def _joined(lists: pa.ListArray) -> pa.StringArray:
    return pc.binary_join(lists.cast(pa.list_(pa.string())), ", ")


def check_disjoint(forget: Samples, retain: Samples) -> None:
    """Raise `ValueError` naming the first forget sample that is also a retain sample, by id or by content."""
    sample_id, other = first_shared(forget, retain)
    if other is not None:
        raise ValueError(
            f"forget sample {sample_id!r} has the same content as retain sample {other!r} (row "
            f"{forget.ids.index(str(sample_id))} of the forget dataset)"
        )
    if sample_id is not None:
        row = forget.ids.index(sample_id)
        raise ValueError(
            f"sample {sample_id!r} is in both the forget and the retain dataset (row {row} of the forget dataset)"
        )


def check_unseen(held_out: Samples, seen: Samples, name: str) -> None:
    """Raise `ValueError` naming the first held-out sample that is also in the set `name`, by id or by content."""
    sample_id, other = first_shared(held_out, seen)
    if other is not None:
        raise ValueError(f"held-out sample {sample_id!r} has the same content as {name} sample {other!r}")
    if sample_id is not None:
        row = held_out.ids.index(sample_id)
        raise ValueError(f"held-out sample {sample_id!r} (row {row}) is in the {name} dataset: a loss sees it")


def first_shared(ours: Samples, others: Samples) -> tuple[str | None, str | None]:
    """The first of our samples that is also in `others`, and the id that it has there if only the content is the same.

    Of the others, which may be many, nothing is kept but what is also ours.

    Both are `None` where no sample is shared.
    """
    ids, contents = set(ours.ids), set(_contents(ours))
    ids = {name for name in others.ids if name in ids}
    same = {content: name for content, name in zip(_contents(others), others.ids, strict=True) if content in contents}
    for sample_id, content in zip(ours.ids, _contents(ours), strict=True):
        if sample_id in ids:
            return sample_id, None
        if content in same:
            return sample_id, same[content]
    return None, None


def _contents(samples: Samples) -> Iterator[bytes]:
    """A hash of every sample's tokens."""
    for tokens, ends in _lists(samples.dataset, "input_ids"):
        for start, end in pairwise(ends):
            yield hashlib.blake2b(tokens[start:end].tobytes(), digest_size=16).digest()


def _lists(dataset: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A column of lists of integers, some rows at a time: all their values, int64, and where each row's begin and end.

    Row `i` of them is `values[ends[i] : ends[i + 1]]`.
    """
    for table in dataset.select_columns([column]).with_format("arrow").iter(CHUNK):
        lists = table[column].combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        yield values, np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
