"""What `cud evaluate` measures on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples, TemplateContext, prepare_samples

from .depth import logit_lens
from .gradients import gradient_norms
from .leak import LeakRule, by_name, sampled_leaks
from .memorization import (
    MEASURES,
    SECRET_SAID,
    TOKEN_STATISTICS,
    by_answer_length,
    evaluate_memorization,
    true_answers,
)
from .passes import Passes
from .secret import measure_secret
from .utility import answer_logps, prepare_answers, questions_and_answers, tofu_utility, truth_ratio


@dataclass
class Measured:
    """What one model says.

    Attributes:
        sets: `{"forget" | "retain" | "holdout": {metric: [N]}}`.
        statistics: by set, what attacks are made of (`TOKEN_STATISTICS`).
        texts: the true answers of the sets that attacks compare.
        truth_ratio: of the forget samples, `[N]`, where the data has wrong answers to compare with.
        paraphrased: answer probability of the forget samples asked in other words, `[N]`.
        utility: TOFU's figures, per sample.
        lens: answer probability of the forget samples read off every layer, `[N, L]`; only if asked for.
        leaks: of the forget and the holdout set, how many of the sampled answers leak, by kind (`sampled_leaks`).
        secret: of the same sets, what is left of the secret's tokens alone (`measure_secret`).
    """

    sets: dict[str, dict[str, np.ndarray]]
    statistics: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    truth_ratio: np.ndarray | None = None
    paraphrased: np.ndarray | None = None
    utility: dict[str, np.ndarray] = field(default_factory=dict)
    lens: np.ndarray | None = None
    leaks: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    secret: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def readable(self) -> np.ndarray | None:
        """The most of each forget sample's answer that can be read off any layer, `[N]` in [0, 1]; at least its
        answer probability."""
        return None if self.lens is None else self.lens.max(1)

    def per_sample(self) -> dict[str, np.ndarray]:
        """Columns of the forget samples for a table, without text."""
        columns = {**self.sets["forget"], **self.statistics["forget"]}
        if self.truth_ratio is not None:
            columns["truth_ratio"] = self.truth_ratio
        if self.paraphrased is not None:
            columns["paraphrased_probability"] = self.paraphrased
        if self.readable is not None:
            columns["logit_lens"] = self.readable
        return {**columns, **self.secret.get("forget", {}), **by_name(self.leaks.get("forget", {}))}


def measure(
    model: PreTrainedModel,
    sets: Mapping[str, Samples],
    forget_raw: Dataset,
    utility: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    template: TemplateContext | None = None,
    generate: bool = True,
    leak: LeakRule | None = None,
    secrets: Mapping[str, Sequence[Sequence[str]] | None] | None = None,
    lens: bool = False,
    gradients: bool = False,
    passes: Passes | None = None,
) -> Measured:
    """All that is measured on one model.

    Args:
        sets: prepared `forget` and, if there are any, `retain` and `holdout` sets.
        forget_raw: the forget set as text: its columns `perturbed_answer`, `paraphrased_answer` and
            `paraphrased_question` (TOFU's `*_perturbed` configurations) are used where they are there, NaN for a sample
            in which one is missing.
        utility: TOFU's sets, by the names in `UTILITY_SETS`; may be empty.
        template: what a chat template sees beside the messages, for what is not prepared yet.
        leak: sample answers of the forget and the holdout set, too, and count those that leak.
        secrets: of these sets, spans of each true answer as text; the prepared samples have their tokens marked.
        lens: also read the answers off every layer.
        gradients: also take the norm of each sample's gradient, of the sets that attacks compare.
        passes: how the model goes over the sets; by default in one go.
    """
    result, secrets, passes = Measured({}), secrets or {}, passes or Passes()
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "template": template}
    for name, prepared in sets.items():
        values = evaluate_memorization(
            model,
            prepared,
            tokenizer,
            batch_size=batch_size,
            generate=generate and name != "holdout",
            token_statistics=True,
            secrets=secrets.get(name),
            passes=passes,
            name=name,
        )
        result.statistics[name] = {key: values.pop(key) for key in TOKEN_STATISTICS}
        result.sets[name] = {key: values[key] for key in MEASURES if key in values}
        if name not in ("forget", "holdout"):
            continue
        result.texts[name] = true_answers(prepared, tokenizer)
        if gradients:
            by_sample = partial(_of_a_part, "gradient_norm", gradient_norms, model, batch_size)
            result.statistics[name] |= passes.over(f"{name}-gradients", prepared, by_sample)
        if secret := measure_secret(model, prepared, tokenizer, batch_size=batch_size, passes=passes, name=name):
            result.secret[name] = secret | {key: values[key] for key in (SECRET_SAID,) if key in values}
        if leak is not None:
            sampled = partial(_leaks_of_a_part, model, tokenizer, leak, secrets.get(name), batch_size, passes.writing)
            batches = by_answer_length(prepared, batch_size)
            result.leaks[name] = passes.over(f"{name}-sampled", prepared, sampled, batches)
    if lens:
        by_sample = partial(_of_a_part, "lens", logit_lens, model, batch_size)
        result.lens = passes.over("forget-lens", sets["forget"], by_sample)["lens"]
    options["passes"] = passes
    others = {
        kind: answer_logps(model, forget_raw, tokenizer, [column], question=asked, name="forget", **options)
        for kind, (column, asked) in other_answers(forget_raw).items()
    }
    if "wrong" in others:
        own = result.statistics["forget"]["mean_logps"]
        correct = others["paraphrased"][:, 0] if "paraphrased" in others else own
        result.truth_ratio = truth_ratio(correct, others["wrong"])
    if "asked" in others:
        result.paraphrased = np.exp(others["asked"][:, 0])
    if utility:
        result.utility = tofu_utility(model, utility, tokenizer, generate=generate, **options)
    return result


def _of_a_part(
    name: str,
    measure: Callable[..., np.ndarray],
    model: PreTrainedModel,
    batch_size: int,
    part: Samples,
    rows: list[int],
) -> dict[str, np.ndarray]:
    """What `measure` says of some samples, as `Passes.over` asks for it."""
    return {name: measure(model, part, batch_size=batch_size)}


def _leaks_of_a_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: LeakRule,
    secrets: Sequence[Sequence[str]] | None,
    batch_size: int,
    desc: str | None,
    part: Samples,
    rows: list[int],
) -> dict[str, np.ndarray]:
    told = None if secrets is None else [secrets[row] for row in rows]
    return sampled_leaks(model, part, tokenizer, rule, secrets=told, batch_size=batch_size, desc=desc)


def other_answers(forget: Dataset) -> dict[str, tuple[str, str]]:
    """What else is measured of a forget set by its columns: of each kind the column that answers and the one that asks.

    TOFU's: `wrong` answers, the true one `paraphrased`, and the true one `asked` for in other words.
    """
    kinds = {
        "wrong": ("perturbed_answer", "question"),
        "paraphrased": ("paraphrased_answer", "question"),
        "asked": ("answer", "paraphrased_question"),
    }
    found = {kind: pair for kind, pair in kinds.items() if set(pair) <= set(forget.column_names)}
    if "wrong" not in found:
        found.pop("paraphrased", None)
    return found


def check_texts(
    forget: Dataset, utility: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Raise `ValueError` for what `measure` would refuse of the texts that it prepares itself, before there is a model.

    Args:
        forget, utility: as for `measure`.
        options: `max_length` and `template`.
    """
    for column, asked in other_answers(forget).values():
        prepare_answers(forget, tokenizer, [column], question=asked, name="forget", **options)
    for name, dataset in utility.items():
        prepare_answers(dataset, tokenizer, ["perturbed_answer"], name=name, **options)
        if "paraphrased_answer" in dataset.column_names:
            prepare_answers(dataset, tokenizer, ["paraphrased_answer"], name=name, **options)
        prepare_samples(questions_and_answers(dataset), tokenizer, name=name, **options)
