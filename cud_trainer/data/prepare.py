"""Forget and retain samples: from the formats users have to token ids with an answer mask, and paired batches.

Every later stage works on a *prepared* dataset: a `datasets.Dataset` with the columns `sample_id` (str), `input_ids`
and `labels` (-100 outside the answer), plus the user's group columns if any. Row `i` of a prepared dataset is row `i`
of the input: nothing is shuffled, truncated or dropped, a sample that cannot be used is an error that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
# Memory that a batch may take while it is scored, by the caller's estimate.
BATCH_BYTES = 2 * 2**30
PREPARED = ("sample_id", "input_ids", "labels")
# Beside `input_ids` token by token: the same sample with another answer, for counterfactual circuits.
COUNTERFACTUAL = "counterfactual_input_ids"
# The same sample with the answer that is to take its place, for preference objectives.
ALTERNATIVES = ("alternative_input_ids", "alternative_labels")
FORMATS = {
    "tokenised": ("input_ids", "labels"),
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless `tokenizer` can end and pad a sequence."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer '{name}' has no eos token: set `tokenizer.eos_token`")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer '{name}' has no pad token: set `tokenizer.pad_token` (for example to the eos token)"
        )


def detect_format(columns: Sequence[str], name: str) -> str:
    """The first entry of `FORMATS` whose columns are all present; `ValueError` when there is none."""
    for format_name, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return format_name
    known = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"{name} dataset has columns {sorted(columns)}; expected one of: {known}")


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    name: str = "forget",
    keep_columns: Sequence[str] = (),
    counterfactual_column: str | None = None,
) -> Dataset:
    """Tokenise `dataset` and mark the answer tokens.

    Formats (first match wins): `input_ids` + `labels`; `prompt` + `completion`, strings or lists of messages;
    `messages` (the last message, which must be the assistant's, is the answer, the ones before are its context);
    `question` + `answer` (TOFU; goes through the chat template when the tokenizer has one, else
    `"Question: ...\\nAnswer: ..."`); `text` (every token is answer). Strings get an eos token at the end, as in TRL.

    Args:
        dataset: map-style dataset.
        tokenizer: with eos and pad tokens.
        max_length: the longest sequence in tokens, `None` for no limit.
        name: what to call the dataset in errors.
        keep_columns: further columns to carry along (for example an author or topic column).
        counterfactual_column: another answer (a string, or a list of which the one nearest in length is taken; TOFU:
            `"perturbed_answer"`). It becomes `counterfactual_input_ids`, as long as `input_ids`: what is longer is cut,
            what is shorter ends with the answer's own last tokens. Tokenised data may bring that column along.

    Returns:
        `Dataset` with `sample_id` (column `sample_id` or `id` if present, else a hash of the content), `input_ids`,
        `labels` and `keep_columns`, in the input's order.

    Raises:
        ValueError: for a missing, empty or iterable dataset, unknown columns, an empty answer, an answer that does not
            fit into `max_length`, or duplicate ids. The message names the sample.
    """
    if dataset is None:
        raise ValueError(f"{name} dataset is missing")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "column_names"):
        raise ValueError(f"{name} dataset must be a map-style `datasets.Dataset`, not {type(dataset).__name__}")
    if isinstance(dataset.column_names, dict):
        raise ValueError(f"{name} dataset is a DatasetDict: choose a split, one of {list(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError(f"{name} dataset is empty")
    check_tokenizer(tokenizer)
    wanted = [*keep_columns, *([counterfactual_column] if counterfactual_column else [])]
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} dataset has no column {missing[0]!r}; it has {sorted(dataset.column_names)}")
    taken = [column for column in keep_columns if column in PREPARED]
    if taken:
        raise ValueError(f"{name} dataset: column {taken[0]!r} cannot be kept beside the prepared one of that name")
    dataset = dataset.with_format(None)  # rows of plain Python values, whatever the user looks at them as
    kind = detect_format(dataset.column_names, name)
    named_by = id_column(dataset.column_names)

    ids: list[str] = []
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(dataset):
        where = f"{name} sample {index}" if named_by is None else f"{name} sample {row[named_by]!r}"
        if named_by is not None and row[named_by] is None:
            raise ValueError(f"{name} sample {index} has no {named_by}")
        prompt, tokens = _tokenise(row, kind, tokenizer, where)
        sample_id = str(row[named_by]) if named_by is not None else content_id(tokens, prompt)
        if named_by is None:
            where = f"{name} sample {sample_id} (row {index})"
        _check_answer(prompt, tokens, row, kind, max_length, where)
        ids.append(sample_id)
        labels = list(row["labels"]) if kind == "tokenised" else [IGNORE_INDEX] * prompt + tokens[prompt:]
        rows.append({"sample_id": sample_id, "input_ids": tokens, "labels": labels})
        if counterfactual_column is not None:
            rival = _counterfactual(row, kind, counterfactual_column, tokenizer, prompt, tokens, where)
            rows[-1][COUNTERFACTUAL] = rival
        elif kind == "tokenised" and row.get(COUNTERFACTUAL) is not None:
            _check_tokens(row[COUNTERFACTUAL], COUNTERFACTUAL, tokenizer, where)
            if len(row[COUNTERFACTUAL]) != len(tokens):
                raise ValueError(f"{where}: {COUNTERFACTUAL} and input_ids differ in length")
            rows[-1][COUNTERFACTUAL] = list(row[COUNTERFACTUAL])
        if kind == "tokenised" and all(row.get(column) is not None for column in ALTERNATIVES):
            for column, extra in zip(ALTERNATIVES, ((), (IGNORE_INDEX,)), strict=True):
                _check_tokens(row[column], column, tokenizer, where, *extra)
            rows[-1] |= {column: list(row[column]) for column in ALTERNATIVES}
    check_unique(ids, name)
    for column in (COUNTERFACTUAL, *ALTERNATIVES):
        without = [sample_id for sample_id, row in zip(ids, rows, strict=True) if column not in row]
        if without and len(without) < len(rows):
            raise ValueError(f"{name} sample {without[0]!r} has no {column}, others have")

    columns: dict[str, list] = {key: [row[key] for row in rows] for key in rows[0]}
    for column in keep_columns:
        columns[column] = list(dataset[column])
    return Dataset.from_dict(columns)


def check_disjoint(forget: Dataset, retain: Dataset) -> None:
    """Raise `ValueError` naming the first sample that is in both prepared datasets, by id or by content."""
    retain_ids = set(retain["sample_id"])
    retain_content = {tuple(tokens): sample_id for sample_id, tokens in _ids_and_tokens(retain)}
    for sample_id, tokens in _ids_and_tokens(forget):
        if sample_id in retain_ids:
            raise ValueError(f"sample {sample_id!r} is in both the forget and the retain dataset")
        if tuple(tokens) in retain_content:
            other = retain_content[tuple(tokens)]
            raise ValueError(f"forget sample {sample_id!r} has the same content as retain sample {other!r}")


def dataset_fingerprint(prepared: Dataset) -> str:
    """Hash of ids, tokens and answer masks (16 hex digits): same samples in the same order, same fingerprint."""
    digest = hashlib.sha256()
    for sample_id, tokens, labels in zip(prepared["sample_id"], prepared["input_ids"], prepared["labels"], strict=True):
        digest.update(f"{sample_id}|{list(tokens)}|{list(labels)}\n".encode())
    return digest.hexdigest()[:16]


def pad_batch(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad prepared samples into `input_ids`, `attention_mask`, `labels`, each int64 `[batch, length]`.

    Counterfactual tokens are padded along where the samples have them.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.full((len(samples), length), pad_token_id),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), IGNORE_INDEX),
    }
    if COUNTERFACTUAL in samples[0]:
        batch[COUNTERFACTUAL] = torch.full((len(samples), length), pad_token_id)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][row, :size] = torch.as_tensor(sample["input_ids"])
        if COUNTERFACTUAL in batch:
            batch[COUNTERFACTUAL][row, :size] = torch.as_tensor(sample[COUNTERFACTUAL])
        batch["attention_mask"][row, :size] = 1
        batch["labels"][row, :size] = torch.as_tensor(sample["labels"])
    return batch


def pad_samples(prepared: Dataset, rows: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The padded batch of some rows of a prepared dataset."""
    columns = [name for name in ("input_ids", "labels", COUNTERFACTUAL) if name in prepared.column_names]
    part = prepared.select_columns(columns)[list(rows)]
    return pad_batch(
        [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)], pad_token_id
    )


def plan_batches(
    lengths: Sequence[int],
    *,
    bytes_per_token: float = 0.0,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> list[list[int]]:
    """Rows of each batch, longest samples first, similar lengths together.

    Args:
        lengths: tokens of each sample, `N`.
        bytes_per_token: memory that one (padded) token takes; 0 for no bound.
        batch_size: samples per batch at most, `None` for no bound.
        batch_bytes: bytes per batch at most; a single sample may exceed it.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        current = batches[-1] if batches else []
        size = len(current) + 1
        fits = current and size * lengths[current[0]] * bytes_per_token <= batch_bytes
        if fits and (batch_size is None or size <= batch_size):
            current.append(row)
        else:
            batches.append([row])
    return batches


def length_sorted_batches(
    prepared: Dataset,
    batch_size: int,
    pad_token_id: int,
    *,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield `(row indices, padded batch)` over the whole dataset, samples of similar length together.

    Args:
        desc: label of a progress bar; `None` shows none.
    """
    lengths = [len(tokens) for tokens in prepared["input_ids"]]
    with tqdm(total=len(lengths), desc=desc, disable=desc is None, unit="sample", leave=False) as bar:
        for rows in plan_batches(lengths, batch_size=batch_size):
            batch = pad_samples(prepared, rows, pad_token_id)
            yield rows, {key: value.to(device) for key, value in batch.items()}
            bar.update(len(rows))


def rows_by_id(have: Sequence[str], wanted: Sequence[str], what: str, whose: str = "samples") -> list[int]:
    """Where each of the ids `wanted` stands in `have`; `ValueError` naming one that is not there.

    Args:
        what, whose: what is looked up for whom, for the error.
    """
    position = {sample_id: row for row, sample_id in enumerate(have)}
    missing = [sample_id for sample_id in wanted if sample_id not in position]
    if missing:
        raise ValueError(
            f"{what} lack {len(missing)} of {len(wanted)} {whose}, the first is {missing[0]!r}: "
            "they were made for another dataset"
        )
    return [position[sample_id] for sample_id in wanted]


def id_column(columns: Sequence[str]) -> str | None:
    """The column that names samples, if there is one."""
    return next((name for name in ("sample_id", "id") if name in columns), None)


def evenly_spaced(dataset: Dataset, count: int) -> Dataset:
    """At most `count` samples of a dataset, from the first to the last."""
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), count))
    return dataset.select(rows.round().astype(int))


def alternatives_of(prepared: Dataset) -> Dataset:
    """The alternative answers of a prepared dataset, as a prepared dataset."""
    columns = {name: prepared[column] for name, column in zip(("input_ids", "labels"), ALTERNATIVES, strict=True)}
    return Dataset.from_dict({"sample_id": prepared["sample_id"], **columns})


@dataclass
class PairedCollator:
    """Turns rows of a schedule into one batch `[forget ; retain ; alternative]`, so that a step is one forward pass.

    A row is `{"row", "forget_index", "retain_index", "weight", "retain_scale"}` with positions into the prepared
    datasets. The batch has `input_ids`, `attention_mask`, `labels` of shape `[n B, length]`, n = 1 to 3, and the row's
    values as tensors of shape `[B]`.

    Attributes:
        retain: `None` for no retain rows.
        alternative: whether the forget samples' alternative answers are part of the batch.
    """

    forget: Dataset
    retain: Dataset | None
    pad_token_id: int
    pad_to_multiple_of: int | None = None
    alternative: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "forget_index" not in rows[0]:  # an evaluation batch of plain prepared samples
            return pad_batch(rows, self.pad_token_id)
        samples = [self.forget[int(row["forget_index"])] for row in rows]
        if self.retain is not None:
            samples += [self.retain[int(row["retain_index"])] for row in rows]
        if self.alternative:
            names = dict(zip(("input_ids", "labels"), ALTERNATIVES, strict=True))
            forget = samples[: len(rows)]
            samples = samples + [{name: sample[column] for name, column in names.items()} for sample in forget]
        batch = pad_batch(samples, self.pad_token_id)
        if self.pad_to_multiple_of:
            extra = -batch["input_ids"].shape[1] % self.pad_to_multiple_of
            fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
            for key, value in fill.items():
                batch[key] = torch.nn.functional.pad(batch[key], (0, extra), value=value)
        for key in ("row", "forget_index", "retain_index"):
            batch[key] = torch.tensor([int(row[key]) for row in rows])
        for key in ("weight", "retain_scale"):
            batch[key] = torch.tensor([float(row[key]) for row in rows])
        return batch


def _tokenise(row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, list[int]]:
    """`(number of prompt tokens, all tokens)` of one row."""
    prompt: Any
    completion: Any
    if kind == "tokenised":
        tokens, labels = row["input_ids"], row["labels"]
        if tokens is None or labels is None:
            raise ValueError(f"{where}: its {'labels' if labels is None else 'input_ids'} are missing")
        _check_tokens(tokens, "input_ids", tokenizer, where)
        _check_tokens(labels, "labels", tokenizer, where, IGNORE_INDEX)
        if len(labels) != len(tokens):
            raise ValueError(f"{where}: labels and input_ids differ in length")
        answers = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
        wrong = next((position for position in answers if labels[position] != tokens[position]), None)
        if wrong is not None:
            raise ValueError(
                f"{where}: label {labels[wrong]} at position {wrong} is neither {IGNORE_INDEX} nor the token there, "
                f"{tokens[wrong]} (labels are not shifted)"
            )
        return answers[0] if answers else len(labels), list(tokens)
    if kind == "text":
        return 0, text_tokens(row["text"], tokenizer, where)
    if kind == "conversational":
        messages = row["messages"] or []
        if not isinstance(messages, list):
            raise ValueError(f"{where}: its messages are no list")
        prompt, completion = messages[:-1], messages[-1:]
    elif kind == "question-answer":
        question, answer = row["question"], _filled(row["answer"], "answer", where)
        if not isinstance(question, str):
            raise ValueError(f"{where}: its question is missing")
        if tokenizer.chat_template:
            prompt = [{"role": "user", "content": question}]
            completion = [{"role": "assistant", "content": answer}]
        else:
            prompt, completion = f"Question: {question}\nAnswer:", f" {answer}"
    else:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, (str, list)):
            raise ValueError(f"{where}: its prompt is missing")
        if completion and isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(f"{where}: prompt and completion must both be strings or both be lists of messages")

    if isinstance(prompt, str):
        _filled(completion, "completion", where)
        start = tokenizer(prompt)["input_ids"]
        full = _with_eos(tokenizer(prompt + completion)["input_ids"], tokenizer)
    else:
        for message in [*prompt, *(completion or [])]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
                raise ValueError(f"{where}: a message must have a role and a content, got {_keys(message)}")
        if not completion or completion[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's, it is what will be forgotten")
        _filled(completion[-1].get("content"), "assistant message", where)
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: the data is conversational but the tokenizer has no chat template")
        # An opening with no user turn has no generation prompt to share with the full chat.
        try:
            start = _chat(tokenizer, prompt, add_generation_prompt=True) if prompt else []
            full = _chat(tokenizer, [*prompt, *completion], add_generation_prompt=False)
        except (TemplateError, TypeError) as error:  # TypeError: content that is no text
            raise ValueError(f"{where}: the chat template refuses it: {str(error)[:200]}") from None
    return _common_prefix(start, full), full


def text_tokens(text: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Tokens of a plain text with eos at the end; `ValueError` naming `where` for an empty one."""
    # A long text is no reason for a warning: what does not fit is an error later, or is cut into chunks.
    return _with_eos(tokenizer(_filled(text, "text", where), verbose=False)["input_ids"], tokenizer)


def _check_tokens(tokens: Any, column: str, tokenizer: PreTrainedTokenizerBase, where: str, *also: int) -> None:
    """Raise `ValueError` unless `tokens` are a list of the tokenizer's token ids, or of what else is allowed."""
    if not isinstance(tokens, list):
        raise ValueError(f"{where}: its {column} are no list")
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{where}: {column} has a {type(token).__name__} at position {position}, no token id")
        if token not in also and not 0 <= token < len(tokenizer):
            raise ValueError(
                f"{where}: {column} has {token} at position {position}, the tokenizer has {len(tokenizer)} tokens"
            )


def _filled(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: its {what} is empty")
    return value


ANSWERS = {"prompt-completion": "completion", "question-answer": "answer", "conversational": "messages"}


def question_and_answer(row: dict[str, Any], kind: str) -> tuple[str, str]:
    """What is asked last and what is answered, as text; of a row that `prepare_dataset` accepts, not `text`."""
    if kind == "question-answer":
        return row["question"], row["answer"]
    if kind == "conversational":
        turns = row["messages"]
        prompt, completion = turns[:-1], turns[-1:]
    else:
        prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return prompt, completion
    asked = next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")
    return asked, completion[-1]["content"]


def tokenise_answer(
    row: dict[str, Any], kind: str, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row with `text` for its answer."""
    answer: Any = text
    if kind == "conversational":
        answer = [*row["messages"][:-1], {"role": "assistant", "content": text}]
    elif kind == "prompt-completion" and not isinstance(row["completion"], str):
        answer = [*row["completion"][:-1], {"role": "assistant", "content": text}]
    elif kind == "prompt-completion" and row["completion"][:1].isspace() and not text[:1].isspace():
        answer = row["completion"][0] + text  # the same separation from the prompt
    prompt, tokens = _tokenise({**row, ANSWERS[kind]: answer}, kind, tokenizer, where)
    return {"input_ids": tokens, "labels": [IGNORE_INDEX] * prompt + tokens[prompt:]}


def _counterfactual(
    row: dict[str, Any],
    kind: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: int,
    tokens: list[int],
    where: str,
) -> list[int]:
    """The sample's tokens with another answer in place of its own, aligned token by token."""
    if kind not in ("prompt-completion", "question-answer") or not isinstance(row[ANSWERS[kind]], str):
        raise ValueError(
            f"{where}: counterfactual answers need question + answer or prompt + completion as text "
            f"(or a column {COUNTERFACTUAL} beside input_ids)"
        )
    given = row[column] if isinstance(row[column], list) else [row[column]]
    if not given:
        raise ValueError(f"{where}: its {column} is empty")
    rivals = []
    for text in given:
        other = {**row, ANSWERS[kind]: _filled(text, column, where)}
        rivals.append(_tokenise(other, kind, tokenizer, where)[1])
    nearest = min(rivals, key=lambda rival: abs(len(rival) - len(tokens)))
    # the sample's own end of sequence stays in its place
    body = nearest[prompt : len(tokens) - 1] if len(nearest) >= len(tokens) else nearest[prompt:-1]
    return [*tokens[:prompt], *body, *tokens[prompt + len(body) :]]


def _keys(message: Any) -> str:
    """What a malformed message looks like, without its text."""
    return f"the keys {sorted(message)}" if isinstance(message, dict) else f"a {type(message).__name__}"


def _with_eos(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = list(tokens)
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _common_prefix(start: list[int], full: list[int]) -> int:
    """Where the answer starts: a tokenizer may merge the end of the prompt with the start of the answer."""
    shared = 0
    while shared < min(len(start), len(full)) and start[shared] == full[shared]:
        shared += 1
    return shared


def _check_answer(
    prompt: int, tokens: list[int], row: dict[str, Any], kind: str, max_length: int | None, where: str
) -> None:
    if kind == "tokenised":
        answers = sum(label != IGNORE_INDEX for label in row["labels"][1:])
    else:
        answers = len(tokens) - max(prompt, 1)  # the first token of a sequence cannot be predicted
    if answers < 1:
        raise ValueError(f"{where}: it has no answer token that can be predicted")
    if max_length is not None and len(tokens) > max_length:
        raise ValueError(
            f"{where}: its answer ends at token {len(tokens)}, beyond max_length={max_length}; "
            "raise max_length or shorten the sample (answers are never cut silently)"
        )


def check_unique(ids: list[str], name: str) -> None:
    """Raise `ValueError` naming the first id that is there twice."""
    first: dict[str, int] = {}
    for index, sample_id in enumerate(ids):
        if sample_id in first:
            raise ValueError(
                f"{name} dataset has the id {sample_id!r} twice (rows {first[sample_id]} and {index}); "
                "remove the duplicate or give the rows distinct `sample_id`s"
            )
        first[sample_id] = index


def content_id(tokens: list[int], prompt: int = 0) -> str:
    """Hash of tokens and of where the answer starts, 16 hex digits: the id of a sample that has no other."""
    return hashlib.sha256(f"{prompt}|{tokens}".encode()).hexdigest()[:16]


def _ids_and_tokens(prepared: Dataset) -> Iterator[tuple[str, list[int]]]:
    return zip(prepared["sample_id"], prepared["input_ids"], strict=True)
