"""What a study knows beside its runs: samples that no loss sees, and a model that never saw the forget set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from cud_trainer.commands.options import load_tokenizer
from cud_trainer.data import Samples, evenly_spaced, prepare_samples
from cud_trainer.data.template import TRAIN_ON, TemplateContext
from cud_trainer.models.fingerprint import file_hash

from .grid import Cell
from .options import StudyArguments

REFERENCE = "never-seen"
# Options of `cud train` that decide which tokens a sample becomes.
OPTIONS_OF_TEXT = (
    "max_length",
    "system_prompt",
    "chat_template_kwargs",
    "train_on",
    "chat_template_path",
    "pad_token",
    "eos_token",
)


def shared_template(train: Mapping[str, Any]) -> TemplateContext:
    """What a chat template sees in all cells, by the options that they share."""
    told = train.get("chat_template_kwargs") or {}
    return TemplateContext(train.get("system_prompt"), told, train.get("train_on", TRAIN_ON[0]))


@dataclass(frozen=True)
class HeldOut:
    """Attributes:
    groups: of each held-out sample that is measured; its id, without a `group_column`.
    fingerprint: of these samples.
    """

    groups: list[Any]
    fingerprint: str


def identity_of_heldout(args: StudyArguments, model_args: ModelConfig) -> HeldOut | None:
    """The held-out samples of a study, checked; `None` without.

    Raises:
        ValueError: naming a sample or a group that a loss sees, too.
    """
    if args.heldout_dataset is None:
        return None
    train: dict[str, Any] = dict(args.train)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(model_args, SimpleNamespace(**train))
    column = train.get("group_column")
    how: dict[str, Any] = {"max_length": train.get("max_length") or 1024, "template": shared_template(train)}
    held_out, (forget, retain) = args.load_heldout(tokenizer), args.load(tokenizer)
    assert held_out is not None
    sets = {"held-out": held_out, "forget": forget, **({} if retain is None else {"retain": retain})}
    prepared = {name: prepare_samples(part, tokenizer, name=name, **how) for name, part in sets.items()}
    if isinstance(column, str) and column not in held_out.column_names:
        raise ValueError(f"held-out dataset has no column {column!r}; it has {sorted(held_out.column_names)}")
    for name in list(sets)[1:]:
        check_unseen(prepared["held-out"], prepared[name], name)
        if isinstance(column, str) and column in sets[name].column_names:
            check_groups(held_out[column], sets[name][column], column, name)
    part = evenly_spaced(held_out, args.heldout_samples)
    measured = prepare_samples(part, tokenizer, name="held-out", **how)
    groups = list(part[column]) if isinstance(column, str) else list(measured.ids)
    return HeldOut(groups, measured.fingerprint)


def check_unseen(held_out: Samples, seen: Samples, name: str) -> None:
    """Raise `ValueError` naming the first held-out sample that is also in the set `name`, by id or by content."""
    ids = set(seen.ids)
    contents = {tuple(tokens): sample_id for sample_id, tokens in zip(seen.ids, seen["input_ids"], strict=True)}
    for sample_id, tokens in zip(held_out.ids, held_out["input_ids"], strict=True):
        if sample_id in ids:
            raise ValueError(f"held-out sample {sample_id!r} is in the {name} dataset: a loss sees it")
        if tuple(tokens) in contents:
            other = contents[tuple(tokens)]
            raise ValueError(f"held-out sample {sample_id!r} has the same content as {name} sample {other!r}")


def check_groups(held_out: Any, seen: Any, column: str, name: str) -> None:
    """Raise `ValueError` naming the first group of the held-out samples that is also in the set `name`."""
    groups = {str(group) for group in seen}
    for group in held_out:
        if str(group) in groups:
            raise ValueError(f"held-out group {group!r} ({column}) is in the {name} dataset: a loss sees it")


def reference_cell(args: StudyArguments, base: dict[str, Any]) -> list[Cell]:
    """The cell that asks a model that never saw the forget set; none where the study names none."""
    if args.reference_model is None:
        return []
    folder = Path(args.reference_model)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder.is_dir() else []
    settings = {
        **base,
        "kind": REFERENCE,
        "reference_model": args.reference_model,
        "files": {path.name: file_hash(path) for path in files},
        "options": {name: value for name, value in dict(args.train).items() if name in OPTIONS_OF_TEXT},  # type: ignore[arg-type]
    }
    return [Cell(REFERENCE, REFERENCE, {}, settings)]


def ask_reference(settings: dict[str, Any], forget: Dataset, tokenizer: Any, day: str | None) -> dict[str, Any]:
    """What the work on a reference cell leaves: answer probability of every forget sample."""
    from cud_trainer.logprobs import answer_probability
    from cud_trainer.models.loading import load_causal_lm

    options = settings["options"]
    template = shared_template(options).on({"date": day})
    length = options.get("max_length") or 1024
    samples = prepare_samples(forget, tokenizer, max_length=length, name="forget", template=template)
    model = load_causal_lm(settings["reference_model"], dtype="float32")
    return {"forget": answer_probability(model, samples).tolist()}
