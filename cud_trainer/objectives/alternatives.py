"""Alternative answers for preference objectives: given with the data, a refusal, or written by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import (
    ALTERNATIVES,
    ANSWERS,
    Samples,
    TemplateContext,
    detect_format,
    first_at_fault,
    question_and_answer,
    tokenise_answers,
)
from ..data.template import Renderer
from ..models.generation import Sampling, continuations, stop_tokens

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I cannot answer.",
    "I'm afraid I don't know the answer to that.",
    "This is not something I know about.",
    "I can't help with that question.",
    "I do not have any knowledge of this.",
)
INSTRUCTION = (
    "Question: {question}\nAnswer: {answer}\n\nWrite another answer to the same question. It must be as long, sound as "
    "plausible, and state other facts. Write only that answer, in one line."
)
ATTEMPTS = 5
TOP_P = 0.95


def with_alternatives(
    samples: Samples,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    column: str | None = None,
    refusals: Sequence[str] = REFUSALS,
    model: PreTrainedModel | None = None,
    template: TemplateContext | None = None,
    batch_size: int = 8,
    max_length: int | None = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Samples:
    """The samples with the columns `alternative_input_ids` and `alternative_labels`.

    Args:
        samples: what `prepare_samples` made of `dataset`. Those that have the columns are returned as they are.
        dataset: the samples as text, in the same order.
        source: `"given"` (text in `column`), `"refusal"` (one of `refusals`) or `"model"` (see `model_alternatives`).
        model: writes the answers for `"model"`.
        template: what a chat template sees beside the messages, see `prepare_dataset`.
        max_length: of an alternative with its prompt, in tokens.
        seed: decides which refusal a sample gets and what the model writes.

    Raises:
        ValueError: for samples without a prompt, a missing column, or an alternative that is empty, too long or equal
            to the answer, naming the sample.
    """
    if samples.alternatives is not None:
        return samples
    template = template or TemplateContext()
    kind = detect_format(dataset.column_names, "forget")
    if kind not in ANSWERS:
        raise ValueError(f"alternative answers need samples with a prompt; the forget dataset has the format {kind!r}")
    if source == "given":
        if column is None:
            raise ValueError("alternative answers are missing: give alternative_column, a column of the forget dataset")
        if column not in dataset.column_names:
            raise ValueError(f"forget dataset has no column {column!r}; it has {sorted(dataset.column_names)}")
        texts = [row[0] if isinstance(row, list) and row else row for row in dataset[column]]
    elif source == "refusal":
        if not refusals:
            raise ValueError("there is no refusal to choose from")
        texts = [refusals[i] for i in np.random.default_rng([seed, 2]).integers(0, len(refusals), len(dataset))]
    else:
        if model is None:
            raise ValueError("the model that writes alternative answers is missing")
        texts = model_alternatives(
            model,
            tokenizer,
            dataset,
            template=template,
            batch_size=batch_size,
            seed=seed,
            ids=samples.ids,
            progress=progress,
        )

    def answered(pairs: list[tuple[dict[str, Any], Any]], names: list[str]) -> list[dict[str, list[int]]]:
        for (row, text), where in zip(pairs, names, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: its alternative answer is empty")
            if _same(text, question_and_answer(row, kind)[1]):
                raise ValueError(f"{where}: its alternative answer is the answer that is to be forgotten")
        tokenised = tokenise_answers(pairs, kind, tokenizer, names, template)
        for where, length in zip(names, [len(tokens["input_ids"]) for tokens in tokenised], strict=True):
            if max_length is not None and length > max_length:
                raise ValueError(
                    f"{where}: its alternative answer ends at token {length}, beyond max_length={max_length}"
                )
        return tokenised

    names = [f"forget sample {sample_id!r}" for sample_id in samples.ids]
    rows = first_at_fault(answered, list(zip(dataset.with_format(None), texts, strict=True)), names)
    prepared = samples.dataset
    for name, key in zip(ALTERNATIVES, ("input_ids", "labels"), strict=True):
        prepared = prepared.add_column(name, [row[key] for row in rows])
    return replace(samples, dataset=prepared)


def alternatives_fingerprint(samples: Samples) -> str | None:
    """Hash of the alternative answers (16 hex digits), `None` when there are none."""
    return None if samples.alternatives is None else samples.alternatives.fingerprint


def model_alternatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    template: TemplateContext | None = None,
    batch_size: int = 8,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    progress: bool = True,
) -> list[str]:
    """Answers to the same questions with other facts, sampled from `model` (AltPO, Mekala et al. 2024, step 1).

    The model is asked for them in words (through its chat template where it has one), at temperature 1, and again, at
    most 5 times, where it repeats the answer or says nothing. Same seed: same answers on one machine, in any batches.
    Nothing of the model's generation config counts but its end tokens.

    Raises:
        ValueError: naming a sample for which it found none.
    """
    kind = detect_format(dataset.column_names, "forget")
    pairs = [question_and_answer(row, kind) for row in dataset.with_format(None)]
    prompts = [INSTRUCTION.format(question=question, answer=answer.strip()) for question, answer in pairs]
    if tokenizer.chat_template:
        context = template or TemplateContext()
        chats = [context.conversation([{"role": "user", "content": prompt}]) for prompt in prompts]
        prompts = Renderer(tokenizer, context)(chats, [{}] * len(chats), generation_prompt=True)
    else:
        prompts = [f"{prompt}\n\nOther answer:" for prompt in prompts]
    asked = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    limits = [2 * len(tokenizer(answer)["input_ids"]) + 8 for _, answer in pairs]
    stop = stop_tokens(tokenizer, model)
    found: dict[int, str] = {}
    for attempt in range(ATTEMPTS):
        rows = [row for row in range(len(pairs)) if row not in found]
        written = continuations(
            model,
            [asked[row] for row in rows],
            [limits[row] for row in rows],
            stop=stop,
            pad=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            batch_size=batch_size,
            sampling=Sampling(temperature=1.0, top_p=TOP_P, seed=(seed, attempt)),
            desc="alternatives" if progress else None,
        )
        for row, tokens in zip(rows, written, strict=True):
            lines = tokenizer.decode(tokens, skip_special_tokens=True).strip().splitlines()
            if lines and lines[0].strip() and not _same(lines[0], pairs[row][1]):
                found[row] = lines[0].strip()
    missing = [row for row in range(len(pairs)) if row not in found]
    if missing:
        name = missing[0] if ids is None else ids[missing[0]]
        raise ValueError(
            f"the model wrote no other answer for {len(missing)} forget samples, the first is {name!r}: give them "
            "with the data (objective 'dpo', alternative_column)"
        )
    return [found[row] for row in range(len(pairs))]


def _same(a: str, b: str) -> bool:
    return a.strip().casefold() == b.strip().casefold()
